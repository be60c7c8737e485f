use std::future::Future;

use sqlx::{Postgres, Transaction};

use crate::Event;

/// A subscriber's own part: what its events do to its tables.
pub trait Handler: Send + Sync + 'static {
    /// Called first in every transaction, also in one that only holds or rejects messages. Override it to refuse, with
    /// [`HandlerError::Transient`], when this consumer may not write any more.
    fn begin(
        &self,
        _tx: &mut Transaction<'_, Postgres>,
    ) -> impl Future<Output = Result<(), HandlerError>> + Send {
        async { Ok(()) }
    }

    /// Applies one event in the transaction that also records its version. Events of an aggregate come in order and
    /// once. When this fails, the transaction's changes are rolled back.
    ///
    /// Return `Ok` for an event type that the handler does not know. The sequencer calls this again for an event whose
    /// transaction was rolled back, so an effect outside of the transaction may happen twice.
    fn handle(
        &self,
        event: &Event,
        tx: &mut Transaction<'_, Postgres>,
    ) -> impl Future<Output = Result<(), HandlerError>> + Send;

    /// Applies events in one transaction, in this order. Events of one aggregate are in the order of their versions;
    /// aggregates are mixed. The sequencer always calls this function, also for a single event. The default calls
    /// [`handle`](Self::handle) for each event; override it to read and write in bulk.
    ///
    /// When it fails, the transaction is rolled back, and the sequencer calls it again with fewer events, until the
    /// event at fault is alone.
    fn handle_batch(
        &self,
        events: &[Event],
        tx: &mut Transaction<'_, Postgres>,
    ) -> impl Future<Output = Result<(), HandlerError>> + Send {
        async move {
            for event in events {
                self.handle(event, tx).await?;
            }
            Ok(())
        }
    }

    /// Called after a commit that applied events. Override it to notify readers.
    fn committed(&self) {}
}

/// Why a handler did not apply an event.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandlerError {
    /// The event is at fault, and another try would fail too. The event is held with this text, which must not contain
    /// personal data. Later events of its aggregate wait behind it.
    #[error("{0}")]
    Poison(String),
    /// The cause is not the event, and passes. Consuming stops until the database responds; then the broker delivers
    /// the event again. This does not count as an attempt.
    #[error("{0}")]
    Transient(String),
    /// The database rolled the transaction back in favour of another one (a deadlock or a serialization failure, class
    /// 40). The transaction is retried at once, at most 6 times in all; after that it counts as
    /// [`HandlerError::Transient`].
    #[error("{0}")]
    Conflict(String),
    /// The database cancelled a statement that exceeded `statement_timeout` (SQLSTATE 57014). The batch is retried in
    /// smaller parts. An event that takes too long twice by itself, while the database responds quickly otherwise, is
    /// held with this text.
    #[error("{0}")]
    TooLong(String),
}

impl HandlerError {
    /// The event is at fault. `reason` is stored, so it must not contain personal data.
    ///
    /// ```
    /// use inbox::HandlerError;
    ///
    /// let error = HandlerError::poison("the amount is negative");
    /// assert_eq!(error, HandlerError::Poison("the amount is negative".to_owned()));
    /// ```
    pub fn poison(reason: impl Into<String>) -> Self {
        Self::Poison(reason.into())
    }
}

/// Chooses by the class of the database's error: see [`outbox::database::Failure`]. A defect of the statement or of a
/// value, or a missing right, is poison. An error that keeps the database from working for any event is transient, also
/// when an operator has to act first.
impl From<sqlx::Error> for HandlerError {
    fn from(error: sqlx::Error) -> Self {
        use outbox::database::Failure as Database;

        let reason = describe(&error);
        match Database::of(&error) {
            Database::Cancelled => Self::TooLong(reason),
            Database::Conflict => Self::Conflict(reason),
            Database::Away
            | Database::Locked
            | Database::Restarting
            | Database::Resources
            | Database::ReadOnly
            | Database::Login
            | Database::Pooler => Self::Transient(reason),
            // Row security refuses single rows with the code of a missing right: to wait would stop every other event.
            Database::Forbidden | Database::Defect => Self::Poison(reason),
        }
    }
}

