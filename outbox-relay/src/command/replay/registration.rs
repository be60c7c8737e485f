//! The replay's row in `outbox.replay`. While it says that the replay lives, retention keeps away from what is still to
//! be read.

use std::time::{Duration, Instant};

use anyhow::Context;
use sqlx::PgConnection;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// While the replay waits, its row says this often that it lives.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(10);

/// The row, and the connection that writes it.
pub(super) struct Registration<'a> {
    pub(super) conn: &'a mut PgConnection,
    /// None in a dry run, which has no row.
    id: Option<Uuid>,
    written_at: Instant,
}

impl<'a> Registration<'a> {
    /// Without a row.
    pub(super) fn none(conn: &'a mut PgConnection) -> Self {
        Self { conn, id: None, written_at: Instant::now() }
    }

    /// Registers a replay of the positions from `next` to `to`.
    pub(super) async fn begin(
        &mut self,
        id: Uuid,
        (next, to): (i64, i64),
        target: String,
    ) -> anyhow::Result<()> {
        let user = std::env::var("USER").unwrap_or_else(|_| "somebody".to_owned());
        sqlx::query(
            "INSERT INTO outbox.replay (id, next_position, to_position, target, started_by)
             VALUES ($1, $2, $3, $4, $5)",
        )
        .bind(id)
        .bind(next)
        .bind(to)
        .bind(target)
        .bind(user)
        .execute(&mut *self.conn)
        .await
        .context("the replay could not be registered; nothing was published")?;
        (self.id, self.written_at) = (Some(id), Instant::now());
        Ok(())
    }

    /// Stores how far the replay is.
    pub(super) async fn save(&mut self, next: i64) -> anyhow::Result<()> {
        self.written_at = Instant::now();
        sqlx::query("UPDATE outbox.replay SET next_position = $2, heartbeat_at = now() WHERE id = $1")
            .bind(self.id)
            .bind(next)
            .execute(&mut *self.conn)
            .await
            .context("the replay's progress could not be stored")?;
        Ok(())
    }

    /// Says that the replay lives, unless that was said just now.
    pub(super) async fn beat(&mut self) -> anyhow::Result<()> {
        // Waits for the retry budget are much shorter.
        if self.written_at.elapsed() < HEARTBEAT / 10 {
            return Ok(());
        }
        self.written_at = Instant::now();
        sqlx::query("UPDATE outbox.replay SET heartbeat_at = now() WHERE id = $1")
            .bind(self.id)
            .execute(&mut *self.conn)
            .await
            .context("the replay could not say that it lives")?;
        Ok(())
    }

    /// Waits, or ends early when `stop` says so, and says meanwhile that the replay lives.
    pub(super) async fn wait(&mut self, pause: Duration, stop: &CancellationToken) -> anyhow::Result<()> {
        let mut left = pause;
        while !left.is_zero() && !stop.is_cancelled() {
            let part = left.min(HEARTBEAT);
            stop.run_until_cancelled(tokio::time::sleep(part)).await;
            self.beat().await?;
            left -= part;
        }
        Ok(())
    }

    /// Takes the row away.
    pub(super) async fn end(self) -> anyhow::Result<()> {
        let Some(id) = self.id else { return Ok(()) };
        sqlx::query("DELETE FROM outbox.replay WHERE id = $1").bind(id).execute(&mut *self.conn).await.context(
            "the replay is over, but its row in outbox.replay could not be deleted; it keeps nothing after a minute",
        )?;
        Ok(())
    }
}
