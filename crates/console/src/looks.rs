//! The connection over which a database is looked at.

use std::sync::{Mutex, PoisonError};

use daemon::config::database::Database;
use sqlx::PgConnection;

/// A connection that stays between looks. A pool would say of a server that refuses connections only that it had none in
/// time.
#[derive(Debug)]
pub(crate) struct Looks {
    database: Database,
    kept: Mutex<Option<PgConnection>>,
}

impl Looks {
    /// Connects at the first look.
    pub(crate) fn new(database: Database) -> Self {
        Self { database: database.quiet(), kept: Mutex::default() }
    }

    /// The connection of the last look that did not fail, or a new one.
    pub(crate) async fn take(&self) -> sqlx::Result<PgConnection> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).take();
        match kept {
            Some(conn) => Ok(conn),
            None => self.database.connect().await,
        }
    }

    /// Keeps it for the next look. One over which a look failed, or was given up, is not kept.
    pub(crate) fn keep(&self, conn: PgConnection) {
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(conn);
    }
}
