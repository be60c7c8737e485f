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
    /// The database rolled the transaction back in favour of another one (a deadlock or a serialization failure, class
    /// 40). It is tried again at once, a few times, and is then like [`Failure::Transient`].
    #[error("{0}")]
    Conflict(String),
    /// The database ended a statement because it took longer than this consumer allows (SQLSTATE 57014). The
    /// same work would end the same way, so it is tried in smaller parts; an event that takes too long twice,
    /// although it is alone and the database answers quickly otherwise, is held with this text.
    #[error("{0}")]
    TooLong(String),
}

impl Failure {
    /// The event is at fault, for this reason. No personal data in it.
    pub fn poison(reason: impl Into<String>) -> Self {
        Self::Poison(reason.into())
    }
}

/// Transient when the database is at fault (see [`is_transient`]), a conflict when another transaction was preferred,
/// poison when the statement is at fault, and too long when it was ended by our own limit.
impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        let reason = describe(&error);
        match error {
            error if is_too_long(&error) => Self::TooLong(reason),
            error if is_conflict(&error) => Self::Conflict(reason),
            error if is_transient(&error) => Self::Transient(reason),
            _ => Self::Poison(reason),
        }
    }
}

/// Whether the server ended a statement that took longer than the session allows. A limit of our own is no fault of the
/// database that passes.
pub(crate) fn is_too_long(error: &sqlx::Error) -> bool {
    error.as_database_error().and_then(sqlx::error::DatabaseError::code).as_deref() == Some("57014")
}

/// Whether the server rolled the transaction back in favour of another one: a deadlock or a serialization failure.
pub(crate) fn is_conflict(error: &sqlx::Error) -> bool {
    outbox::database::Failure::of(error) == outbox::database::Failure::Conflict
}

/// Whether the same statement may succeed later: the connection broke, or SQLSTATE says so. The classes
/// are 08 connection, 40 rollback (deadlock, serialization), 53 resources, 57 operator intervention
/// (shutdown, timeout), 55P03, a lock that was not available, and 25006, a server that takes no writes.
pub(crate) fn is_transient(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(db) => db.code().is_some_and(|code| {
            ["55P03", "25006"].contains(&&*code)
                || ["08", "40", "53", "57"].iter().any(|class| code.starts_with(class))
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
            // Its own words may name hosts.
            sqlx::Error::Tls(_) => outbox::database::reason(error),
            sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) | sqlx::Error::Encode(_) => {
                "a value does not fit its type".to_owned()
            }
            other => other.to_string(),
        };
    };
    let mut text = format!("database error {}", db.code().unwrap_or_default());
    if is_too_long(error) {
        text.push_str(" (a statement took longer than statement_timeout allows)");
    }
    for (label, name) in [("table", db.table()), ("constraint", db.constraint())] {
        if let Some(name) = name {
            text = format!("{text}, {label} {name}");
        }
    }
    match db.code().as_deref().and_then(outbox::database::meaning) {
        Some(meaning) => format!("{text}: {meaning}"),
        None => text,
    }
}
