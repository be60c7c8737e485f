//! A private PostgreSQL.

use std::{
    fs,
    os::unix::fs::{MetadataExt, chown},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use rustix::process::Signal;
use sqlx::{Connection, PgConnection};
use tokio_util::sync::CancellationToken;

use crate::{
    folder::{Folder, write_private},
    log::Log,
    process::{Launch, Process, User},
    release::{self, Programs},
    tls::Certificate,
};

/// The oldest release that the schemas work on: views with `security_invoker` came with it.
const OLDEST: u32 = 15;

/// A server that listens on 127.0.0.1 alone, with its data in a stack's folder.
#[derive(Debug)]
pub struct Postgres {
    programs: Programs,
    data: PathBuf,
    user: Option<User>,
    port: u16,
    password: String,
    durable: bool,
    settings: &'static [&'static str],
    mark: String,
    log: Log,
    process: Option<Process>,
    version: String,
}

impl Postgres {
    /// Makes the data folder unless it is there. `durable`: a commit survives a loss of power, which
    /// tests need not pay for.
    pub async fn new(folder: &Folder, port: u16, durable: bool) -> anyhow::Result<Self> {
        let (postgres, home) = Self::place(folder, "postgres", port, durable)?;
        if !postgres.data.join("PG_VERSION").is_file() {
            postgres.create(&home).await.context("cannot make PostgreSQL's data folder")?;
        }
        Ok(postgres)
    }

    fn place(folder: &Folder, name: &str, port: u16, durable: bool) -> anyhow::Result<(Self, PathBuf)> {
        let home = folder.part(name)?;
        let data = home.join("data");
        let user = user(folder.path(), &home)?;
        let postgres = Self {
            programs: find(&data)?,
            data,
            user,
            port,
            password: folder.secrets().postgres.clone(),
            durable,
            settings: &[],
            mark: folder.mark().to_owned(),
            log: folder.log(name)?,
            process: None,
            version: String::new(),
        };
        Ok((postgres, home))
    }

