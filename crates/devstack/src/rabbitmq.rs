//! A private RabbitMQ node.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use rustix::process::Signal;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::{
    folder::{Folder, write_private},
    log::Log,
    ports,
    process::{Launch, Process},
    program::client,
    release::Programs,
    tls::Certificate,
};

/// The same at every start: a node finds its data by its name. Two nodes of this name do not meet,
/// because each cluster has its own epmd, the daemon that knows names.
const NODE: &str = "devstack";
/// Its administrator.
pub const USER: &str = "devstack";

/// A node that listens on 127.0.0.1 alone, with the management plugin, and with its data, its cookie,
/// its home and its epmd in a stack's folder.
#[derive(Debug)]
pub struct RabbitMq {
    programs: Programs,
    node: String,
    home: PathBuf,
    ports: Ports,
    password: String,
    mark: String,
    log: Log,
    epmd_log: Log,
    process: Option<Process>,
    epmd: Option<Process>,
    version: String,
}

/// Where a node listens.
#[derive(Clone, Copy, Debug)]
struct Ports {
    amqp: u16,
    management: u16,
    distribution: u16,
    epmd: u16,
}

impl RabbitMq {
    /// Writes the node's configuration. `amqp` and `management` are its ports.
    pub fn new(folder: &Folder, amqp: u16, management: u16) -> anyhow::Result<Self> {
        let ports = Ports { amqp, management, distribution: ports::free(), epmd: ports::free() };
        Self::configure(folder, "rabbitmq", NODE, ports, &[])
    }

    /// The node `number`, from 2 on, of a cluster whose first is this one, which runs while the other
    /// starts for the first time. It finds it by this one's epmd, so it ends first.
    pub fn peer(&self, folder: &Folder, number: u8) -> anyhow::Result<Self> {
        let ports = Ports {
            amqp: ports::free(),
            management: ports::free(),
            distribution: ports::free(),
            epmd: self.ports.epmd,
        };
        let node = format!("{NODE}{number}");
        let cluster = [
            "cluster_formation.peer_discovery_backend = classic_config".to_owned(),
            format!("cluster_formation.classic_config.nodes.1 = {}@localhost", self.node),
            format!("cluster_formation.classic_config.nodes.2 = {node}@localhost"),
        ];
        Self::configure(folder, &format!("rabbitmq{number}"), &node, ports, &cluster)
    }

    fn configure(
        folder: &Folder,
        part: &str,
        node: &str,
        ports: Ports,
        more: &[String],
    ) -> anyhow::Result<Self> {
        let Ports { amqp, management, .. } = ports;
        let home = folder.part(part)?;
        let password = folder.secrets().rabbitmq.clone();
        // The first start makes the user; later ones find it in the data.
        let settings = [
            format!("listeners.tcp.1 = 127.0.0.1:{amqp}"),
            "management.tcp.ip = 127.0.0.1".to_owned(),
            format!("management.tcp.port = {management}"),
            format!("default_user = {USER}"),
            format!("default_pass = {password}"),
            "log.console = true".to_owned(),
            "log.file = false".to_owned(),
            // Of all memory, 40 % by default; a developer's machine has other things to do.
            "vm_memory_high_watermark.absolute = 1GB".to_owned(),
        ];
        let settings = [&settings, more].concat().join("\n") + "\n";
        write_private(&home.join("rabbitmq.conf"), &settings)?;
        write_private(&home.join("advanced.config"), "[].\n")?;
        write_private(&home.join("enabled_plugins"), "[rabbitmq_management].\n")?;
        fs::create_dir_all(home.join("conf.d"))?;
        let cookie = home.join(".erlang.cookie");
        if !cookie.exists() {
            write_private(&cookie, &folder.secrets().cookie)?;
        }
        Ok(Self {
            programs: find()?,
            node: node.to_owned(),
            home,
            ports,
            password,
            mark: folder.mark().to_owned(),
            log: folder.log(part)?,
            epmd_log: folder.log(&format!("{part}-epmd"))?,
            process: None,
            epmd: None,
            version: String::new(),
        })
    }

    /// From the next start on, it listens on `port` as well, with TLS, for clients that show a
    /// certificate of the same authority. They may log in by that alone, as the user of its common name.
    pub fn encrypt(&self, port: u16, certificate: &Certificate) -> anyhow::Result<()> {
        let conf = self.home.join("rabbitmq.conf");
        let settings = [
            fs::read_to_string(&conf)?,
            format!("listeners.ssl.1 = 127.0.0.1:{port}"),
            format!("ssl_options.cacertfile = {}", certificate.authority.display()),
            format!("ssl_options.certfile = {}", certificate.certificate.display()),
            format!("ssl_options.keyfile = {}", certificate.key.display()),
            "ssl_options.verify = verify_peer".to_owned(),
            "ssl_options.fail_if_no_peer_cert = true".to_owned(),
            "auth_mechanisms.1 = PLAIN".to_owned(),
            "auth_mechanisms.2 = AMQPLAIN".to_owned(),
            "auth_mechanisms.3 = EXTERNAL".to_owned(),
            "ssl_cert_login_from = common_name".to_owned(),
        ];
        let plugins = "[rabbitmq_management, rabbitmq_auth_mechanism_ssl].\n";
        write_private(&self.home.join("enabled_plugins"), plugins)?;
        write_private(&conf, &(settings.join("\n") + "\n"))
    }

