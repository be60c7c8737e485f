use std::borrow::Cow;

use sqlx::{error::DatabaseError, postgres::PgDatabaseError};
use uuid::Uuid;

/// Why events were not appended or published, by what a caller can do about it. After an error of the database the
/// transaction is aborted, as after any failed statement.
///
/// What the outbox itself says about a chain names types, ids and versions of aggregates, and no other data.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// No message could carry the event. Nothing was sent to the database.
    #[error("event {id} of type {type_} cannot be published: {rule}")]
    Unfit {
        /// The event's id.
        id: Uuid,
        /// Its type.
        type_: Cow<'static, str>,
        /// What it should be like.
        rule: String,
    },
    /// The version is not the next one of its aggregate, but a later one (23000). The writer has skipped a version, or has
    /// not begun with 1: a defect of the writer.
    #[error("{}", words(.0))]
    VersionSkipped(sqlx::Error),
    /// The aggregate has the version already (23505). It was not taken under the lock of the aggregate's row, or its writer
    /// has begun again at 1: a defect of the writer.
    #[error("{}", words(.0))]
    VersionTaken(sqlx::Error),
    /// Another transaction changed the aggregate meanwhile (40001, 40P01). Repeat the whole transaction.
    #[error("{}", words(.0))]
    Conflict(sqlx::Error),
    /// The outbox is not set up for it (55000): its versions are counted the other way, which `outbox.number_by` changes;
    /// its sequence is behind, or at its end (2200H); or only one queue has the state of the aggregate. An operator has to
    /// act.
    #[error("{}", words(.0))]
    NotSetUp(sqlx::Error),
    /// The database refused or did not answer.
    #[error(transparent)]
    Database(sqlx::Error),
}

impl AppendError {
    /// The error of the database, unless nothing was sent there.
    pub fn database(&self) -> Option<&sqlx::Error> {
        match self {
            Self::Unfit { .. } => None,
            Self::VersionSkipped(error)
            | Self::VersionTaken(error)
            | Self::Conflict(error)
            | Self::NotSetUp(error)
            | Self::Database(error) => Some(error),
        }
    }
}

impl From<sqlx::Error> for AppendError {
    fn from(error: sqlx::Error) -> Self {
        let kind = match error.as_database_error().and_then(DatabaseError::code).as_deref() {
            Some("23000") => Self::VersionSkipped,
            Some("23505") => Self::VersionTaken,
            Some("40001" | "40P01") => Self::Conflict,
            Some("55000" | "2200H") => Self::NotSetUp,
            _ => Self::Database,
        };
        kind(error)
    }
}

/// The server's own words and advice, without its DETAIL, which may quote a row.
fn words(error: &sqlx::Error) -> String {
    let Some(db) = error.as_database_error() else { return error.to_string() };
    match db.try_downcast_ref::<PgDatabaseError>().and_then(PgDatabaseError::hint) {
        Some(hint) => format!("{}. {hint}", db.message()),
        None => db.message().to_owned(),
    }
}
