//! How a statement can fail.

use std::{borrow::Cow, future::Future, time::Duration};

use outbox::{
    AppendError,
    database::{Failure, describe},
};
use sqlx::error::DatabaseError;

/// How long a statement may take, on the wire and back. The server ends one earlier, by its `statement_timeout`; this
/// is for a server that does not respond any more.
const TIMEOUT: Duration = Duration::from_secs(8);

/// Why the database gave no result. Never shows what was sent or stored, which is personal data.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The limit of concurrent requests is reached; nothing was sent.
    #[error("the limit of concurrent database requests is reached")]
    Overloaded,
    /// Other writes about the same person take too long; nothing was stored.
    #[error("other requests are writing about the same person")]
    Busy,
    /// The database does not respond, or rolled the statement back; nothing was stored.
    #[error("{1}")]
    Unavailable(Failure, String),
    /// The connection was lost during a statement: a write may or may not have been stored.
    #[error("the connection to the database was lost during the statement: {0}")]
    Unknown(String),
    /// The database responds, but cannot store anything at the moment; nothing was stored.
    #[error("the database cannot store anything: {reason}")]
    CannotStore {
        /// What it lacks, for clients.
        what: &'static str,
        /// For operators.
        reason: String,
    },
    /// The person's row does not continue the history of its events, since it was changed without this program; nothing
    /// was stored. Names the person by id, and the versions.
    #[error("the person's row does not continue the history of its events: {0}")]
    Inconsistent(String),
    /// A defect of this program, or of the schema.
    #[error("the statement failed: {0}")]
    Failed(String),
}

impl StoreError {
    /// What kind of error it is, for a trace.
    pub(super) fn class(&self) -> Cow<'static, str> {
        match self {
            Self::Overloaded => "overloaded",
            Self::Busy => "busy",
            Self::Unavailable(..) => "unavailable",
            Self::Unknown(_) => "unknown",
            Self::CannotStore { .. } => "cannot_store",
            Self::Inconsistent(_) => "inconsistent",
            Self::Failed(_) => "failed",
        }
        .into()
    }

    /// A read has no unknown outcome: it stores nothing.
    pub(super) fn of_a_read(self) -> Self {
        match self {
            Self::Unknown(why) => Self::Unavailable(Failure::Away, why),
            other => other,
        }
    }
}

/// Runs a statement, at most for [`TIMEOUT`], and classifies its failure.
pub(super) async fn bounded<T>(statement: impl Future<Output = sqlx::Result<T>>) -> Result<T, StoreError> {
    let error = match tokio::time::timeout(TIMEOUT, statement).await {
        Ok(Ok(result)) => return Ok(result),
        Ok(Err(error)) => error,
        Err(_) => return Err(StoreError::Unknown("no response in time".to_owned())),
    };
    let described = describe(&error);
    let code = error.as_database_error().and_then(DatabaseError::code);
    if let Some(what) = code.as_deref().and_then(lacks) {
        return Err(StoreError::CannotStore { what, reason: described });
    }
    let failure = Failure::of(&error);
    Err(match failure {
        // A statement that was under way when the connection broke may have been committed.
        Failure::Away => StoreError::Unknown(described),
        // A row is locked for longer than a session waits for it.
        Failure::Locked => StoreError::Busy,
        Failure::Defect => refused(error).unwrap_or(StoreError::Failed(described)),
        // The server says that it rolled the statement back.
        _ => StoreError::Unavailable(failure, described),
    })
}

/// The outbox's own errors about an event, which name ids and versions and no other data.
fn refused(error: sqlx::Error) -> Option<StoreError> {
    // One of a table has the name of a constraint.
    let is_of_a_table = error.as_database_error().is_some_and(|error| error.constraint().is_some());
    match AppendError::from(error) {
        error @ (AppendError::VersionSkipped(_) | AppendError::VersionTaken(_)) if !is_of_a_table => {
            Some(StoreError::Inconsistent(error.to_string()))
        }
        error @ AppendError::NotSetUp(_) => Some(StoreError::CannotStore {
            what: "its outbox does not take the events of this service",
            reason: format!("the outbox does not take the events of this service: {error}"),
        }),
        _ => None,
    }
}

/// What the server lacks, so that no write can succeed. Connections (53300) are not in the list: their lack is over in a
/// moment.
fn lacks(code: &str) -> Option<&'static str> {
    Some(match code {
        "53100" => "its disk is full",
        "53200" => "it is out of memory",
        "53400" => "a limit of its configuration is reached",
        "58030" => "it cannot write its files",
        _ => return None,
    })
}
