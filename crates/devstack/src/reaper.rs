//! Cleans up after a stack, also when the process that ran it was killed.
//!
//! A [`Reaper`] is a small process that waits until a pipe is closed. Then it ends every process that still carries the mark of
//! the stack, and removes the folder of the stack if it is temporary. After an orderly stop no process is left to end.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal};
use uuid::Uuid;

use crate::{
    binary,
    proc::{self, MARK},
};

/// How long processes may take to end after SIGTERM, before they are killed.
const GRACE: Duration = Duration::from_secs(10);

/// The line that it prints as soon as it watches.
const WATCHING: &str = "watching\n";

/// The reaper of one stack.
#[derive(Debug)]
pub struct Reaper {
    mark: String,
    process: Child,
}

impl Reaper {
    /// Starts it. At the end it removes `folder`, if there is one.
    pub fn start(folder: Option<&Path>) -> anyhow::Result<Self> {
        let id = Uuid::new_v4().simple().to_string();
        let mut command = Command::new(binary::beside("devstack")?);
        command.args(["reaper", &id]).args(folder).env_remove(MARK).process_group(0);
        let process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut process = process.context("cannot start the process that cleans up")?;
        // The file may be of another build, which does not know this command.
        let mut word = String::new();
        BufReader::new(process.stdout.take().context("it has an output")?).read_line(&mut word)?;
        ensure!(
            word == WATCHING,
            "{} is of another build; run: cargo build --workspace",
            command.get_program().display()
        );
        let mark = std::env::var(MARK).map_or(id.clone(), |outer| format!("{outer}/{id}"));
        Ok(Self { mark, process })
    }

    /// The value of [`MARK`] for every process of the stack.
    pub fn mark(&self) -> &str {
        &self.mark
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _status = self.process.wait();
    }
}

/// The main function of this process: waits until standard input is closed, then cleans up after the stack `id`.
pub fn run(id: &str, folder: Option<&Path>) -> anyhow::Result<()> {
    print!("{WATCHING}");
    let _end = std::io::stdin().read_to_end(&mut Vec::new());
    let own = Pid::from_raw(std::process::id().try_into()?);
    let left = || proc::marked(id).into_iter().filter(|pid| Some(*pid) != own).collect::<Vec<_>>();
    let begin = Instant::now();
    let mut asked = false;
    loop {
        let left = left();
        if left.is_empty() {
            break;
        }
        ensure!(begin.elapsed() < 3 * GRACE, "processes that cannot be ended: {left:?}");
        if begin.elapsed() > GRACE {
            proc::signal(&left, Signal::KILL);
        } else if !asked && begin.elapsed() > Duration::from_millis(500) {
            // Standard error may be closed.
            let _closed = writeln!(std::io::stderr(), "devstack: ending what is left: {}", left.len());
            proc::signal(&left, Signal::TERM);
            asked = true;
        }
        sleep(Duration::from_millis(50));
    }
    match folder {
        Some(folder) => remove(folder).with_context(|| format!("cannot remove {}", folder.display())),
        None => Ok(()),
    }
}

/// Removes a folder, and retries while the last process of a server still writes into it.
fn remove(folder: &Path) -> std::io::Result<()> {
    let begin = Instant::now();
    loop {
        match std::fs::remove_dir_all(folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(_) if begin.elapsed() < GRACE => sleep(Duration::from_millis(50)),
            done => return done,
        }
    }
}
