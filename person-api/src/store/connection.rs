//! Connections to the database, and how many requests may have one.

use std::sync::Arc;

use daemon::{config::database::Database, traces};
use events::Cpf;
use outbox::database::{Failure, describe};
use sqlx::{
    FromRow, PgConnection, PgPool, Postgres, Transaction,
    pool::PoolConnection,
    postgres::{PgArguments, PgRow},
    query::QueryAs,
};
use tokio::sync::OwnedSemaphorePermit;
use web::front::ConcurrencyLimit;

use super::{
    error::{StoreError, bounded},
    write_slots::{WriteSlot, WriteSlots},
};

/// Connections to the database. Behind a pooler in transaction mode they have no sessions of their own: then each use of one
/// is a transaction with the settings, and its statements have no names.
#[derive(Clone, Debug)]
pub struct Connections {
    database: Arc<Database>,
    pool: PgPool,
}

impl Connections {
    /// Connects when a connection is first needed, at most so many times.
    pub fn new(database: Database, size: u32) -> Self {
        let database = database.sharing();
        Self { pool: database.pool(size), database: Arc::new(database) }
    }

    /// How to connect.
    pub(crate) fn database(&self) -> &Database {
        &self.database
    }

    /// For what needs no transaction: one statement that is not prepared.
    pub(crate) fn pool(&self) -> &PgPool {
        &self.pool
    }

    pub(crate) async fn acquire(&self) -> sqlx::Result<PoolConnection<Postgres>> {
        self.pool.acquire().await
    }

    /// Begins a transaction on a connection of these.
    pub(crate) async fn begin<'c>(
        &self,
        conn: &'c mut PgConnection,
    ) -> sqlx::Result<Transaction<'c, Postgres>> {
        self.database.begin(conn).await
    }

    /// Whether statements are prepared by name, once for a session.
    pub(crate) fn prepare(&self) -> bool {
        !self.database.are_shared()
    }
}

/// The database, as the API sees it.
#[derive(Clone, Debug)]
pub struct Store {
    connections: Connections,
    limit: ConcurrencyLimit,
    slots: WriteSlots,
}

/// A connection, with the permits of the request that uses it.
pub(super) struct Connection {
    connections: Connections,
    conn: PoolConnection<Postgres>,
    _permit: OwnedSemaphorePermit,
    /// Of a write.
    _slot: Option<WriteSlot>,
}

impl Connection {
    /// Runs a statement that is a transaction, at most for a limited time. `operation` and `table` name it in a trace.
    pub(super) async fn fetch_optional<O>(
        &mut self,
        operation: &'static str,
        table: &'static str,
        query: QueryAs<'_, Postgres, O, PgArguments>,
    ) -> Result<Option<O>, StoreError>
    where
        O: for<'r> FromRow<'r, PgRow> + Send + Unpin,
    {
        traces::statement(operation, table, self.run(query), StoreError::class).await
    }

    async fn run<O>(&mut self, query: QueryAs<'_, Postgres, O, PgArguments>) -> Result<Option<O>, StoreError>
    where
        O: for<'r> FromRow<'r, PgRow> + Send + Unpin,
    {
        if self.connections.prepare() {
            return bounded(query.fetch_optional(&mut *self.conn)).await;
        }
        let transaction = async {
            let mut tx = self.connections.begin(&mut self.conn).await?;
            let row = query.persistent(false).fetch_optional(&mut *tx).await?;
            tx.commit().await?;
            Ok(row)
        };
        bounded(transaction).await
    }

    /// For a transaction of several statements.
    pub(super) fn parts(&mut self) -> (&Connections, &mut PgConnection) {
        (&self.connections, &mut self.conn)
    }
}

impl Store {
    /// The connections limit their statements themselves (`statement_timeout`).
    pub fn new(connections: Connections) -> Self {
        Self { connections, limit: ConcurrencyLimit::default(), slots: WriteSlots::default() }
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
        let conn = self.connections.acquire().await.map_err(unavailable)?;
        Ok(Connection { connections: self.connections.clone(), conn, _permit: permit, _slot: None })
    }

    /// For a write about this person. The write waits for its slot without a connection: writes about one person wait
    /// for each other in any case, and must not hold connections that other requests need.
    pub(super) async fn acquire_for(&self, cpf: Cpf) -> Result<Connection, StoreError> {
        let slot = self.slots.acquire(cpf).await?;
        Ok(Connection { _slot: Some(slot), ..self.acquire().await? })
    }
}
