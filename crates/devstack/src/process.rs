//! A child process that ends with its parent, however the parent ends.

use std::{
    ffi::OsStr,
    fs::File,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{OnceLock, mpsc},
    time::Duration,
};

use anyhow::{Context, anyhow};
use rustix::process::{Pid, Signal};
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

use crate::{
    log::Log,
    proc::{self, MARK},
    release,
};

/// Another user, by number, for a program that refuses to run as root.
#[derive(Clone, Copy, Debug)]
pub struct User {
    /// Its user id.
    pub uid: u32,
    /// Its group id.
    pub gid: u32,
    /// Whether it must be let through folders that it cannot pass, such as root's home. It then passes
    /// every file permission, as root does.
    pub may_pass: bool,
}

/// A command that is about to become a [`Process`].
#[derive(Debug)]
pub struct Launch {
    name: String,
    command: std::process::Command,
    log: Log,
    orphaned: Signal,
    system: Option<PathBuf>,
}

impl Launch {
    /// `program` in an environment that is empty but for what every process needs and for `mark`. When
    /// its parent dies, it gets the signal `orphaned`; its output goes to the end of `log`.
    pub fn new(
        name: &str,
        program: &Path,
        user: Option<User>,
        orphaned: Signal,
        mark: &str,
        log: Log,
    ) -> Self {
        let mut command = std::process::Command::new("setpriv");
        command.args(["--pdeathsig", if orphaned == Signal::QUIT { "QUIT" } else { "KILL" }]);
        if let Some(User { uid, gid, may_pass }) = user {
            command.args(["--reuid", &uid.to_string(), "--regid", &gid.to_string(), "--clear-groups"]);
            if may_pass {
                command.args(["--inh-caps", "+dac_override", "--ambient-caps", "+dac_override"]);
            }
        }
        command.arg("--").arg(program).env_clear();
        let passed = std::env::vars_os().filter(|(name, _)| {
            let name = name.to_string_lossy();
            matches!(&*name, "PATH" | "LANG" | "HOME" | "LOG" | "LOG_FORMAT" | "RUST_BACKTRACE" | "TMPDIR")
                || name.starts_with("OTEL_")
        });
        // Another user could not stay in the folder that this process was started in.
        command.envs(passed).env(MARK, mark).current_dir("/");
        Self { name: name.to_owned(), command, log, orphaned, system: None }
    }

    /// Takes the program, and all libraries, from another Debian's system, if there is one.
    #[must_use]
    pub fn inside(mut self, system: Option<&Path>) -> Self {
        self.system = system.map(Path::to_owned);
        self
    }

    /// Adds arguments. Secrets belong into [`env`](Self::env): everybody may read a command line.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// Adds a variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Starts it in a process group of its own, so that the terminal's Ctrl-C reaches only its parent,
    /// which ends it in the right order.
    pub async fn spawn(self) -> anyhow::Result<Process> {
        let log = File::options().create(true).append(true).open(self.log.path());
        let log = log.with_context(|| format!("cannot write {}", self.log.path().display()))?;
        let begin = log.metadata()?.len();
        let mut command = match &self.system {
            Some(system) => within(system, &self.command),
            None => self.command,
        };
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let child = spawn_lasting(command).await.map_err(|error| {
            if error.kind() == std::io::ErrorKind::NotFound {
                anyhow!("setpriv is not there; it is part of util-linux 2.33 or later")
            } else {
                anyhow!(error).context(format!("cannot start {}", self.name))
            }
        })?;
        let pid = child.id().and_then(|id| Pid::from_raw(id.try_into().ok()?));
        let pid = pid.with_context(|| format!("{} ended as soon as it began", self.name))?;
        Ok(Process { name: self.name, pid, child, log: self.log, begin, orphaned: self.orphaned })
    }

