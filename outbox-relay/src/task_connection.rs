//! A database connection that a task beside publishing keeps from round to round. A new one for each round costs the
//! server a process, a TLS handshake and caches to warm, and a line of its log where connections are logged.

use std::time::Duration;

use daemon::config::database::Database;
use sqlx::{Connection, PgConnection};
use tokio::time::timeout;

/// A server that does not respond within this time has lost the connection.
const PING: Duration = Duration::from_secs(5);
/// Closing is a courtesy.
const CLOSE: Duration = Duration::from_secs(1);

/// The connection of one task.
#[derive(Debug)]
pub(crate) struct TaskConnection {
    database: Database,
    conn: Option<PgConnection>,
}

impl TaskConnection {
    /// Connects when it is first used.
    pub(crate) fn new(database: Database) -> Self {
        Self { database, conn: None }
    }

    /// The connection that was kept, if the server still responds, or else a new one.
    pub(crate) async fn take(&mut self) -> sqlx::Result<PgConnection> {
        if let Some(mut conn) = self.conn.take()
            && matches!(timeout(PING, conn.ping()).await, Ok(Ok(())))
        {
            return Ok(conn);
        }
        self.database.connect().await
    }

    /// Keeps the connection for the next round, unless what was done with it has broken it.
    pub(crate) fn keep<T>(&mut self, conn: PgConnection, done: &sqlx::Result<T>) {
        let whole = match done {
            Ok(_) => true,
            // The server has responded, and a transaction that was open is rolled back with the next statement.
            Err(error) => error.as_database_error().is_some(),
        };
        if whole {
            self.conn = Some(conn);
        }
    }

    /// Closes it in good order.
    pub(crate) async fn close(&mut self) {
        if let Some(conn) = self.conn.take() {
            let _ = timeout(CLOSE, conn.close()).await;
        }
    }
}
