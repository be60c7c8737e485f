//! Whether the database stores what it is given.
//!
//! A server with a full disk answers, and reads go on: only writes tell. So the last one that was refused for the
//! server's own sake is remembered until one succeeds, be it a trial.

use std::sync::{Arc, Mutex, PoisonError};

use sqlx::{Connection, PgConnection};

use super::StoreError;

/// Why the last write was refused, as long as none has succeeded since.
#[derive(Clone, Debug, Default)]
pub struct Writes(Arc<Mutex<Option<String>>>);

/// What a write does to the files: it is logged, and larger than what a page has free. The text cannot be compressed
/// away. The event's position is given up with it, which the relay knows how to read over.
const TRIAL: &str = "
INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
SELECT 'person', gen_random_uuid()::text, 1, 'person.trial', to_json(string_agg(md5(random()::text), ''))
FROM generate_series(1, 1000)";

impl Writes {
    /// Takes note of how a write ended.
    pub(crate) fn ended<T>(&self, ended: &Result<T, StoreError>) {
        match ended {
            Ok(_) => self.set(None),
            Err(StoreError::CannotStore { reason, .. }) => self.set(Some(reason.clone())),
            // Of the others, reading tells as well.
            Err(_) => {}
        }
    }

    /// Why nothing can be stored, as far as the last write tells.
    pub(crate) fn refused(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tries to store something, and takes it back.
    pub(crate) async fn try_again(&self, conn: &mut PgConnection) -> sqlx::Result<()> {
        let mut trial = conn.begin().await?;
        sqlx::query(TRIAL).execute(&mut *trial).await?;
        trial.rollback().await?;
        self.set(None);
        Ok(())
    }

    fn set(&self, refused: Option<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = refused;
    }
}
