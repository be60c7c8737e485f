//! Events that may end the process. An attempt is committed before the handler runs, so that the next process that
//! takes the event knows that the handler did not return.

use std::sync::PoisonError;

use sqlx::{PgExecutor, Postgres, Transaction};

use crate::{
    Event, Handler, Sequencer,
    chain::{Key, Reason},
    handler::describe,
    rollback::Rollback,
    save::json_text,
    schema::BEGIN,
};

/// How often an event may be tried without a return of its handler.
const LIMIT: i32 = 3;

/// The error of an event that is held because its handler ended the process each time.
pub(crate) const NEVER_CAME_BACK: &str = "its handler never came back: the process died while it ran";

/// An attempt that has been committed.
#[derive(Debug)]
pub(crate) struct Attempt {
    key: Key,
    version: i64,
    /// The attempt number.
    pub(crate) attempts: i32,
    /// Whether the event was held before.
    was_held: bool,
}

impl<H: Handler> Sequencer<H> {
    /// Commits an attempt at the event, on another connection than the one with the chain's lock. The lock keeps other
    /// processes from counting the same attempt. None when the limit of attempts is reached.
    pub(crate) async fn begin_attempt(
        &self,
        event: &Event,
        held: Option<(Reason, i32)>,
    ) -> Result<Option<Attempt>, Rollback> {
        let (key, version) = (Key::from(event), event.version);
        // This process has tried it, and lives.
        let survived =
            self.survived.lock().unwrap_or_else(PoisonError::into_inner).remove(&(key.clone(), version));
        let attempts = match held {
            Some((Reason::Trying, attempts)) if survived => attempts,
            Some((Reason::Trying, attempts)) if attempts >= LIMIT => return Ok(None),
            Some((Reason::Trying, attempts)) => attempts.saturating_add(1),
            _ => 1,
        };
        let commit = async {
            // Explicit, since a connection whose user went away in BEGIN may be in a transaction already.
            let mut tx = self.pool.begin_with(BEGIN).await?;
            self.hold(&mut *tx, event, Reason::Trying, None, attempts).await?;
            tx.commit().await
        };
        commit.await.map_err(|error| match Rollback::from(error) {
            Rollback::Conflict(reason) => Rollback::Conflict(reason),
            // Whatever it is, it is not the handler's.
            other => Rollback::Transient(other.reason()),
        })?;
        Ok(Some(Attempt { key, version, attempts, was_held: held.is_some() }))
    }

    /// Takes back an attempt that was interrupted, for example by the database, and not by the event. When that cannot be
    /// written now, this process remembers it.
    pub(crate) async fn take_back(&self, attempt: Attempt) {
        if let Err(error) = self.write_back(&attempt).await {
            tracing::debug!(error = describe(&error), "an attempt was interrupted, which could not be noted");
            self.survived
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert((attempt.key, attempt.version));
        }
    }

    async fn write_back(&self, attempt: &Attempt) -> sqlx::Result<()> {
        let Attempt { key, version, was_held, .. } = attempt;
        let mut tx = self.pool.begin_with(BEGIN).await?;
        // Not while another process tries it.
        sqlx::query(
            "SELECT FROM inbox.aggregate
             WHERE (consumer, source, aggregate_type, aggregate_id) = ($1, $2, $3, $4) FOR UPDATE",
        )
        .bind(&self.consumer)
        .bind(&key.source)
        .bind(&key.aggregate_type)
        .bind(&key.aggregate_id)
        .execute(&mut *tx)
        .await?;
        let sql = if *was_held {
            "UPDATE inbox.held
             SET attempts = attempts - 1, reason = CASE attempts WHEN 1 THEN 'gap' ELSE reason END
             WHERE (consumer, source, aggregate_type, aggregate_id, version) = ($1, $2, $3, $4, $5)
               AND reason = 'trying'"
        } else {
            "DELETE FROM inbox.held
             WHERE (consumer, source, aggregate_type, aggregate_id, version) = ($1, $2, $3, $4, $5)
               AND reason = 'trying' AND attempts = 1"
        };
        sqlx::query(sql)
            .bind(&self.consumer)
            .bind(&key.source)
            .bind(&key.aggregate_type)
            .bind(&key.aggregate_id)
            .bind(version)
            .execute(&mut *tx)
            .await?;
        tx.commit().await
    }

    /// Holds the event that its handler refused.
    pub(crate) async fn refuse(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        event: &Event,
        reason: &str,
        attempts: i32,
    ) -> Result<(), Rollback> {
        self.hold(&mut **tx, event, Reason::Poison, Some(reason), attempts).await?;
        tracing::warn!(
            consumer = self.consumer,
            source = event.source,
            aggregate = format_args!("{}/{}", escape::line(&event.aggregate_type), escape::line(&event.aggregate_id)),
            version = event.version,
            event = %event.id,
            type_ = event.type_,
            attempts,
            reason,
            "the handler refused an event; it is held, and later ones of its aggregate wait behind it"
        );
        Ok(())
    }

    /// Holds an event that was tried `attempts` times.
    async fn hold(
        &self,
        connection: impl PgExecutor<'_>,
        event: &Event,
        reason: Reason,
        error: Option<&str>,
        attempts: i32,
    ) -> sqlx::Result<()> {
        // A text of PostgreSQL's cannot hold NUL, and a list of errors no novels.
        let error = error.map(|e| e.chars().filter(|c| *c != '\0').take(1_000).collect::<String>());
        sqlx::query(
            "INSERT INTO inbox.held (consumer, source, aggregate_type, aggregate_id, version, event_id, type,
                                     occurred_at, headers, payload, reason, error, attempts)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9::text::json, $10, $11, $12, $13)
             ON CONFLICT (consumer, source, aggregate_type, aggregate_id, version) DO UPDATE
             SET reason = excluded.reason, error = excluded.error, attempts = excluded.attempts,
                 last_at = now()",
        )
        .bind(&self.consumer)
        .bind(&event.source)
        .bind(&event.aggregate_type)
        .bind(&event.aggregate_id)
        .bind(event.version)
        .bind(event.id)
        .bind(&event.type_)
        .bind(event.occurred_at)
        .bind(json_text(&event.headers))
        .bind(&event.payload)
        .bind(reason.as_str())
        .bind(error)
        .bind(attempts)
        .execute(connection)
        .await?;
        Ok(())
    }
}
