//! Whether the database can store anything.
//!
//! A server with a full disk responds, and serves reads: only a write shows the fault. So the reason of the last write
//! that the server could not store stays here until a write succeeds, or a trial does.

use std::sync::{Arc, Mutex, PoisonError};

use sqlx::{Connection, PgConnection};

use super::error::StoreError;

/// Why the server could not store the last write, as long as no write has succeeded since.
#[derive(Clone, Debug, Default)]
pub struct WriteHealth(Arc<Mutex<Option<String>>>);

/// Needs the server's files as a write does: it is logged, and larger than what a page has free, since random text does
/// not compress. The rollback leaves a hole in the positions, as any rollback does; the relay passes it.
const TRIAL: &str = "
INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
SELECT 'person', gen_random_uuid()::text, 1, 'person.trial', to_json(string_agg(md5(random()::text), ''))
FROM generate_series(1, 1000)";

impl WriteHealth {
    /// Records the result of a write.
    pub(crate) fn record<T>(&self, result: &Result<T, StoreError>) {
        match result {
            Ok(_) => self.set(None),
            Err(StoreError::CannotStore { reason, .. }) => self.set(Some(reason.clone())),
            // Reads show the other failures, too.
            Err(_) => {}
        }
    }

    /// Why nothing can be stored, as far as the last write shows.
    pub(crate) fn failure(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Stores something and rolls it back.
    pub(crate) async fn try_write(&self, conn: &mut PgConnection) -> sqlx::Result<()> {
        let mut trial = conn.begin().await?;
        sqlx::raw_sql(TRIAL).execute(&mut *trial).await?;
        trial.rollback().await?;
        self.set(None);
        Ok(())
    }

    fn set(&self, failure: Option<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = failure;
    }
}
