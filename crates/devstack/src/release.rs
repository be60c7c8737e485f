//! Which servers a stack uses: this machine's, or those of the releases that two settings name.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail, ensure};

/// Names PostgreSQL's release.
pub const POSTGRES: &str = "DEVSTACK_POSTGRES";
/// Names RabbitMQ's release.
pub const RABBITMQ: &str = "DEVSTACK_RABBITMQ";

/// Lines of a server, its release, and the Debian that has it. `crates/devstack/servers` fetches them.
const RELEASES: &str = include_str!("../releases");

/// The folder with a server's programs.
#[derive(Clone, Debug)]
pub struct Programs {
    folder: PathBuf,
    system: Option<PathBuf>,
}

impl Programs {
    /// Of this machine.
    pub(crate) fn here(folder: PathBuf) -> Self {
        Self { folder, system: None }
    }

    /// PostgreSQL's of the release that the setting names; `None` without it.
    pub(crate) fn postgres() -> anyhow::Result<Option<Self>> {
        Self::named(POSTGRES, "PG_BIN", "postgres")
    }

    /// RabbitMQ's of the release that the setting names; `None` without it.
    pub(crate) fn rabbitmq() -> anyhow::Result<Option<Self>> {
        Self::named(RABBITMQ, "RABBITMQ_BIN", "rabbitmq")
    }

    fn named(setting: &str, folder: &str, server: &str) -> anyhow::Result<Option<Self>> {
        let Some(release) = std::env::var_os(setting).filter(|release| !release.is_empty()) else {
            return Ok(None);
        };
        ensure!(
            std::env::var_os(folder).is_none_or(|folder| folder.is_empty()),
            "{setting} and {folder} both name a server; unset one of them"
        );
        Self::of(server, &release.to_string_lossy()).map(Some)
    }

    /// Of the server `postgres` or `rabbitmq`, of a release that `crates/devstack/servers` has fetched.
    pub fn of(server: &str, release: &str) -> anyhow::Result<Self> {
        let setting = if server == "postgres" { POSTGRES } else { RABBITMQ };
        let rows = RELEASES.lines().filter(|row| !row.starts_with('#')).filter_map(|row| {
            let mut words = row.split(' ').filter(|word| !word.is_empty());
            Some((words.next()?, words.next()?, words.next()?)).filter(|row| row.0 == server)
        });
        let rows: Vec<_> = rows.collect();
        let Some((_, _, debian)) = rows.iter().find(|row| row.1 == release) else {
            let known: Vec<_> = rows.iter().map(|row| row.1).collect();
            let newest = known.last().context("the table of releases is empty")?;
            bail!(
                "{setting} is {release:?}, which is none of: {}. Set for example {setting}={newest}",
                known.join(", ")
            )
        };
        let servers = servers()?;
        let programs = match (server, *debian) {
            (_, "packages") => Self::here(servers.join(format!("{server}ql-{release}/bin"))),
            ("postgres", debian) => Self {
                folder: format!("/usr/lib/postgresql/{release}/bin").into(),
                system: Some(servers.join(debian)),
            },
            (_, debian) => {
                Self { folder: "/usr/lib/rabbitmq/bin".into(), system: Some(servers.join(debian)) }
            }
        };
        let sample = programs.on_disk(if server == "postgres" { "postgres" } else { "rabbitmq-server" });
        ensure!(
            sample.symlink_metadata().is_ok(),
            "{} is not there; run: {setting}={release} crates/devstack/install",
            sample.display()
        );
        Ok(programs)
    }

    /// The file of the program `name`, as a process sees it that runs [`inside`](Self::system) its system.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The folder, as such a process sees it.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The Debian system that the programs are of, if it is not this machine's.
    pub fn system(&self) -> Option<&Path> {
        self.system.as_deref()
    }

    /// What a program prints, if it is there.
    pub(crate) fn output(&self, name: &str, argument: &str) -> Option<String> {
        if !self.on_disk(name).is_file() {
            return None;
        }
        let output = self.command(name).arg(argument).output().ok()?;
        String::from_utf8(output.stdout).ok()
    }

    fn command(&self, name: &str) -> Command {
        let words = self.system.as_deref().map(inside).unwrap_or_default();
        let mut words = words.into_iter().chain([self.file(name).into()]);
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words);
        command
    }

    /// The program `PgBouncer` of the same system, as a process inside sees it; this machine's where the server is.
    pub(crate) fn pooler(&self) -> anyhow::Result<PathBuf> {
        // Debian keeps it where only root looks by itself.
        let usual = PathBuf::from("/usr/sbin/pgbouncer");
        if self.system.is_some() {
            return Ok(usual);
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut files = std::env::split_paths(&path).map(|folder| folder.join("pgbouncer")).chain([usual]);
        files.find(|file| file.is_file()).context("PgBouncer is not there; run crates/devstack/install tests")
    }

    /// The same as this process sees it.
    fn on_disk(&self, name: &str) -> PathBuf {
        let file = self.file(name);
        match &self.system {
            Some(system) => system.join(file.strip_prefix("/").unwrap_or(&file)),
            None => file,
        }
    }
}

/// A client program of PostgreSQL: of the release that the setting names, or this machine's. `pg_dump` refuses servers
/// that are newer than itself.
pub fn client(name: &str) -> anyhow::Result<Command> {
    Ok(match Programs::postgres()? {
        Some(programs) => programs.command(name),
        None => Command::new(name),
    })
}

/// Where `crates/devstack/servers` puts what it fetches: beside Cargo's build output.
fn servers() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find the running program")?;
    let folder = own.parent().unwrap_or(Path::new("."));
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    Ok(folder.parent().unwrap_or(folder).join("servers"))
}

/// What runs a command with a system's `/usr` in the place of this machine's, for this command and what it starts:
/// `/bin` and `/lib` are links into it, and everything else is shared. It stays the same process.
pub(crate) fn inside(system: &Path) -> Vec<OsString> {
    let root = rustix::process::geteuid().is_root();
    // Who is not root may mount in a namespace of users of its own, and gives up what else it may do there.
    let [user, drop]: [&[&str]; 2] = if root {
        [&[], &[]]
    } else {
        [
            &["--user", "--map-current-user", "--keep-caps"],
            &["setpriv", "--inh-caps=-all", "--ambient-caps=-all", "--"],
        ]
    };
    let mount = "mount --bind \"$0/usr\" /usr && exec \"$@\"";
    let words = [&["unshare", "--mount"], user, &["--", "sh", "-c", mount]].concat();
    let drop = drop.iter().map(OsString::from);
    words.into_iter().map(OsString::from).chain([system.into()]).chain(drop).collect()
}
