//! The examples as processes.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::Arc,
};

use devstack::{
    binary,
    testing::{DEADLINE, until},
};
use tokio::{
    process::{Child, Command},
    time::timeout,
};

use crate::packages::{self, source};

/// What the runs of a program have said. The file is removed with the last of them.
struct Log(PathBuf);

impl Drop for Log {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A program with its settings, which may be started any number of times.
pub(crate) struct Program {
    file: PathBuf,
    args: Vec<String>,
    env: Vec<(String, String)>,
    log: Arc<Log>,
}

impl Program {
    fn new(file: impl Into<PathBuf>, args: &[&str]) -> Self {
        let log = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}.log", uuid::Uuid::new_v4()));
        Self {
            file: file.into(),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            env: Vec::new(),
            log: Arc::new(Log(log)),
        }
    }

    /// One of the project's own.
    pub(crate) fn own(name: &str, args: &[&str]) -> Self {
        Self::new(binary::find(name).unwrap(), args)
    }

    /// An example of a crate. `cargo test` builds it, unless it is told to build one test alone.
    pub(crate) fn rust(name: &str, args: &[&str]) -> Self {
        let test = std::env::current_exe().unwrap();
        let path = test.parent().unwrap().with_file_name("examples").join(name);
        assert!(path.exists(), "{} is not there; run: cargo build --workspace --examples", path.display());
        Self::new(path, args)
    }

    /// Python with these arguments, in the folder of the examples.
    pub(crate) async fn python(args: &[&str]) -> Self {
        let home = packages::python().await;
        let path = home.to_str().unwrap();
        Self::new(home.join("venv/bin/python"), args)
            .env("PYTHONPATH", path)
            .env("PYTHONDONTWRITEBYTECODE", "1")
    }

    /// One of the examples in Python.
    pub(crate) async fn python_file(name: &str) -> Self {
        Self::python(&[packages::python().await.join(name).to_str().unwrap()]).await
    }

    /// Node.js with these arguments, which find the examples as `examples/…`.
    pub(crate) async fn node(args: &[&str]) -> Self {
        let home = packages::node().await;
        Self::new("node", args).env("EXAMPLES", home.to_str().unwrap())
    }

    /// One of the examples in JavaScript.
    pub(crate) async fn node_file(name: &str) -> Self {
        Self::node(&[packages::node().await.join(name).to_str().unwrap()]).await
    }

    /// psql with files of the examples.
    pub(crate) fn psql(url: &str, files: &[&str]) -> Self {
        let mut psql = Self::new("psql", &["-v", "ON_ERROR_STOP=1", "-qX"]);
        for file in files {
            psql.args.extend(["-f".to_owned(), source(file).to_str().unwrap().to_owned()]);
        }
        psql.connecting(url)
    }

    /// psql with a statement.
    pub(crate) fn sql(url: &str, sql: &str) -> Self {
        Self::new("psql", &["-v", "ON_ERROR_STOP=1", "-qXAt", "-c", sql]).connecting(url)
    }

    /// The variables of libpq: an address among the arguments would show its password to all users.
    fn connecting(self, url: &str) -> Self {
        let url = reqwest::Url::parse(url).unwrap();
        self.env("PGUSER", url.username())
            .env("PGPASSWORD", url.password().unwrap_or_default())
            .env("PGHOST", url.host_str().unwrap())
            .env("PGPORT", &url.port().unwrap().to_string())
            .env("PGDATABASE", url.path().trim_start_matches('/'))
            .env("PGOPTIONS", "-c client_min_messages=warning")
    }

    #[must_use]
    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    #[must_use]
    pub(crate) fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|&arg| arg.to_owned()));
        self
    }

    /// Its variables.
    pub(crate) fn variables(&self) -> &[(String, String)] {
        &self.env
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.file);
        command
            .env_clear()
            .env("PATH", std::env::var("PATH").unwrap())
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command.args(&self.args).envs(self.env.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs it to its end, which is a good one, and returns what it says.
    pub(crate) async fn run(&self) -> String {
        let output = timeout(DEADLINE, self.command().output()).await.expect("the program ends").unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let file = self.file.display();
        assert!(output.status.success(), "{file}: {said}{}", String::from_utf8_lossy(&output.stderr));
        said
    }

    pub(crate) fn start(&self) -> Running {
        let log = File::options().create(true).append(true).open(&self.log.0).unwrap();
        let child = self.command().stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        Running { child, log: self.log.clone() }
    }
}

/// A running program, killed when it is dropped.
pub(crate) struct Running {
    child: Child,
    log: Arc<Log>,
}

impl Running {
    /// What it has said, in this and in earlier runs.
    pub(crate) fn said(&self) -> String {
        fs::read_to_string(&self.log.0).unwrap()
    }

    /// Asks it to end, as a service manager does.
    pub(crate) async fn stop(mut self) {
        let id = self.child.id().expect("it runs").to_string();
        assert!(Command::new("kill").arg(id).status().await.unwrap().success());
        assert!(self.ended().await.success(), "{}", self.said());
    }

    /// Waits for its end.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        timeout(DEADLINE, self.child.wait()).await.expect("the program ends").unwrap()
    }

    /// SIGKILL.
    pub(crate) async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }

    /// Waits until it says these words this many times.
    pub(crate) async fn says(&self, words: &str, times: usize) {
        until(&format!("{words} {times} times"), async || self.said().matches(words).count() >= times).await;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.said());
        }
    }
}
