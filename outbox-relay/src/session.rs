//! The database session that holds the leadership of a relay name: one relay at a time reads and publishes for a
//! database and a relay name.
//!
//! Leadership is a session advisory lock on the connection that also does the reading, so that losing one is
//! losing the other. `epoch` fences what an old leader may still write.

mod candidate;
mod leader;
mod watch;

use std::time::Duration;

use daemon::config::database::{Needs, Schema, SchemaError};
use outbox::database::SharedSessions;

pub use candidate::CandidateSession;
pub use leader::{LeaderSession, MAX_DROPPED};
pub use watch::Watch;

/// No answer of the database takes longer, or the connection counts as lost.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Why there is no leadership, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The database is away or refuses a statement: forget everything, connect anew.
    #[error("{}", outbox::database::reason(.0))]
    Database(sqlx::Error),
    /// As [`Database`](Self::Database), but without a word from it.
    #[error("the database did not answer within {TIMEOUT:?}")]
    Silent,
    /// The database refuses something that a relay needs, until an operator changes it.
    #[error("{0}")]
    Unmet(String),
    /// This server is a standby, whose commits may still be undone by a failover.
    #[error("the server is in recovery: it is a standby or still starting; connect to the primary")]
    InRecovery,
    /// Leadership would be a lock of another client's session.
    #[error(transparent)]
    SharedSessions(SharedSessions),
    /// Another relay took over; what this one had in memory is void.
    #[error("another relay has taken over")]
    Deposed,
    /// A defect of ours: a lane came to an end.
    #[error("a lane ended by itself: {0}")]
    Lane(String),
    /// The sequence is behind what was published or stored, so that positions would be handed out twice.
    #[error(
        "the sequence outbox.position stands at {last_value}, behind {mark}, which is stored or published \
         already (logical replication and some restores do not carry sequences). Nothing is published, \
         since new events would be skipped. To set it right, and to have published what was written \
         meanwhile, see: outbox-relay recover --sequence"
    )]
    SequenceBehind {
        /// Where the sequence stands.
        last_value: i64,
        /// Where it must at least stand.
        mark: i64,
    },
    /// The schema is not what this program was built for.
    #[error(transparent)]
    Schema(SchemaError),
    /// The schema is there, but nobody said who publishes.
    #[error(transparent)]
    Source(outbox::SourceError),
}

impl SessionError {
    /// Whether waiting and trying again can help. What it cannot help ends the process.
    pub fn is_fatal(&self) -> bool {
        matches!(
            self,
            Self::Schema(_) | Self::Source(_) | Self::SequenceBehind { .. } | Self::SharedSessions(_)
        )
    }
}

impl From<sqlx::Error> for SessionError {
    fn from(error: sqlx::Error) -> Self {
        match error {
            sqlx::Error::Configuration(why) if why.is::<SharedSessions>() => {
                Self::SharedSessions(SharedSessions)
            }
            error => Self::Database(error),
        }
    }
}

impl From<SchemaError> for SessionError {
    fn from(error: SchemaError) -> Self {
        match error {
            SchemaError::Database(error) => error.into(),
            SchemaError::SharedSessions(shared) => Self::SharedSessions(shared),
            SchemaError::Unmet(why) => Self::Unmet(why),
            other => Self::Schema(other),
        }
    }
}

impl From<outbox::SourceError> for SessionError {
    fn from(error: outbox::SourceError) -> Self {
        match error {
            outbox::SourceError::Database(error) => error.into(),
            other => Self::Source(other),
        }
    }
}

/// Where a relay name that does not exist yet begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Begin {
    /// With the first event that is still stored.
    #[default]
    Start,
    /// With the events that are appended from now on.
    End,
}

/// Runs a statement, or gives up the connection.
async fn within_timeout<T, E: Into<SessionError>>(
    statement: impl Future<Output = Result<T, E>>,
) -> Result<T, SessionError> {
    tokio::time::timeout(TIMEOUT, statement).await.map_err(|_| SessionError::Silent)?.map_err(Into::into)
}

/// What a relay needs of its database.
fn needs() -> Needs {
    const RIGHTS: &[(&str, &str)] = &[
        ("outbox.source", "SELECT"),
        ("outbox.event", "SELECT"),
        ("outbox.relay", "SELECT"),
        ("outbox.relay", "INSERT"),
        ("outbox.relay", "UPDATE"),
        ("outbox.parked", "SELECT"),
        ("outbox.parked", "INSERT"),
        ("outbox.parked", "UPDATE"),
        ("outbox.parked", "DELETE"),
        ("outbox.lock_holder", "SELECT"),
        ("outbox.leader_session", "SELECT"),
        ("outbox.overview", "SELECT"),
    ];
    Needs { schemas: vec![schema()], writes: true, rights: RIGHTS }
}

/// The schema that the relay needs.
pub fn schema() -> Schema {
    Schema {
        name: outbox::SCHEMA,
        migrator: outbox::migrator(),
        command: "outbox-relay migrate --source NAME",
    }
}
