//! Cleaning up after a stack, also when whoever ran it was killed.
//!
//! A [`Guard`] is a small process that waits at a pipe. When the other end of the pipe is gone, it ends
//! every process that still carries the stack's mark and removes the stack's folder if that was
//! temporary. In an orderly stop there is nothing left to end.

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

/// How long processes may take to end by themselves before they are killed.
const GRACE: Duration = Duration::from_secs(10);

/// What it says as soon as it watches.
const ON_GUARD: &str = "on guard\n";

/// The guard of one stack.
#[derive(Debug)]
pub struct Guard {
    mark: String,
    process: Child,
}

impl Guard {
    /// Starts it. It will remove `folder`, if there is one to remove.
    pub fn start(folder: Option<&Path>) -> anyhow::Result<Self> {
        let id = Uuid::new_v4().simple().to_string();
        let mut command = Command::new(binary::beside("devstack")?);
        command.args(["guard", &id]).args(folder).env_remove(MARK).process_group(0);
        let process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut process = process.context("cannot start the process that cleans up")?;
        // Tests find whatever was built last under that name.
        let mut word = String::new();
        BufReader::new(process.stdout.take().context("it has an output")?).read_line(&mut word)?;
        ensure!(
            word == ON_GUARD,
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

impl Drop for Guard {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _status = self.process.wait();
    }
}

/// The guard's own life: waits at its standard input, then cleans up after the stack `id`.
pub fn stand(id: &str, folder: Option<&Path>) -> anyhow::Result<()> {
    print!("{ON_GUARD}");
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
            // Nobody may be left to read this.
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

/// Removes a folder, again while the last helper of a server still writes into it.
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