    /// Runs it to its end, at most a minute. Its last words are the error when it fails.
    pub async fn run(self) -> anyhow::Result<()> {
        let mut process = self.spawn().await?;
        match tokio::time::timeout(Duration::from_mins(1), process.child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(status) => Err(process.failed(status?)),
            Err(_) => Err(anyhow!("{} had not ended after a minute{}", process.name, process.last_words())),
        }
    }
}

/// A running child with its log. Dropping it ends it.
#[derive(Debug)]
pub struct Process {
    name: String,
    pid: Pid,
    child: Child,
    log: Log,
    begin: u64,
    orphaned: Signal,
}

impl Process {
    /// What it is called in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Its exit status, once it has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Fails when it has ended, with its last words.
    pub fn check(&mut self) -> anyhow::Result<()> {
        match self.exited() {
            Some(status) => Err(self.failed(status)),
            None => Ok(()),
        }
    }

    /// Sends `signal` and waits. After `grace`, or at once when `hurry` is cancelled, ends it as its
    /// parent's death would; `false` tells that it came to that.
    pub async fn stop(&mut self, signal: Signal, grace: Duration, hurry: &CancellationToken) -> bool {
        if self.exited().is_some() {
            return true;
        }
        proc::signal(&[self.pid], signal);
        self.resume();
        let ended = hurry.run_until_cancelled(tokio::time::timeout(grace, self.child.wait())).await;
        if matches!(ended, Some(Ok(_))) {
            return true;
        }
        proc::signal(&[self.pid], self.orphaned);
        if tokio::time::timeout(Duration::from_secs(10), self.child.wait()).await.is_err() {
            self.kill().await;
        }
        false
    }

    /// Kills it and everything that it started, as a loss of power would.
    pub async fn kill(&mut self) {
        let mut tree = proc::descendants(self.pid);
        tree.insert(0, self.pid);
        proc::signal(&tree, Signal::KILL);
        let _status = self.child.wait().await;
        while tree.iter().any(|pid| proc::runs(*pid)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Stops it and everything that it started in its tracks, as a stalled machine would.
    pub fn pause(&self) {
        // Twice, for what it started meanwhile.
        for _ in 0..2 {
            proc::signal(&[self.pid], Signal::STOP);
            proc::signal(&proc::descendants(self.pid), Signal::STOP);
        }
    }

    /// Undoes [`pause`](Self::pause).
    pub fn resume(&self) {
        proc::signal(&proc::descendants(self.pid), Signal::CONT);
        proc::signal(&[self.pid], Signal::CONT);
    }

    /// What it wrote last, for a message.
    pub fn last_words(&self) -> String {
        self.log.last_words(self.begin)
    }

    fn failed(&self, status: ExitStatus) -> anyhow::Error {
        anyhow!("{} ended with {status}{}", self.name, self.last_words())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The pid is still its own: only waiting for it sets it free.
        if self.exited().is_none() {
            proc::signal(&[self.pid], self.orphaned);
            self.resume();
        }
    }
}

/// The command inside a system.
fn within(system: &Path, command: &std::process::Command) -> std::process::Command {
    let mut words = release::inside(system).into_iter();
    let mut outer = std::process::Command::new(words.next().unwrap_or_default());
    outer.args(words).arg(command.get_program()).args(command.get_args());
    outer.env_clear().envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    outer.current_dir("/");
    outer
}

/// Spawns from a thread that lives as long as this process: the kernel sends the signal of a parent's
/// death when the *thread* that spawned the child ends.
async fn spawn_lasting(command: std::process::Command) -> std::io::Result<Child> {
    type Job = Box<dyn FnOnce() + Send>;
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, queue) = mpsc::channel::<Job>();
        std::thread::spawn(move || queue.into_iter().for_each(|job| job()));
        jobs
    });
    let (answer, child) = tokio::sync::oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    let job = Box::new(move || {
        let _runtime = runtime.enter();
        let _gone = answer.send(Command::from(command).spawn());
    });
    spawner.send(job).map_err(|_| std::io::Error::other("the thread that spawns has ended"))?;
    child.await.map_err(std::io::Error::other)?
}