    /// Starts it with more settings from now on: `name=value`.
    #[must_use]
    pub fn with(mut self, settings: &'static [&'static str]) -> Self {
        self.settings = settings;
        self
    }

    /// Starts it with the programs of this release (`18`) from the next start on.
    pub fn set_release(&mut self, release: &str) -> anyhow::Result<()> {
        self.programs = Programs::of("postgres", release)?;
        Ok(())
    }

    /// What it calls its version, once it was started.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Starts it with these settings from the next start on, instead of those of before.
    pub fn set(&mut self, settings: &'static [&'static str]) {
        self.settings = settings;
    }

    /// A physical standby of this one, which runs: a copy that follows it once it is started.
    pub async fn standby(&self, folder: &Folder, port: u16) -> anyhow::Result<Self> {
        let (standby, _) = Self::place(folder, "standby", port, self.durable)?;
        // `--write-recovery-conf` stores the connection, password and all, in the copy.
        standby
            .launch("pg_basebackup")
            .env("PGPASSWORD", &self.password)
            .env("PGHOST", "127.0.0.1")
            .env("PGPORT", self.port.to_string())
            .env("PGUSER", "postgres")
            .args(["--write-recovery-conf", "--checkpoint=fast", "--no-sync"])
            .args([format!("--pgdata={}", standby.data.display())])
            .run()
            .await
            .context("cannot copy the primary")?;
        Ok(standby)
    }

    async fn create(&self, home: &Path) -> anyhow::Result<()> {
        // A half-made folder of an earlier attempt.
        let new = home.join("new");
        if new.exists() {
            fs::remove_dir_all(&new)?;
        }
        let password = home.join("password");
        write_private(&password, &self.password)?;
        if let Some(user) = self.user {
            chown(&password, Some(user.uid), Some(user.gid))?;
        }
        // `password` and not `scram-sha-256` between client and server: both store it as SCRAM, but
        // a debug build needs a tenth of a second for each of SCRAM's handshakes. Nobody listens in
        // on 127.0.0.1 who could not read the password's file.
        let args =
            ["--username=postgres", "--auth=password", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"];
        self.launch("initdb")
            .args(args)
            .args([format!("--pgdata={}", new.display()), format!("--pwfile={}", password.display())])
            .run()
            .await?;
        fs::remove_file(&password)?;
        fs::rename(&new, &self.data)?;
        Ok(())
    }

    /// Runs the server's program `name`.
    fn launch(&self, name: &str) -> Launch {
        // SIGQUIT: when this process is killed, the server ends at once and takes its sessions along.
        let file = self.programs.file(name);
        Launch::new("PostgreSQL", &file, self.user, Signal::QUIT, &self.mark, self.log.clone())
            .inside(self.programs.system())
    }

    /// Starts it and waits until it answers.
    pub async fn start(&mut self) -> anyhow::Result<()> {
        ensure!(self.process.is_none(), "PostgreSQL runs already");
        let durable = if self.durable { "on" } else { "off" };
        let settings = [
            format!("port={}", self.port),
            "listen_addresses=127.0.0.1".to_owned(),
            "unix_socket_directories=".to_owned(),
            "max_connections=300".to_owned(),
            "max_prepared_transactions=20".to_owned(),
            // Its shared memory lies with its data, so that nothing stays when the server is killed.
            "dynamic_shared_memory_type=mmap".to_owned(),
            format!("fsync={durable}"),
            format!("full_page_writes={durable}"),
            format!("cluster_name=devstack-{}", self.port),
        ];
        let launch = self.launch("postgres").args([Path::new("-D"), &self.data]);
        let settings = settings.iter().map(String::as_str).chain(self.settings.iter().copied());
        let launch = settings.fold(launch, |launch, setting| launch.args(["-c", setting]));
        let process = self.process.insert(launch.spawn().await?);
        let end = tokio::time::Instant::now() + Duration::from_mins(1);
        loop {
            process.check()?;
            let url = format!("postgres://postgres:{}@127.0.0.1:{}/postgres", self.password, self.port);
            let attempt = tokio::time::timeout(Duration::from_secs(5), PgConnection::connect(&url)).await;
            let reason = match attempt {
                Ok(Ok(mut conn)) => {
                    self.version = sqlx::query_scalar("SHOW server_version").fetch_one(&mut conn).await?;
                    return Ok(conn.close().await?);
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => "it does not answer".to_owned(),
            };
            if tokio::time::Instant::now() > end {
                bail!("PostgreSQL is not ready after a minute: {reason}{}", process.last_words());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Starts `PgBouncer` before it, on `port`, with `settings` of its file. In the `pool_mode` `transaction` it gives a
    /// session to each transaction anew, in the mode `session` to each connection. `users` log in with `password`.
    pub async fn pooler(
        &self,
        folder: &Folder,
        port: u16,
        settings: &[&str],
        users: &[&str],
        password: &str,
    ) -> anyhow::Result<Process> {
        let home = folder.part(&format!("pgbouncer-{port}"))?;
        let logins: Vec<_> = users.iter().map(|user| format!("\"{user}\" \"{password}\"\n")).collect();
        let users = home.join("users");
        let first = [
            "[databases]".to_owned(),
            format!("* = host=127.0.0.1 port={}", self.port),
            "[pgbouncer]".to_owned(),
            "listen_addr = 127.0.0.1".to_owned(),
            format!("listen_port = {port}"),
            "unix_socket_dir =".to_owned(),
            "auth_type = plain".to_owned(),
            format!("auth_file = {}", users.display()),
        ];
        let conf = home.join("pgbouncer.ini");
        write_private(&conf, &format!("{}\n{}\n", first.join("\n"), settings.join("\n")))?;
        write_private(&users, &logins.concat())?;
        if let Some(user) = self.user {
            for path in [&home, &conf, &users] {
                chown(path, Some(user.uid), Some(user.gid))?;
            }
        }
        let (program, log) = (self.programs.pooler()?, folder.log("pgbouncer")?);
        let launch = Launch::new("PgBouncer", &program, self.user, Signal::TERM, &self.mark, log);
        let mut process = launch.inside(self.programs.system()).args([conf]).spawn().await?;
        let end = tokio::time::Instant::now() + Duration::from_secs(10);
        while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            process.check()?;
            ensure!(
                tokio::time::Instant::now() < end,
                "PgBouncer does not listen after 10 s{}",
                process.last_words()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(process)
    }

    /// The release of the `PgBouncer` that [`pooler`](Self::pooler) starts, such as 1 and 18: the one of the server's Debian.
    pub fn pooler_release(&self) -> anyhow::Result<(u32, u32)> {
        let mut words = self.programs.system().map(release::inside).unwrap_or_default();
        words.extend([self.programs.pooler()?.into(), "--version".into()]);
        let mut words = words.into_iter();
        let output = std::process::Command::new(words.next().unwrap_or_default()).args(words).output()?;
        // `PgBouncer 1.18.0`
        let text = String::from_utf8(output.stdout)?;
        let version = text.lines().next().and_then(|line| line.split(' ').nth(1)).unwrap_or_default();
        let mut numbers = version.split('.').map_while(|number| number.parse().ok());
        numbers.next().zip(numbers.next()).with_context(|| format!("PgBouncer calls its version {text:?}"))
    }

    /// A superuser's URL, without a database.
    pub fn url(&self) -> String {
        self.url_of("postgres")
    }

    /// The port that it listens at.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Listens at another port from the next start on: another server's address moves to it.
    pub fn listen_at(&mut self, port: u16) {
        self.port = port;
    }

    /// Runs a client program that comes with it (`pg_dump`) to its end, at most a minute, as the superuser.
    pub async fn tool(&self, name: &str, args: &[&str]) -> anyhow::Result<()> {
        self.client(name, self.log.clone())
            .env("PGPASSWORD", &self.password)
            .env("PGHOST", "127.0.0.1")
            .env("PGPORT", self.port.to_string())
            .env("PGUSER", "postgres")
            .args(args)
            .run()
            .await
    }

    /// A client program that comes with it, ready to be run.
    pub fn client(&self, name: &str, log: Log) -> Launch {
        let file = self.programs.file(name);
        Launch::new(name, &file, None, Signal::KILL, &self.mark, log).inside(self.programs.system())
    }

    /// The URL of `role`, without a database.
    pub fn url_of(&self, role: &str) -> String {
        self.url_through(role, self.port)
    }

    /// The URL of `role` by way of another port, where something in between listens.
    pub fn url_through(&self, role: &str, port: u16) -> String {
        format!("postgres://{role}:{}@127.0.0.1:{port}", self.password)
    }

    /// Encrypts connections that ask for it, from the next start on.
    pub fn encrypt(&self, certificate: &Certificate) -> anyhow::Result<()> {
        // The server insists on owning its key, which nobody else may read.
        let key = self.data.join("server.key");
        write_private(&key, &fs::read_to_string(&certificate.key)?)?;
        if let Some(user) = self.user {
            chown(&key, Some(user.uid), Some(user.gid))?;
        }
        // The certificate is for everybody, but its folder may be closed.
        fs::write(self.data.join("server.crt"), fs::read(&certificate.certificate)?)?;
        let conf = self.data.join("postgresql.conf");
        Ok(fs::write(&conf, fs::read_to_string(&conf)? + "ssl = on\n")?)
    }

    /// Its process, while there is one.
    pub fn process(&mut self) -> Option<&mut Process> {
        self.process.as_mut()
    }

    /// A fast shutdown: sessions are ended, everything is on disk. `false`
    /// tells that there was no time for it.
    pub async fn stop(&mut self, hurry: &CancellationToken) -> bool {
        match self.process.take() {
            Some(mut process) => process.stop(Signal::INT, Duration::from_secs(30), hurry).await,
            None => true,
        }
    }

    /// An immediate shutdown: sessions are cut off, and it recovers at the next start.
    pub async fn abort(&mut self) -> bool {
        match self.process.take() {
            Some(mut process) => {
                process.stop(Signal::QUIT, Duration::from_secs(30), &CancellationToken::new()).await
            }
            None => true,
        }
    }

    /// Kills all of its processes, as a loss of power would. It recovers at the next start.
    pub async fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().await;
        }
    }

    /// Stops all of its processes in their tracks with SIGSTOP.
    pub fn pause(&self) {
        self.process.iter().for_each(Process::pause);
    }

    /// Undoes [`pause`](Self::pause).
    pub fn resume(&self) {
        self.process.iter().for_each(Process::resume);
    }
}

/// The server refuses to run as root, so root becomes somebody without rights: the owner of `home` if
/// that is another user already, else `postgres`, else `nobody`.
fn user(folder: &Path, home: &Path) -> anyhow::Result<Option<User>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let owner = fs::metadata(home)?;
    let (uid, gid) = if owner.uid() == 0 {
        let accounts = fs::read_to_string("/etc/passwd").context("cannot read /etc/passwd")?;
        ["postgres", "nobody"]
            .iter()
            .find_map(|name| account(&accounts, name))
            .context("PostgreSQL will not run as root, and there is no user postgres or nobody to become")?
    } else {
        (owner.uid(), owner.gid())
    };
    chown(home, Some(uid), Some(gid))?;
    let closed = |folder: &Path| fs::metadata(folder).is_ok_and(|folder| folder.mode() & 0o001 == 0);
    Ok(Some(User { uid, gid, may_pass: folder.ancestors().any(closed) }))
}

fn account(accounts: &str, name: &str) -> Option<(u32, u32)> {
    let fields = accounts.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let found = fields.into_iter().find(|fields| fields.first() == Some(&name))?;
    Some((found.get(2)?.parse().ok()?, found.get(3)?.parse().ok()?))
}

/// The programs of the release that `DEVSTACK_POSTGRES` names, or those in `PG_BIN`, or the newest of the usual places.
/// When there is data already, of the release that made it.
fn find(data: &Path) -> anyhow::Result<Programs> {
    let made_by = fs::read_to_string(data.join("PG_VERSION")).ok().and_then(|text| text.trim().parse().ok());
    let found = match Programs::postgres()? {
        Some(programs) => vec![programs],
        None => candidates().into_iter().map(Programs::here).collect(),
    };
    let mut found: Vec<(u32, Programs)> =
        found.into_iter().filter_map(|programs| Some((release(&programs)?, programs))).collect();
    found.sort_by_key(|(release, _)| *release);
    let fits = |release: u32| made_by.map_or(release >= OLDEST, |made_by: u32| made_by == release);
    if let Some((_, programs)) = found.iter().rev().find(|(release, _)| fits(*release)) {
        return Ok(programs.clone());
    }
    let found: Vec<_> = found
        .iter()
        .map(|(release, programs)| format!("{release} in {}", programs.folder().display()))
        .collect();
    let found = if found.is_empty() { "none".to_owned() } else { found.join(", ") };
    match made_by {
        Some(made_by) => bail!(
            "the data in {} is of PostgreSQL {made_by}, but found is {found}; install that release, set \
             PG_BIN to its programs, or remove the folder",
            data.display()
        ),
        None => bail!(
            "PostgreSQL {OLDEST} or later is needed, found is {found}; run crates/devstack/install, or set PG_BIN to \
             the folder with initdb and postgres"
        ),
    }
}

fn candidates() -> Vec<PathBuf> {
    if let Some(bin) = std::env::var_os("PG_BIN") {
        return vec![bin.into()];
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian and Ubuntu; the packages of PostgreSQL's own repository for Fedora and its relatives.
    let places = [("/usr/lib/postgresql", ""), ("/usr", "pgsql-")].into_iter().flat_map(|(place, prefix)| {
        let folders = fs::read_dir(place).into_iter().flatten().filter_map(Result::ok);
        folders
            .filter(move |folder| folder.file_name().to_string_lossy().starts_with(prefix))
            .map(|folder| folder.path().join("bin"))
    });
    std::env::split_paths(&path).chain(places).collect()
}

/// The major release of the server, if there is one.
fn release(programs: &Programs) -> Option<u32> {
    // `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`
    let output = programs.output("initdb", "--version")?;
    let digits: String = output.split_once(") ")?.1.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}
