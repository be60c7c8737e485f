use std::future::Future;

use sqlx::{Postgres, Transaction};

use crate::Event;

/// What a subscriber does with its events.
pub trait Handler: Send + Sync + 'static {
    /// Called first in every transaction, also in one that only holds or rejects what came: the place to
    /// refuse, with [`Failure::Transient`], when this consumer may not write any more.
    fn begin(&self, _tx: &mut Transaction<'_, Postgres>) -> impl Future<Output = Result<(), Failure>> + Send {
        async { Ok(()) }
    }

    /// Applies one event in the transaction that also records its version. Events of an aggregate come
    /// in order and once; what the transaction changes is rolled back when this fails.
    ///
    /// A type that the handler does not know is no failure: it applies as nothing.
    /// It may be called again for an event whose transaction was rolled back, so effects outside of the
    /// transaction do not belong here.
    fn handle(
        &self,
        event: &Event,
        tx: &mut Transaction<'_, Postgres>,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Applies events in one transaction, in this order: those of one aggregate follow each other, those
    /// of several are mixed. It is what the sequencer calls, with one event too. It may be overridden
    /// to read and write in bulk; as it stands it takes one event after the other.
    ///
    /// When it fails nothing of it remains, and it is called again with fewer events, until the one at
    /// fault is alone.
    fn handle_batch(
        &self,
        events: &[Event],
        tx: &mut Transaction<'_, Postgres>,
    ) -> impl Future<Output = Result<(), Failure>> + Send {
        async move {
            for event in events {
                self.handle(event, tx).await?;
            }
            Ok(())
        }
    }

    /// Called after a commit that applied events: the place to wake somebody up.
    fn committed(&self) {}
}

/// Why an event was not applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The event itself is the reason, so another try would end the same way: it is held with this
    /// text, which must not quote personal data, and later events of its aggregate wait behind it.
    #[error("{0}")]
    Poison(String),
    /// Something else is the reason and passes: nothing is consumed until the database answers, then
    /// the broker delivers the event again. Not counted as an attempt.
    #[error("{0}")]
    Transient(String),
}

impl Failure {
    /// The event is at fault, for this reason. No personal data in it.
    pub fn poison(reason: impl Into<String>) -> Self {
        Self::Poison(reason.into())
    }
}

/// Transient when the database is at fault (see [`is_transient`]), poison when the statement is.
impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        if is_transient(&error) { Self::Transient(describe(&error)) } else { Self::Poison(describe(&error)) }
    }
}

/// Whether the same statement may succeed later: the connection broke, or SQLSTATE says so. The classes
/// are 08 connection, 40 rollback (deadlock, serialization), 53 resources, 57 operator intervention
/// (shutdown, timeout), and 55P03, a lock that was not available.
pub(crate) fn is_transient(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(db) => db.code().is_some_and(|code| {
            code == "55P03" || ["08", "40", "53", "57"].iter().any(|class| code.starts_with(class))
        }),
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => true,
        _ => false,
    }
}

/// What happened, without the server's message: that may quote the value it stumbled over.
pub(crate) fn describe(error: &sqlx::Error) -> String {
    let Some(db) = error.as_database_error() else {
        return match error {
            sqlx::Error::Io(error) => format!("the connection to the database broke: {}", error.kind()),
            sqlx::Error::PoolTimedOut => "the database gave no connection in time".to_owned(),
            sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) | sqlx::Error::Encode(_) => {
                "a value does not fit its type".to_owned()
            }
            other => other.to_string(),
        };
    };
    let mut text = format!("database error {}", db.code().unwrap_or_default());
    for (label, name) in [("table", db.table()), ("constraint", db.constraint())] {
        if let Some(name) = name {
            text = format!("{text}, {label} {name}");
        }
    }
    text
}
