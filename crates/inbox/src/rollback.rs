//! Why a transaction of the inbox was rolled back, and what the caller does then.

use crate::{HandlerError, Interrupted, chain::Key, ledger::UNREADABLE};

/// Why a transaction was rolled back.
#[derive(Debug)]
pub(crate) enum Rollback {
    /// The cause passes.
    Transient(String),
    /// The server preferred another transaction. The same work may succeed at once.
    Conflict(String),
    /// The same work would fail again.
    Failed(String),
    /// Stored headers of held events cannot be read.
    Unreadable(Vec<(Key, i64)>),
    /// A limit of time was exceeded. Smaller parts of the work may succeed.
    TooLong(String),
    /// A newer incarnation of a source begins, and its row has to be locked for that.
    NewIncarnation,
}

impl Rollback {
    /// The error for the sequencer's caller, after so many settled messages.
    pub(crate) fn after(self, settled: usize) -> Interrupted {
        let refused = matches!(self, Self::Failed(_));
        Interrupted { settled, reason: self.reason(), refused }
    }

    /// The reason, for logs and readiness.
    pub(crate) fn reason(self) -> String {
        match self {
            Self::Transient(reason)
            | Self::Conflict(reason)
            | Self::Failed(reason)
            | Self::TooLong(reason) => reason,
            Self::Unreadable(_) => UNREADABLE.to_owned(),
            Self::NewIncarnation => "a newer incarnation of a source begins".to_owned(),
        }
    }
}

impl From<sqlx::Error> for Rollback {
    fn from(error: sqlx::Error) -> Self {
        HandlerError::from(error).into()
    }
}

impl Rollback {
    /// For a statement that only waits for locks: a timeout there is not the events' fault, and passes.
    pub(crate) fn of_waiting(self) -> Self {
        match self {
            Self::TooLong(reason) => Self::Transient(reason),
            other => other,
        }
    }
}

impl From<HandlerError> for Rollback {
    fn from(failure: HandlerError) -> Self {
        match failure {
            HandlerError::Transient(reason) => Self::Transient(reason),
            HandlerError::Conflict(reason) => Self::Conflict(reason),
            HandlerError::Poison(reason) => Self::Failed(reason),
            HandlerError::TooLong(reason) => Self::TooLong(reason),
        }
    }
}
