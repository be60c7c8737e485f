//! One of the project's programs as a child process.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::bail;
use rustix::process::Signal;
use tokio_util::sync::CancellationToken;

use crate::{
    binary::find,
    folder::Folder,
    log::Log,
    process::{Launch, Process},
};

/// A program that serves `/ready`.
#[derive(Debug)]
pub struct Program {
    name: String,
    file: PathBuf,
    args: Vec<String>,
    env: Vec<(String, String)>,
    port: u16,
    mark: String,
    log: Log,
    process: Option<Process>,
}

impl Program {
    /// The program `file`, called `name`, which will listen at `port` of 127.0.0.1.
    pub fn new(folder: &Folder, name: &str, file: &str, port: u16) -> anyhow::Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            file: find(file)?,
            args: vec!["run".to_owned()],
            env: vec![("LISTEN".to_owned(), format!("127.0.0.1:{port}"))],
            port,
            mark: folder.mark().to_owned(),
            log: folder.log(name)?,
            process: None,
        })
    }

    /// Takes the program of the same name from another folder.
    #[must_use]
    pub fn from(mut self, folder: &Path) -> Self {
        if let Some(name) = self.file.file_name() {
            self.file = folder.join(name);
        }
        self
    }

    /// Adds arguments behind `run`.
    #[must_use]
    pub fn args<const N: usize>(mut self, args: [&str; N]) -> Self {
        self.args.extend(args.map(str::to_owned));
        self
    }

    /// Sets a variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Sets a variable for the next start.
    pub fn set_env(&mut self, name: &str, value: &str) {
        self.env.push((name.to_owned(), value.to_owned()));
    }

    /// A variable of its environment, as it was set last.
    pub fn variable(&self, name: &str) -> Option<&str> {
        self.env.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it listens.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Its process, while there is one.
    pub fn process(&mut self) -> Option<&mut Process> {
        self.process.as_mut()
    }

    /// Starts it. [`ready`](Self::ready) waits for it.
    pub async fn start(&mut self) -> anyhow::Result<()> {
        if self.process.is_some() {
            bail!("{} runs already", self.name);
        }
        let launch = Launch::new(&self.name, &self.file, None, Signal::KILL, &self.mark, self.log.clone());
        let launch =
            self.env.iter().fold(launch.args(&self.args), |launch, (name, value)| launch.env(name, value));
        self.process = Some(launch.spawn().await?);
        Ok(())
    }

    /// Runs its command `args` (`migrate …`) to the end, with the variables given.
    pub async fn command(&self, args: &[&str], env: &[(&str, &str)]) -> anyhow::Result<()> {
        let name = format!("{} {}", self.name, args.first().unwrap_or(&""));
        let launch = Launch::new(&name, &self.file, None, Signal::KILL, &self.mark, self.log.clone());
        env.iter().fold(launch.args(args), |launch, (name, value)| launch.env(name, value)).run().await
    }

    /// Waits until it says that it is ready. Fails at the deadline with the reason it gives, or when it
    /// ends before.
    pub async fn ready(&mut self, deadline: Duration) -> anyhow::Result<()> {
        let end = tokio::time::Instant::now() + deadline;
        loop {
            match &mut self.process {
                Some(process) => process.check()?,
                None => bail!("{} was not started", self.name),
            }
            let Some(reason) = self.not_ready().await else { return Ok(()) };
            if tokio::time::Instant::now() > end {
                bail!("{} is not ready after {deadline:?}: {reason}", self.name);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Why it is not ready; `None` when it is.
    pub async fn not_ready(&self) -> Option<String> {
        match client() {
            Ok(client) => not_ready(&client, &self.url()).await,
            Err(error) => Some(error.to_string()),
        }
    }

    /// Its last words when it has ended by itself. It may be started again then.
    pub fn ended(&mut self) -> Option<String> {
        let ended = self.process.as_mut()?.check().err()?;
        self.process = None;
        Some(ended.to_string())
    }

    /// Asks it to end and lets it drain. After 15 s, or at once when `hurry` is cancelled, kills it;
    /// `false` tells that it was killed.
    pub async fn stop(&mut self, hurry: &CancellationToken) -> bool {
        match self.process.take() {
            Some(mut process) => process.stop(Signal::TERM, Duration::from_secs(15), hurry).await,
            None => true,
        }
    }

    /// Kills it with SIGKILL.
    pub async fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().await;
        }
    }

    /// Stops it in its tracks with SIGSTOP.
    pub fn pause(&self) {
        self.process.iter().for_each(Process::pause);
    }

    /// Undoes [`pause`](Self::pause).
    pub fn resume(&self) {
        self.process.iter().for_each(Process::resume);
    }
}

/// Why the program at `url` is not ready; `None` when it is.
pub async fn not_ready(client: &reqwest::Client, url: &str) -> Option<String> {
    let ask = async {
        let answer = client.get(format!("{url}/ready")).send().await?;
        let ready = answer.status().is_success();
        anyhow::Ok((!ready).then_some(answer.text().await?))
    };
    match ask.await {
        Ok(reason) => reason.map(|reason| reasons(&reason).unwrap_or(reason)),
        Err(_) => Some("it does not answer".to_owned()),
    }
}

/// The reasons in a `/ready` answer, as a person writes them.
fn reasons(answer: &str) -> Option<String> {
    let answer: serde_json::Value = serde_json::from_str(answer).ok()?;
    let reasons = answer["waiting"].as_array()?.iter().map(|part| {
        let text = |key: &str| part[key].as_str().unwrap_or("?").to_owned();
        format!("{}: {}", text("part"), text("reason"))
    });
    Some(reasons.collect::<Vec<_>>().join("; "))
}

/// A client for what listens on this machine: short timeouts, and no proxy in between.
pub fn client() -> anyhow::Result<reqwest::Client> {
    Ok(reqwest::Client::builder().timeout(Duration::from_secs(3)).no_proxy().build()?)
}
