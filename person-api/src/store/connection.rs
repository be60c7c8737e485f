//! Connections to the database, and how many requests may have one.

use std::ops::{Deref, DerefMut};

use events::Cpf;
use outbox::database::{Failure, describe};
use sqlx::{PgConnection, PgPool, Postgres, pool::PoolConnection};
use tokio::sync::OwnedSemaphorePermit;
use web::front::ConcurrencyLimit;

use super::{
    error::StoreError,
    write_slots::{WriteSlot, WriteSlots},
};

/// The database, as the API sees it.
#[derive(Clone, Debug)]
pub struct Store {
    pool: PgPool,
    limit: ConcurrencyLimit,
    slots: WriteSlots,
}

/// A connection, with the permits of the request that uses it.
pub(super) struct Connection {
    conn: PoolConnection<Postgres>,
    _permit: OwnedSemaphorePermit,
    /// Of a write.
    _slot: Option<WriteSlot>,
}

impl Deref for Connection {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.conn
    }
}

impl DerefMut for Connection {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.conn
    }
}

impl Store {
    /// The pool's connections limit their statements themselves (`statement_timeout`).
    pub fn new(pool: PgPool) -> Self {
        Self { pool, limit: ConcurrencyLimit::default(), slots: WriteSlots::default() }
    }

    /// Takes no more requests at a time than `limit` lets in.
    #[must_use]
    pub fn limited_by(self, limit: ConcurrencyLimit) -> Self {
        Self { limit, ..self }
    }

    /// An error means that no statement was sent yet.
    pub(super) async fn acquire(&self) -> Result<Connection, StoreError> {
        let permit = self.limit.try_acquire().ok_or(StoreError::Overloaded)?;
        let unavailable = |error| StoreError::Unavailable(Failure::of(&error), describe(&error));
        let conn = self.pool.acquire().await.map_err(unavailable)?;
        Ok(Connection { conn, _permit: permit, _slot: None })
    }

    /// For a write about this person. The write waits for its slot without a connection: writes about one person wait
    /// for each other in any case, and must not hold connections that other requests need.
    pub(super) async fn acquire_for(&self, cpf: Cpf) -> Result<Connection, StoreError> {
        let slot = self.slots.acquire(cpf).await?;
        Ok(Connection { _slot: Some(slot), ..self.acquire().await? })
    }
}
