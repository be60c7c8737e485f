//! One command of an operation: waits for its end, or interrupts it, and watches its output and its memory.

use std::time::Duration;

use anyhow::Context;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, BufReader},
    process::Child,
    sync::mpsc,
    time::Instant,
};

use super::run::End;
use crate::memory::peak_of;

/// How long an interrupted command may take to say how far it was.
const FAREWELL: Duration = Duration::from_secs(10);
/// How often a process's memory is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// How many lines of an operation's output an error shows.
const SHOWN: usize = 5;

/// How it has ended, and what was seen.
pub(super) struct Ended {
    pub(super) end: End,
    pub(super) memory: Option<f64>,
    pub(super) silent: f64,
}

/// Waits for a command's end, or interrupts it.
pub(super) async fn watched(child: &mut Child, limit: Duration) -> anyhow::Result<Ended> {
    let (sender, mut lines) = mpsc::channel(64);
    let pid = child.id().context("it has ended")?;
    let output = child.stdout.take().context("a pipe")?;
    let errors = child.stderr.take().context("a pipe")?;
    tokio::spawn(pass(output, sender.clone()));
    tokio::spawn(pass(errors, sender));
    let begin = Instant::now();
    let (mut last, mut silent, mut memory) = (begin, 0.0_f64, None);
    let mut shown: Vec<String> = Vec::new();
    let mut interrupted = None;
    let mut looks = tokio::time::interval(LOOK);
    let mut open = true;
    let status = loop {
        tokio::select! {
            line = lines.recv(), if open => match line {
                Some(line) => {
                    silent = silent.max(last.elapsed().as_secs_f64());
                    last = Instant::now();
                    shown.push(line);
                    if shown.len() > SHOWN {
                        shown.remove(0);
                    }
                }
                None => open = false,
            },
            status = child.wait() => break status?,
            _ = looks.tick() => {
                memory = peak_of(pid).or(memory);
                match interrupted {
                    None if begin.elapsed() > limit => {
                        interrupted = Some(Instant::now());
                        let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
                        devstack::proc::signal(pid.as_slice(), rustix::process::Signal::INT);
                    }
                    Some(since) if since.elapsed() > FAREWELL => child.start_kill()?,
                    _ => {}
                }
            }
        }
    };
    silent = silent.max(last.elapsed().as_secs_f64());
    let end = match (interrupted, status.code()) {
        (Some(_), _) => End::Limit,
        // 3: done, and the result needs attention.
        (None, Some(code @ (0 | 3))) => End::Done(u16::try_from(code)?),
        (None, code) => {
            while let Some(line) = lines.recv().await {
                shown.push(line);
            }
            let last = shown.split_off(shown.len().saturating_sub(SHOWN));
            End::Failed(format!("exit code {code:?}: {}", last.join(" / ")))
        }
    };
    Ok(Ended { end, memory, silent })
}

async fn pass(output: impl AsyncRead + Unpin, to: mpsc::Sender<String>) {
    let mut lines = BufReader::new(output).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if to.send(line).await.is_err() {
            break;
        }
    }
}
