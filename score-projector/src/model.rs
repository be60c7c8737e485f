//! The read models in use: the rows of `score.model`.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use chrono::{DateTime, Utc};
use daemon::config::database::Database;
use inbox::HandlerError;
use outbox::Waker;
use sqlx::{FromRow, PgConnection, Postgres, Row, Transaction};
use tokio::sync::Notify;
use uuid::Uuid;

/// The role of a read model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It is read, and its changes are published.
    Live,
    /// It is being built.
    Shadow,
}

impl Role {
    /// As stored in `score.model`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Shadow => "shadow",
        }
    }

    /// Options of a connection whose `search_path` selects the model in this role.
    pub fn options(self, options: Database) -> Database {
        let schema = match self {
            Self::Live => "score",
            Self::Shadow => "score_shadow",
        };
        options.with("search_path", schema)
    }
}

/// A row of `score.model`.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct StoredModel {
    /// Its consumer's name in the inbox.
    pub consumer: String,
    /// Its own queue, when it has one.
    pub queue: Option<String>,
    /// When it got its role.
    pub since: DateTime<Utc>,
}

/// The model in this role (`live`, `shadow`, `old` or `ending`), if there is one.
pub async fn stored(conn: &mut PgConnection, role: &str) -> sqlx::Result<Option<StoredModel>> {
    sqlx::query_as("SELECT consumer, queue, since FROM score.model WHERE role = $1")
        .bind(role)
        .fetch_optional(conn)
        .await
}

/// The models that have a consumer: the live one, and the shadow during a rebuild.
pub(crate) async fn consumed(conn: &mut PgConnection) -> sqlx::Result<[Option<StoredModel>; 2]> {
    let mut stored: HashMap<String, StoredModel> =
        sqlx::query("SELECT role, consumer, queue, since FROM score.model WHERE role IN ('live', 'shadow')")
            .fetch_all(conn)
            .await?
            .iter()
            .map(|row| Ok((row.try_get("role")?, StoredModel::from_row(row)?)))
            .collect::<sqlx::Result<_>>()?;
    Ok([Role::Live, Role::Shadow].map(|role| stored.remove(role.as_str())))
}

/// The live model. There is always one.
pub async fn live(conn: &mut PgConnection) -> sqlx::Result<StoredModel> {
    stored(conn, Role::Live.as_str()).await?.ok_or(sqlx::Error::RowNotFound)
}

/// Deletes persons from the old model that the last swap has kept, which no consumer updates.
pub(crate) async fn erase_old(
    tx: &mut Transaction<'_, Postgres>,
    persons: &BTreeSet<Uuid>,
) -> sqlx::Result<()> {
    if persons.is_empty() {
        return Ok(());
    }
    sqlx::query("SELECT score.erase_old($1)")
        .bind(persons.iter().copied().collect::<Vec<_>>())
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Takes the lock of a connection that writes to the shadow. Such connections share it; the removal of the shadow's
/// queue takes it alone, since a consumer that still lives would declare the queue again.
pub(crate) async fn lock_shadow(conn: &mut PgConnection) -> sqlx::Result<()> {
    sqlx::query("SELECT score.hold_shadow()").execute(&mut *conn).await?;
    // After the removal there is no shadow.
    sqlx::query("SELECT FROM score.model WHERE role = 'shadow'").fetch_one(conn).await.map(drop)
}

/// A read model to write to, under its consumer's name in the inbox.
#[derive(Clone, Debug)]
pub struct Model {
    role: Role,
    consumer: String,
    waker: Option<Waker>,
    replaced: Arc<Notify>,
}

impl Model {
    /// The model of `consumer` in this role. `waker` notifies readers of its commits.
    pub fn new(role: Role, consumer: String, waker: Option<Waker>) -> Self {
        Self { role, consumer, waker, replaced: Arc::default() }
    }

    /// Its role.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Its consumer's name in the inbox.
    pub fn consumer(&self) -> &str {
        &self.consumer
    }

    /// Notifies `replaced` when a write finds that the model was replaced.
    pub(crate) fn on_replaced(mut self, replaced: Arc<Notify>) -> Self {
        self.replaced = replaced;
        self
    }

    /// Fails when the model is not this consumer's any more. Otherwise it stays so until the end of the transaction: a swap
    /// waits for the row lock.
    pub(crate) async fn fence(&self, tx: &mut Transaction<'_, Postgres>) -> Result<(), HandlerError> {
        let mine = sqlx::query("SELECT FROM score.model WHERE role = $1 AND consumer = $2 FOR SHARE")
            .bind(self.role.as_str())
            .bind(&self.consumer)
            .fetch_optional(&mut **tx)
            .await?;
        if mine.is_some() {
            return Ok(());
        }
        self.replaced.notify_one();
        Err(HandlerError::Transient(format!("the read model of the consumer {} was replaced", self.consumer)))
    }

    pub(crate) fn committed(&self) {
        self.waker.iter().for_each(Waker::wake);
    }
}
