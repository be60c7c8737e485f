//! The relay's life: stand by, take leadership, and again when it is lost.

use std::{sync::Arc, time::Duration};

use amqp::Backoff;
use daemon::{
    config::database::Database,
    health::{Health, Part},
};
use lapin::types::ShortString;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::{
    broker::Broker,
    lead::Lead,
    leader::{Begin, Candidate, LeaderError},
    lease::{self, Lease},
    rules::Policies,
};

/// How often a relay that does not lead asks whether it may.
const STANDBY: Duration = Duration::from_millis(500);

/// How much a relay has in memory, and sets aside.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Parallel connections to the broker.
    pub lanes: usize,
    /// Events in memory at most.
    pub events: usize,
    /// Bytes in memory at most, but for one event that is larger by itself.
    pub bytes: usize,
    /// Events set aside at most; beyond it they wait, and later events of their aggregates behind them.
    pub parked: i64,
    /// Events of each kind that wait at most.
    pub waiting: i64,
}

/// What a relay relays, from where to where.
#[derive(Debug)]
pub struct Relay {
    /// The database.
    pub database: Database,
    /// The relay name: each has its own progress.
    pub name: String,
    /// Where a new name begins.
    pub begin: Begin,
    /// Who this process is, for the leader's row.
    pub identity: String,
    /// How long a leader that says nothing stays the leader.
    pub lease: Duration,
    /// The broker.
    pub broker: Broker,
    /// What to do with what is not taken.
    pub policies: Policies,
    /// How much at a time.
    pub limits: Limits,
    /// Told when there may be something to read.
    pub wake: Arc<Notify>,
    /// Renewed whenever it goes round, whatever it waits for.
    pub pulse: Lease,
    /// Cancelled once a connection was found to be a session of its own, on a database as it should be.
    pub connected: CancellationToken,
    /// What is shown at `/ready`, and stored with each heartbeat.
    pub health: Health,
    /// The database and leadership.
    pub database_health: Part,
    /// The broker.
    pub broker_health: Part,
    /// Events that are not taken.
    pub events_health: Part,
    /// An operator's pause.
    pub paused_health: Part,
    /// How long what is under way may go on once the process is to end.
    pub grace: Duration,
}

impl Relay {
    /// Relays until `stop`. Waits out whatever time can heal, and says in the health what it waits for.
    pub async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut pause = Backoff::default();
        while !stop.is_cancelled() {
            self.pulse.renew(lease::now());
            let ended = tokio::select! {
                ended = self.lead(&mut pause, &stop) => ended,
                // Work is not cut in half, unless a server that does not answer would keep the process.
                () = async { stop.cancelled().await; tokio::time::sleep(self.grace).await } => {
                    tracing::warn!("not everything was answered in time; the next start publishes it again");
                    return Ok(());
                }
            };
            match ended {
                Ok(()) => break,
                Err(error) if error.is_fatal() => return Err(error.into()),
                Err(error) => {
                    self.database_health.waiting(error.to_string());
                    pause.wait(&stop).await;
                }
            }
        }
        Ok(())
    }

    /// One leadership, from standing by for it to losing it, which is an error, or to the process's end.
    /// Whatever was in memory is forgotten then.
    async fn lead(&self, pause: &mut Backoff, stop: &CancellationToken) -> Result<(), LeaderError> {
        let connect = Candidate::connect(&self.database, &self.name, self.begin, &self.identity, self.lease);
        let Some(candidate) = stop.run_until_cancelled(connect).await else { return Ok(()) };
        let mut candidate = candidate?;
        self.connected.cancel();
        self.health.is_known_as("source", &candidate.source);
        while !candidate.ask().await? {
            self.pulse.renew(lease::now());
            // Healthy: somebody publishes, and this one stands by.
            for part in [&self.database_health, &self.broker_health, &self.events_health, &self.paused_health]
            {
                part.ready();
            }
            pause.reset();
            let again = STANDBY.min(self.lease / 4);
            if stop.run_until_cancelled(tokio::time::sleep(again)).await.is_none() {
                candidate.close().await;
                return Ok(());
            }
        }
        let leader = candidate.lead().await?;
        self.database_health.ready();
        self.events_health.ready();
        pause.reset();
        let mut lead = Lead::new(self, leader, stop);
        lead.work().await?;
        lead.end().await
    }
}

/// The exchange's name, from the setting.
pub fn exchange(name: &str) -> Result<ShortString, String> {
    match ShortString::try_new(name) {
        Ok(name) if !name.as_str().is_empty() => Ok(name),
        _ => Err("an exchange's name has 1 to 255 bytes".to_owned()),
    }
}