    /// It takes no larger bodies from now on, also when it is started again.
    pub async fn limit_bodies(&self, bytes: usize) -> anyhow::Result<()> {
        let conf = self.home.join("rabbitmq.conf");
        let settings = format!("{}max_message_size = {bytes}\n", fs::read_to_string(&conf)?);
        write_private(&conf, &settings)?;
        // RabbitMQ 4 reads the setting once, at its start, and keeps it here.
        let set = format!(
            "application:set_env(rabbit, max_message_size, {bytes}), persistent_term:put(max_message_size, {bytes})."
        );
        self.control(&["eval", &set]).await
    }

    /// Starts it with the programs of this release (`4.3`) from the next start on.
    pub fn set_release(&mut self, release: &str) -> anyhow::Result<()> {
        self.programs = Programs::of("rabbitmq", release)?;
        Ok(())
    }

    /// What it calls its version, once it was started.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Starts it and waits until it answers.
    pub async fn start(&mut self) -> anyhow::Result<()> {
        ensure!(self.process.is_none(), "RabbitMQ runs already");
        self.start_epmd().await?;
        let launch = self.launch("RabbitMQ", &self.programs.file("rabbitmq-server"), self.log.clone());
        self.process = Some(launch.spawn().await?);
        self.ready().await
    }

