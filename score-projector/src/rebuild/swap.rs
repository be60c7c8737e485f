use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use daemon::{
    command::{Verdict, many},
    config::broker::BrokerArgs,
};
use serde_json::json;
use sqlx::{Acquire, Connection, PgConnection, Postgres, Transaction};
use tokio::time::Instant;

use super::{
    LOCK_ATTEMPTS, RebuildArgs, carry,
    difference::{Difference, difference},
    emit, is_lock, limit_locks, pause,
    progress::{Progress, progress},
    remove_queue,
};
use crate::model::{self, StoredModel};

/// With more aggregates behind than this, the live model is not stopped to let the shadow catch up.
const NEARLY: i64 = 1_000;
/// How long the live model may be stopped for that. Its writers time out after 10 s.
const CATCH_UP: Duration = Duration::from_secs(8);

/// The swap. Reads continue; at most they wait for the moment in which the tables are renamed.
pub(super) async fn swap(
    args: &RebuildArgs,
    conn: &mut PgConnection,
    broker: &BrokerArgs,
    dry_run: bool,
) -> anyhow::Result<Verdict> {
    let live = model::live(conn).await?;
    if let Some(queue) = &live.queue {
        // A swap was killed between its commit and its end.
        finish(conn, broker, queue).await?;
        args.common.answer(&json!({"live": live.consumer, "swapped": true}), || {
            format!("{} is live since the last swap; its queue {queue} is deleted now", live.consumer)
        })?;
        return Ok(Verdict::Ok);
    }
    let Some(shadow) = model::stored(conn, "shadow").await? else {
        bail!(
            "no rebuild is under way, and {} is live; score-projector rebuild start begins one",
            live.consumer
        )
    };
    let far = progress(conn, &live.consumer, &shadow.consumer).await?;
    if far.behind > NEARLY {
        bail!(refusal(&far));
    }
    // For the plans of those who read it from the first moment on.
    sqlx::query("ANALYZE score_shadow.person, score_shadow.entry").execute(&mut *conn).await?;

    let mut attempt = 0;
    let (difference, published) = loop {
        attempt += 1;
        match exchange(conn, &live, &shadow, dry_run).await {
            Ok(done) => break done,
            Err(error) if attempt < LOCK_ATTEMPTS && error.downcast_ref().is_some_and(is_lock) => {
                if attempt % 10 == 0 {
                    eprintln!("another session holds a lock on the read model; {attempt} attempts so far");
                }
                pause(attempt).await;
            }
            Err(error) => return Err(error),
        }
    };
    if let (false, Some(queue)) = (dry_run, &shadow.queue) {
        finish(conn, broker, queue).await?;
    }
    let now_live = if dry_run { &live.consumer } else { &shadow.consumer };
    let answer = json!({"live": now_live, "swapped": !dry_run, "published": published,
                        "difference": difference});
    args.common.answer(&answer, || {
        let events = many(i64::try_from(published).unwrap_or(i64::MAX), "event");
        if dry_run {
            return format!(
                "{}{events} would be published, and {} would be live",
                difference.text(),
                shadow.consumer
            );
        }
        format!(
            "{}{events} published, and {now_live} is live; {} is kept in the schema score_old until\n  \
             score-projector rebuild drop",
            difference.text(),
            live.consumer
        )
    })?;
    Ok(Verdict::Ok)
}

