//! Why a transaction of the inbox was rolled back, and what the caller does then.

use crate::{HandlerError, Interrupted, chain::Key, ledger::UNREADABLE};

/// Why a transaction was rolled back.
#[derive(Debug)]
pub(crate) enum Rollback {
    /// It passes.
    Transient(String),
    /// The server preferred another transaction; the same work may succeed at once.
    Conflict(String),
    /// It does not.
    Failed(String),
    /// What is stored of held events cannot be read.
    Unreadable(Vec<(Key, i64)>),
    /// It took longer than it may; smaller parts may not.
    TooLong(String),
}

impl Rollback {
    /// As the caller of the sequencer sees it, when so many messages were settled before.
    pub(crate) fn after(self, settled: usize) -> Interrupted {
        let refused = matches!(self, Self::Failed(_));
        Interrupted { settled, reason: self.reason(), refused }
    }

    /// In words.
    pub(crate) fn reason(self) -> String {
        match self {
            Self::Transient(reason)
            | Self::Conflict(reason)
            | Self::Failed(reason)
            | Self::TooLong(reason) => reason,
            Self::Unreadable(_) => UNREADABLE.to_owned(),
        }
    }
}

impl From<sqlx::Error> for Rollback {
    fn from(error: sqlx::Error) -> Self {
        HandlerError::from(error).into()
    }
}

impl Rollback {
    /// Of what only waits for others: that it took long is not the events' fault.
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
