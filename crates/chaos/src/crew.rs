//! The programs: each is kept running, as a service manager does, and watched.

use std::{
    collections::BTreeMap,
    fs,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use futures_util::future::join_all;
use tokio_util::sync::CancellationToken;

use super::fault::Member;
use devstack::program::{Program, client, not_ready};

/// How often each is asked whether it is ready.
const LOOK: Duration = Duration::from_millis(100);

/// All programs.
#[derive(Debug)]
pub(crate) struct Crew {
    posts: BTreeMap<Member, Post>,
}

#[derive(Debug)]
struct Post {
    program: tokio::sync::Mutex<Program>,
    url: String,
    log: Mutex<Log>,
}

/// What was seen of a program.
#[derive(Clone, Debug, Default)]
pub(crate) struct Log {
    /// Faults that it has at the moment.
    faults: usize,
    /// The end of its last fault, until it was seen to be ready after that.
    calm: Option<Instant>,
    /// How long it took, each time, to be ready again.
    pub(crate) recoveries: Vec<Duration>,
    /// Its last words, each time that it ended by itself.
    pub(crate) ends: Vec<String>,
    /// The most memory that it had at any time, in KiB.
    pub(crate) memory: u64,
    /// Why it was not ready when it was asked last.
    pub(crate) waits_for: Option<String>,
}

impl Crew {
    pub(crate) fn new(programs: BTreeMap<Member, Program>) -> Self {
        let post = |program: Program| Post {
            url: program.url(),
            program: tokio::sync::Mutex::new(program),
            log: Mutex::default(),
        };
        Self { posts: programs.into_iter().map(|(member, program)| (member, post(program))).collect() }
    }

    /// Starts all of them.
    pub(crate) async fn start(&self) -> anyhow::Result<()> {
        for post in self.posts.values() {
            post.program.lock().await.start().await?;
        }
        Ok(())
    }

    /// Waits until all of them are ready at the same time; an error names those that are not.
    pub(crate) async fn ready(&self, patience: Duration) -> anyhow::Result<()> {
        let client = client()?;
        let end = Instant::now() + patience;
        loop {
            let asked = self.posts.iter().map(async |(member, post)| {
                Some(format!("{}: {}", member.name(), not_ready(&client, &post.url).await?))
            });
            let waiting: Vec<String> = join_all(asked).await.into_iter().flatten().collect();
            if waiting.is_empty() {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("not ready after {} s: {}", patience.as_secs(), waiting.join("; "));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Watches all of them until `stop`, and starts again what has ended.
    pub(crate) async fn watch(&self, stop: &CancellationToken) -> anyhow::Result<()> {
        let client = client()?;
        let watching = self.posts.values().map(async |post| {
            while stop.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_some() {
                post.look(&client).await?;
            }
            anyhow::Ok(())
        });
        join_all(watching).await.into_iter().collect()
    }

    /// SIGKILL, and after `pause` a successor.
    pub(crate) async fn kill(&self, member: Member, pause: Duration) -> anyhow::Result<()> {
        let mut program = self.post(member)?.program.lock().await;
        self.disturb(&[member]);
        program.kill().await;
        tokio::time::sleep(pause).await;
        program.start().await?;
        self.calm(&[member]);
        Ok(())
    }

    /// SIGSTOP, and after `pause` SIGCONT.
    pub(crate) async fn stop_and_go_on(&self, member: Member, pause: Duration) -> anyhow::Result<()> {
        let program = self.post(member)?.program.lock().await;
        self.disturb(&[member]);
        program.pause();
        tokio::time::sleep(pause).await;
        program.resume();
        self.calm(&[member]);
        Ok(())
    }

    /// These have a fault from now on.
    pub(crate) fn disturb(&self, members: &[Member]) {
        self.logs(members, |log| log.faults += 1);
    }

    /// A fault of these is over.
    pub(crate) fn calm(&self, members: &[Member]) {
        self.logs(members, |log| {
            log.faults = log.faults.saturating_sub(1);
            log.calm = Some(Instant::now());
        });
    }

    /// What was seen of each.
    pub(crate) fn seen(&self) -> BTreeMap<Member, Log> {
        self.posts.iter().map(|(member, post)| (*member, post.log().clone())).collect()
    }

    /// Ends all of them.
    pub(crate) async fn stop(&self, hurry: &CancellationToken) {
        join_all(self.posts.values().map(async |post| post.program.lock().await.stop(hurry).await)).await;
    }

    fn logs(&self, members: &[Member], change: impl Fn(&mut Log)) {
        members.iter().filter_map(|member| self.posts.get(member)).for_each(|post| change(&mut post.log()));
    }

    fn post(&self, member: Member) -> anyhow::Result<&Post> {
        self.posts.get(&member).with_context(|| format!("there is no {}", member.name()))
    }
}

impl Post {
    fn log(&self) -> std::sync::MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn look(&self, client: &reqwest::Client) -> anyhow::Result<()> {
        // Whoever has it is at a fault of it.
        if let Ok(mut program) = self.program.try_lock() {
            if let Some(words) = program.ended() {
                self.log().ends.push(words);
                program.start().await?;
            }
            let memory = program.process().and_then(|process| peak(process.pid())).unwrap_or_default();
            let mut log = self.log();
            log.memory = log.memory.max(memory);
        }
        let asked = Instant::now();
        let waits_for = not_ready(client, &self.url).await;
        let mut log = self.log();
        if waits_for.is_none() && log.faults == 0 {
            // An answer from before the fault's end says nothing.
            if let Some(calm) = log.calm.take_if(|calm| *calm <= asked) {
                log.recoveries.push(calm.elapsed());
            }
        }
        log.waits_for = waits_for;
        Ok(())
    }
}

/// The most memory that a process has had, in KiB.
fn peak(pid: rustix::process::Pid) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.trim().parse().ok())
}