/// Everything in one transaction.
async fn exchange(
    conn: &mut PgConnection,
    live: &StoredModel,
    shadow: &StoredModel,
    dry_run: bool,
) -> anyhow::Result<(Difference, u64)> {
    let mut tx = Connection::begin(&mut *conn).await?;
    limit_locks(&mut tx).await?;
    sqlx::query("SET LOCAL work_mem = '64MB'").execute(&mut *tx).await?;
    // The live model stands still from here on; the shadow catches up with where it stands.
    take(&mut tx, "live", live).await?;
    let deadline = Instant::now() + CATCH_UP;
    loop {
        let progress = progress(&mut tx, &live.consumer, &shadow.consumer).await?;
        if progress.behind == 0 {
            break;
        }
        if Instant::now() > deadline {
            bail!(refusal(&progress));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    take(&mut tx, "shadow", shadow).await?;
    same_shape(&mut tx).await?;

    let difference = difference(&mut tx).await.context("the two models could not be compared")?;
    let published = emit::differences(&mut tx).await?;
    carry::over(&mut tx, &live.consumer, &shadow.consumer).await?;
    if dry_run {
        tx.rollback().await?;
        return Ok((difference, published));
    }
    lock_tables(&mut tx).await?;
    sqlx::query("SELECT score.exchange_tables()").execute(&mut *tx).await?;
    for (from, to) in [("live", "old"), ("shadow", "live")] {
        sqlx::query("UPDATE score.model SET role = $2, since = now() WHERE role = $1")
            .bind(from)
            .bind(to)
            .execute(&mut *tx)
            .await?;
    }
    // A query for the consumer of the live model finds the new one.
    sqlx::query("INSERT INTO inbox.successor (consumer, replaced_by) VALUES ($1, $2)")
        .bind(&live.consumer)
        .bind(&shadow.consumer)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok((difference, published))
}

/// Locks a model's row, which each writer to the model shares until its commit.
async fn take(tx: &mut Transaction<'_, Postgres>, role: &str, model: &StoredModel) -> anyhow::Result<()> {
    sqlx::query("SELECT FROM score.model WHERE role = $1 AND consumer = $2 FOR UPDATE")
        .bind(role)
        .bind(&model.consumer)
        .fetch_optional(&mut **tx)
        .await?
        .map(drop)
        .ok_or_else(|| anyhow!("{} is not the {role} model any more", model.consumer))
}

/// A migration or a grant that came after `start` has changed the live tables alone.
async fn same_shape(tx: &mut Transaction<'_, Postgres>) -> anyhow::Result<()> {
    let differing: Vec<String> = sqlx::query_scalar(
        "WITH live (line) AS (SELECT score.model_shape('score')),
              shadow (line) AS (SELECT score.model_shape('score_shadow'))
         (TABLE live EXCEPT TABLE shadow) UNION ALL (TABLE shadow EXCEPT TABLE live)",
    )
    .fetch_all(&mut **tx)
    .await?;
    if differing.is_empty() {
        return Ok(());
    }
    bail!(
        "the shadow's tables are not like the live ones any more: a migration or a grant came after its \
         start. Abort it and start again. What differs:\n  {}",
        differing.join("\n  ")
    )
}

/// In front of those who read. Each attempt waits shortly, because they wait behind it.
async fn lock_tables(tx: &mut Transaction<'_, Postgres>) -> anyhow::Result<()> {
    for attempt in 1.. {
        let mut savepoint = tx.begin().await?;
        let locked = sqlx::query(
            "LOCK TABLE score.person, score.entry, score_shadow.person, score_shadow.entry
             IN ACCESS EXCLUSIVE MODE",
        )
        .execute(&mut *savepoint)
        .await;
        match locked {
            Ok(_) => {
                savepoint.commit().await?;
                break;
            }
            Err(error) if is_lock(&error) && attempt < LOCK_ATTEMPTS => {
                savepoint.rollback().await?;
                pause(attempt).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// After the commit: the shadow's queue goes, since its consumer goes on from the live one.
async fn finish(conn: &mut PgConnection, broker: &BrokerArgs, queue: &str) -> anyhow::Result<()> {
    remove_queue(conn, broker, queue).await.context("the models have changed places")?;
    sqlx::query("UPDATE score.model SET queue = NULL WHERE role = 'live'").execute(conn).await?;
    Ok(())
}

fn refusal(progress: &Progress) -> String {
    format!(
        "the shadow is behind the live model with {}, so it may not take its place yet:\n  {}\n\
         score-projector rebuild status says how far it is",
        many(progress.behind, "aggregate"),
        progress.examples.join("\n  ")
    )
}
