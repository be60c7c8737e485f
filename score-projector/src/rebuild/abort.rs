use anyhow::{Context, bail};
use daemon::{command::Verdict, config::broker::BrokerArgs, progress::Progress};
use outbox::database::again;
use serde_json::json;
use sqlx::{Connection, PgConnection};

use super::{
    LOCK_ATTEMPTS, RebuildArgs, compare::unwatch, is_lock, limit_locks, pause, remove_consumer, remove_queue,
};
use crate::model::{self, StoredModel};

/// Removes a rebuild, in this order: the tables, so that its consumers end; their queue; their rows in the inbox; and the
/// row in `score.model`.
pub(super) async fn abort(
    args: &RebuildArgs,
    conn: &mut PgConnection,
    broker: &BrokerArgs,
) -> anyhow::Result<Verdict> {
    let progress = Progress::new("removing the shadow", "attempt");
    let mut attempt = 0;
    while let Err(error) = end(conn).await {
        attempt += 1;
        if !is_lock(&error) || attempt >= LOCK_ATTEMPTS {
            return Err(error).context("the shadow could not be removed");
        }
        pause(attempt).await;
    }
    let Some(StoredModel { consumer, queue, .. }) = model::stored(conn, "ending").await? else {
        args.common.answer(&json!({"aborted": null}), || "no rebuild is under way".to_owned())?;
        return Ok(Verdict::Ok);
    };
    let Some(queue) = queue else { bail!("score.model names no queue of {consumer}") };
    remove_queue(conn, broker, &queue).await?;
    remove_consumer(conn, &consumer, &progress).await?;
    unwatch(conn).await;
    again(async || sqlx::query("DELETE FROM score.model WHERE role = 'ending'").execute(&mut *conn).await)
        .await?;
    drop(progress);
    args.common.answer(&json!({"aborted": consumer}), || {
        format!("{consumer} is removed, with its queue and its rows in the inbox")
    })?;
    Ok(Verdict::Ok)
}

/// Ends the shadow. Its consumers notice with their next transaction, and end.
async fn end(conn: &mut PgConnection) -> sqlx::Result<()> {
    let mut tx = conn.begin().await?;
    limit_locks(&mut tx).await?;
    let ended = sqlx::query("UPDATE score.model SET role = 'ending', since = now() WHERE role = 'shadow'")
        .execute(&mut *tx)
        .await?;
    if ended.rows_affected() == 1 {
        sqlx::query("DROP SCHEMA score_shadow CASCADE").execute(&mut *tx).await?;
    }
    tx.commit().await
}
