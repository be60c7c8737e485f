//! The replay's row in `outbox.replay`. While it says that the replay lives, retention keeps away from what is still to
//! be read.

use std::time::{Duration, Instant};

use anyhow::Context;
use sqlx::PgConnection;
use uuid::Uuid;

/// The row is written this often.
const INTERVAL: Duration = Duration::from_secs(1);

/// The row, and the connection that writes it.
pub(in crate::command) struct Registration<'a> {
    conn: &'a mut PgConnection,
    id: Uuid,
    written_at: Instant,
}

impl<'a> Registration<'a> {
    /// Registers a replay of the positions from `next` to `to`.
    pub(super) async fn begin(
        conn: &'a mut PgConnection,
        id: Uuid,
        (next, to): (i64, i64),
        target: String,
    ) -> anyhow::Result<Self> {
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
        .execute(&mut *conn)
        .await
        .context("the replay could not be registered; nothing was published")?;
        Ok(Self { conn, id, written_at: Instant::now() })
    }

    /// Stores how far the replay is, and that it lives, unless that was stored just now.
    pub(super) async fn keep_up(&mut self, next: i64) -> anyhow::Result<()> {
        if self.written_at.elapsed() < INTERVAL {
            return Ok(());
        }
        self.written_at = Instant::now();
        sqlx::query("UPDATE outbox.replay SET next_position = $2, heartbeat_at = now() WHERE id = $1")
            .bind(self.id)
            .bind(next)
            .execute(&mut *self.conn)
            .await
            .context("the replay's progress could not be stored")?;
        Ok(())
    }

    /// Takes the row away.
    pub(super) async fn end(self) -> anyhow::Result<()> {
        sqlx::query("DELETE FROM outbox.replay WHERE id = $1").bind(self.id).execute(&mut *self.conn).await.context(
            "the replay is over, but its row in outbox.replay could not be deleted; it keeps nothing after a minute",
        )?;
        Ok(())
    }
}