    /// Waits until it answers.
    pub async fn ready(&mut self) -> anyhow::Result<()> {
        let process = self.process.as_mut().context("RabbitMQ was not started")?;
        let end = tokio::time::Instant::now() + Duration::from_mins(3);
        loop {
            process.check()?;
            let ports = self.ports;
            let reason = match answers(ports, &self.password).await {
                Ok(version) => {
                    self.version = version;
                    return Ok(());
                }
                Err(reason) => reason,
            };
            if tokio::time::Instant::now() > end {
                bail!("RabbitMQ is not ready after 3 minutes: {reason}{}", process.last_words());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Otherwise the node would start one that outlives it. There is one for all of a cluster.
    async fn start_epmd(&mut self) -> anyhow::Result<()> {
        if TcpStream::connect(("127.0.0.1", self.ports.epmd)).await.is_ok() {
            return Ok(());
        }
        let launch = self.launch("epmd", &find_epmd(&self.programs)?, self.epmd_log.clone());
        let epmd = self.epmd.insert(launch.spawn().await?);
        let end = tokio::time::Instant::now() + Duration::from_secs(10);
        while let Err(error) = TcpStream::connect(("127.0.0.1", self.ports.epmd)).await {
            epmd.check()?;
            ensure!(tokio::time::Instant::now() < end, "epmd is not ready after 10 s: {error}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    fn launch(&self, name: &str, program: &Path, log: Log) -> Launch {
        let Ports { distribution, epmd, .. } = self.ports;
        let path = |name: &str| self.home.join(name);
        let node = self.node();
        Launch::new(name, program, None, Signal::KILL, &self.mark, log)
            .inside(self.programs.system())
            .env("HOME", &self.home)
            .env("ERL_EPMD_PORT", epmd.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_NODENAME", node)
            .env("RABBITMQ_DIST_PORT", distribution.to_string())
            .env("RABBITMQ_MNESIA_BASE", path("data"))
            .env("RABBITMQ_LOG_BASE", path("log"))
            .env("RABBITMQ_CONFIG_FILE", path("rabbitmq.conf"))
            .env("RABBITMQ_CONFIG_FILES", path("conf.d"))
            .env("RABBITMQ_ADVANCED_CONFIG_FILE", path("advanced.config"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", path("enabled_plugins"))
            .env("RABBITMQ_GENERATED_CONFIG_DIR", path("generated"))
            // The machine's own settings are none of ours.
            .env("RABBITMQ_CONF_ENV_FILE", "/dev/null")
            // "Allowing input", which `-noinput` takes back, makes the script become the node instead
            // of starting it, so that our signals reach the node.
            .env("RABBITMQ_ALLOW_INPUT", "1")
            .env("RABBITMQ_SERVER_START_ARGS", "-noinput +B i")
            .env("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "-kernel inet_dist_use_interface {127,0,0,1}")
    }

    /// The administrator's AMQP URL, without a virtual host.
    pub fn url(&self) -> String {
        self.url_of(USER)
    }

    /// The same of one of the users that [`users`](crate::users) makes.
    pub fn url_of(&self, user: &str) -> String {
        self.url_through(user, self.ports.amqp)
    }

    /// The same by way of another port, where something in between listens.
    pub fn url_through(&self, user: &str, port: u16) -> String {
        format!("amqp://{user}:{}@127.0.0.1:{port}", self.password)
    }

    /// Every user's password.
    pub fn password(&self) -> &str {
        &self.password
    }

    /// The port that it listens at.
    pub fn port(&self) -> u16 {
        self.ports.amqp
    }

    /// The management API's URL, with the administrator's name and password.
    pub fn management_url(&self) -> String {
        format!("http://{USER}:{}@127.0.0.1:{}", self.password, self.ports.management)
    }

    /// Its process, while there is one.
    pub fn process(&mut self) -> Option<&mut Process> {
        self.process.as_mut()
    }

    /// Stops the node in good order, then its epmd. `false` tells that the node was killed.
    pub async fn stop(&mut self, hurry: &CancellationToken) -> bool {
        let stopped = match self.process.take() {
            Some(mut process) => process.stop(Signal::TERM, Duration::from_secs(40), hurry).await,
            None => true,
        };
        if let Some(mut epmd) = self.epmd.take() {
            epmd.kill().await;
        }
        stopped
    }

    /// Forgets all that it stored: the next start makes a new node under the old name.
    pub fn forget(&self) -> anyhow::Result<()> {
        ensure!(self.process.is_none(), "RabbitMQ runs");
        Ok(fs::remove_dir_all(self.home.join("data"))?)
    }

    /// Runs `rabbitmqctl` with `args` against the node.
    pub async fn control(&self, args: &[&str]) -> anyhow::Result<()> {
        let program = self.programs.file("rabbitmqctl");
        self.launch("rabbitmqctl", &program, self.log.beside("rabbitmqctl")).args(args).run().await
    }

    /// Runs a script that calls `rabbitmqctl`, with `args`, and with `input` as its standard input.
    pub async fn script(&self, script: &Path, args: &[&str], input: &Path) -> anyhow::Result<()> {
        let folders = [self.programs.folder().to_owned()].into_iter().chain(path());
        self.launch("a script", Path::new("bash"), self.log.beside("script"))
            .env("PATH", std::env::join_paths(folders)?)
            .args(["-c", "input=$1; shift; exec \"$@\" < \"$input\"", "-"])
            .args([input, script])
            .args(args)
            .run()
            .await
    }

    /// Its name in the cluster.
    pub fn node(&self) -> String {
        format!("{}@localhost", self.node)
    }

    /// Kills the node with SIGKILL.
    pub async fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().await;
        }
    }

    /// Stops the node in its tracks with SIGSTOP: connections stay open, nobody answers.
    pub fn pause(&self) {
        self.process.iter().for_each(Process::pause);
    }

    /// Undoes [`pause`](Self::pause).
    pub fn resume(&self) {
        self.process.iter().for_each(Process::resume);
    }
}

/// Its version, once the management API lets the administrator in, and AMQP is open: it opens last.
async fn answers(ports: Ports, password: &str) -> anyhow::Result<String> {
    let url = format!("http://127.0.0.1:{}/api/overview", ports.management);
    let answer = client()?.get(url).basic_auth(USER, Some(password)).send().await;
    let answer = answer.map_err(|_| anyhow::anyhow!("its management API does not answer"))?;
    let status = answer.status();
    ensure!(status.is_success(), "its management API answers {status}");
    let overview: serde_json::Value = answer.json().await.context("its management API answers no JSON")?;
    TcpStream::connect(("127.0.0.1", ports.amqp)).await.context("its AMQP port is closed")?;
    Ok(overview["rabbitmq_version"].as_str().unwrap_or("?").to_owned())
}

/// The programs of the release that `DEVSTACK_RABBITMQ` names, or those in `RABBITMQ_BIN`, or in one of the usual
/// places. Debian's wrapper in `/usr/sbin` insists on the user `rabbitmq`, so it comes last.
fn find() -> anyhow::Result<Programs> {
    if let Some(programs) = Programs::rabbitmq()? {
        return Ok(programs);
    }
    let folders = match std::env::var_os("RABBITMQ_BIN") {
        Some(bin) => vec![PathBuf::from(bin)],
        None => [PathBuf::from("/usr/lib/rabbitmq/bin")].into_iter().chain(path()).collect(),
    };
    let folder = folders.into_iter().find(|folder| folder.join("rabbitmq-server").is_file());
    folder.map(Programs::here).context(
        "RabbitMQ is not there; run crates/devstack/install, or set RABBITMQ_BIN to the folder with rabbitmq-server",
    )
}

/// Of the same system.
fn find_epmd(programs: &Programs) -> anyhow::Result<PathBuf> {
    if programs.system().is_some() {
        return Ok("/usr/bin/epmd".into());
    }
    let folders = path().chain([PathBuf::from("/usr/lib/erlang/bin")]);
    folders
        .map(|folder| folder.join("epmd"))
        .find(|file| file.is_file())
        .context("epmd is not there; it is part of Erlang, which RabbitMQ needs")
}

fn path() -> impl Iterator<Item = PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).collect::<Vec<_>>().into_iter()
}