/// Describes an error without the server's message, which may quote a value.
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
    if outbox::database::Failure::of(error) == outbox::database::Failure::Cancelled {
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

#[cfg(test)]
mod tests {
    use std::{borrow::Cow, error::Error, fmt};

    use sqlx::error::{DatabaseError, ErrorKind};

    use super::{HandlerError, HandlerError::*};

    /// An error that the server answers with.
    #[derive(Debug)]
    struct Refusal(&'static str);

    impl fmt::Display for Refusal {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Key (number)=(7) is wrong")
        }
    }

    impl Error for Refusal {}

    impl DatabaseError for Refusal {
        fn message(&self) -> &'static str {
            "Key (number)=(7) is wrong"
        }
        fn code(&self) -> Option<Cow<'_, str>> {
            Some(self.0.into())
        }
        fn as_error(&self) -> &(dyn Error + Send + Sync + 'static) {
            self
        }
        fn as_error_mut(&mut self) -> &mut (dyn Error + Send + Sync + 'static) {
            self
        }
        fn into_error(self: Box<Self>) -> Box<dyn Error + Send + Sync + 'static> {
            self
        }
        fn kind(&self) -> ErrorKind {
            ErrorKind::Other
        }
    }

    fn refusal(code: &'static str) -> sqlx::Error {
        sqlx::Error::Database(Box::new(Refusal(code)))
    }

    /// What becomes of an event whose handler gets this error. Each of the database's failures has a line. An error of
    /// the inbox's own statements means the same, except that poison fails the transaction: see
    /// [`Rollback`](crate::rollback::Rollback).
    #[test]
    fn each_failure_of_the_database_has_its_consequence() {
        type Means = fn(String) -> HandlerError;
        let io = || sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into());
        let table: [(&str, sqlx::Error, Means); 25] = [
            ("Away: the connection broke", io(), Transient),
            ("Away: no connection in time", sqlx::Error::PoolTimedOut, Transient),
            ("Away: the pool is closed", sqlx::Error::PoolClosed, Transient),
            ("Away: a protocol error", sqlx::Error::Protocol("half a message".to_owned()), Transient),
            ("Away: connection failure", refusal("08006"), Transient),
            ("Conflict: serialization failure", refusal("40001"), Conflict),
            ("Conflict: deadlock", refusal("40P01"), Conflict),
            ("Locked: lock not available", refusal("55P03"), Transient),
            ("Cancelled: statement timeout", refusal("57014"), TooLong),
            ("Restarting: shutdown", refusal("57P01"), Transient),
            ("Restarting: starting up", refusal("57P03"), Transient),
            ("Restarting: idle session timeout", refusal("57P05"), Transient),
            ("Resources: disk full", refusal("53100"), Transient),
            ("Resources: too many connections", refusal("53300"), Transient),
            ("ReadOnly: a standby", refusal("25006"), Transient),
            ("Login: wrong password", refusal("28P01"), Transient),
            ("Login: no such database", refusal("3D000"), Transient),
            ("Pooler: no such prepared statement", refusal("26000"), Transient),
            ("Pooler: statement prepared by another client", refusal("42P05"), Transient),
            ("Away: a pooler without a server", refusal("08P01"), Transient),
            ("Forbidden: a missing right, or row security", refusal("42501"), Poison),
            ("Defect: unique violation", refusal("23505"), Poison),
            ("Defect: undefined table", refusal("42P01"), Poison),
            ("Defect: a value out of range", refusal("22003"), Poison),
            ("Defect: a row that is not there", sqlx::Error::RowNotFound, Poison),
        ];
        for (case, error, means) in table {
            let reason = super::describe(&error);
            assert!(!reason.contains("11111111111"), "{case}: {reason}");
            assert_eq!(HandlerError::from(error), means(reason), "{case}");
        }
    }
}
