//! Keeps the programs running, as a service manager does, and records how they are.

use std::{
    collections::BTreeMap,
    fs,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use futures_util::future::join_all;
use tokio_util::sync::CancellationToken;

use super::fault::Instance;
use devstack::program::{Program, client, not_ready};

/// How often each program is asked whether it is ready.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// All programs, each under supervision.
#[derive(Debug)]
pub(crate) struct Supervisor {
    instances: BTreeMap<Instance, Supervised>,
}

#[derive(Debug)]
struct Supervised {
    program: tokio::sync::Mutex<Program>,
    url: String,
    health: Mutex<Health>,
}

/// What was observed of a program.
#[derive(Clone, Debug, Default)]
pub(crate) struct Health {
    active_faults: usize,
    /// The end of its last fault, until it was ready again.
    recovering_since: Option<Instant>,
    /// From the end of each fault until it was ready again.
    pub(crate) recoveries: Vec<Duration>,
    /// Exit status and end of the log, each time that it ended by itself.
    pub(crate) unexpected_ends: Vec<String>,
    /// Peak resident memory of any of its processes, in KiB.
    pub(crate) peak_memory: u64,
    /// Why it was not ready at the last poll.
    pub(crate) not_ready: Option<String>,
}

impl Supervisor {
    pub(crate) fn new(programs: BTreeMap<Instance, Program>) -> Self {
        let supervised = |program: Program| Supervised {
            url: program.url(),
            program: tokio::sync::Mutex::new(program),
            health: Mutex::default(),
        };
        let programs = programs.into_iter();
        Self { instances: programs.map(|(instance, program)| (instance, supervised(program))).collect() }
    }

    /// Starts all of them.
    pub(crate) async fn start(&self) -> anyhow::Result<()> {
        for supervised in self.instances.values() {
            supervised.program.lock().await.start().await?;
        }
        Ok(())
    }

    /// Waits until all of them are ready at the same time; an error names those that are not.
    pub(crate) async fn ready(&self, timeout: Duration) -> anyhow::Result<()> {
        let client = client()?;
        let end = Instant::now() + timeout;
        loop {
            let asked = self.instances.iter().map(async |(instance, supervised)| {
                Some(format!("{}: {}", instance.name(), not_ready(&client, &supervised.url).await?))
            });
            let waiting: Vec<String> = join_all(asked).await.into_iter().flatten().collect();
            if waiting.is_empty() {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("not ready after {} s: {}", timeout.as_secs(), waiting.join("; "));
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Watches all of them until `stop`, and starts again what has ended.
    pub(crate) async fn watch(&self, stop: &CancellationToken) -> anyhow::Result<()> {
        let client = client()?;
        let watching = self.instances.values().map(async |supervised| {
            while stop.run_until_cancelled(tokio::time::sleep(POLL_INTERVAL)).await.is_some() {
                supervised.poll(&client).await?;
            }
            anyhow::Ok(())
        });
        join_all(watching).await.into_iter().collect()
    }

    /// Kills it with SIGKILL, and starts it again after `pause`.
    pub(crate) async fn kill(&self, instance: Instance, pause: Duration) -> anyhow::Result<()> {
        let mut program = self.supervised(instance)?.program.lock().await;
        self.fault_begins(&[instance]);
        program.kill().await;
        tokio::time::sleep(pause).await;
        program.start().await?;
        self.fault_ends(&[instance]);
        Ok(())
    }

    /// Sends SIGSTOP, and SIGCONT after `pause`.
    pub(crate) async fn suspend(&self, instance: Instance, pause: Duration) -> anyhow::Result<()> {
        let program = self.supervised(instance)?.program.lock().await;
        self.fault_begins(&[instance]);
        program.pause();
        tokio::time::sleep(pause).await;
        program.resume();
        self.fault_ends(&[instance]);
        Ok(())
    }

    /// A fault of these begins.
    pub(crate) fn fault_begins(&self, instances: &[Instance]) {
        self.record(instances, |health| health.active_faults += 1);
    }

    /// A fault of these ends.
    pub(crate) fn fault_ends(&self, instances: &[Instance]) {
        self.record(instances, |health| {
            health.active_faults = health.active_faults.saturating_sub(1);
            health.recovering_since = Some(Instant::now());
        });
    }

    /// The health of each.
    pub(crate) fn health(&self) -> BTreeMap<Instance, Health> {
        let health =
            |(instance, supervised): (&Instance, &Supervised)| (*instance, supervised.health().clone());
        self.instances.iter().map(health).collect()
    }

    /// Ends all of them.
    pub(crate) async fn stop(&self, hurry: &CancellationToken) {
        let stopping = self.instances.values().map(async |one| one.program.lock().await.stop(hurry).await);
        join_all(stopping).await;
    }

    fn record(&self, instances: &[Instance], change: impl Fn(&mut Health)) {
        let supervised = instances.iter().filter_map(|instance| self.instances.get(instance));
        supervised.for_each(|supervised| change(&mut supervised.health()));
    }

    fn supervised(&self, instance: Instance) -> anyhow::Result<&Supervised> {
        self.instances.get(&instance).with_context(|| format!("there is no {}", instance.name()))
    }
}

impl Supervised {
    fn health(&self) -> std::sync::MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn poll(&self, client: &reqwest::Client) -> anyhow::Result<()> {
        // A fault of this program holds the lock while it lasts.
        if let Ok(mut program) = self.program.try_lock() {
            if let Some(error) = program.ended() {
                self.health().unexpected_ends.push(error);
                program.start().await?;
            }
            let memory = program.process().and_then(|process| peak(process.pid())).unwrap_or_default();
            let mut health = self.health();
            health.peak_memory = health.peak_memory.max(memory);
        }
        let asked = Instant::now();
        let not_ready = not_ready(client, &self.url).await;
        let mut health = self.health();
        if not_ready.is_none() && health.active_faults == 0 {
            // A response to a request from before the end of the fault says nothing about the time after it.
            if let Some(since) = health.recovering_since.take_if(|since| *since <= asked) {
                health.recoveries.push(since.elapsed());
            }
        }
        health.not_ready = not_ready;
        Ok(())
    }
}

/// Peak resident memory of a process, in KiB.
fn peak(pid: rustix::process::Pid) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.trim().parse().ok())
}
