//! What a relay is given: from where it reads, to where it publishes, and where it says how it is.

use std::{
    sync::{Arc, OnceLock, atomic::AtomicBool},
    time::Duration,
};

use daemon::{
    config::database::Database,
    health::{Health, Part},
};
use lapin::types::ShortString;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::{broker::Broker, lease::Lease, rules::Policies, series::Series, session::Begin};

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
    /// Whether messages have the attributes of CloudEvents as well.
    pub cloudevents: bool,
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
    /// Its metrics, once the source is known.
    pub series: Arc<OnceLock<Series>>,
    /// What is shown at `/ready`, and stored with each heartbeat.
    pub health: Health,
    /// The database and leadership.
    pub database_health: Part,
    /// The broker.
    pub broker_health: Part,
    /// Events that are not taken.
    pub events_health: Part,
    /// Whether nothing that was published was taken, when that was last known. A new session of the leader knows less.
    pub nothing_flows: AtomicBool,
    /// An operator's pause.
    pub paused_health: Part,
    /// Whether the database is where it was.
    pub server_health: Part,
    /// Whether the sequence is behind.
    pub sequence_health: Part,
    /// Whether the exchange was lost.
    pub exchange_health: Part,
    /// How long what is under way may go on once the process is to end.
    pub grace: Duration,
}

/// The exchange's name, from the setting.
pub fn exchange(name: &str) -> Result<ShortString, String> {
    match ShortString::try_new(name) {
        Ok(name) if !name.as_str().is_empty() => Ok(name),
        _ => Err("an exchange's name has 1 to 255 bytes".to_owned()),
    }
}
