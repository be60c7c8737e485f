use std::{fmt::Write, time::Duration};

use anyhow::{Context, anyhow, bail};
use daemon::{
    command::{Verdict, many},
    config::broker::BrokerArgs,
    progress::Progress,
};
use serde_json::json;
use sqlx::{Acquire, AssertSqlSafe, Connection, PgConnection, Postgres, Transaction};
use tokio::time::Instant;

use super::{
    LOCK_ATTEMPTS, RebuildArgs, carry,
    compare::{Comparison, remember, unwatch, watch, without_vacuum},
    count::Look,
    difference::{Difference, difference},
    emit, is_lock, limit_locks, pause,
    progress::{Behind, behind},
    remove_queue,
};
use crate::model::{self, StoredModel};

/// With more aggregates behind than this, the swap does not begin.
const NEARLY: i64 = 1_000;
/// How long the live model may stand still until the shadow has caught up with where it stands.
const CATCH_UP: Duration = Duration::from_millis(500);
/// How often that is tried while it comes no nearer, and at all.
const STALLED: u32 = 3;
const CATCH_UPS: u32 = 30;
/// How often the locks of the tables are tried while the live model stands still.
const TABLE_ATTEMPTS: u32 = 2;

/// What a swap came to.
struct Swapped {
    difference: Difference,
    /// Events.
    published: u64,
    /// For how long nobody could write to the live model.
    stood_still: Duration,
}

/// What an attempt came to.
enum Attempt {
    Done(Swapped),
    /// The shadow had not caught up.
    Behind(Behind),
    /// Rows were changed by hand between the look and the locks.
    Changed,
}

/// The swap. The models are compared beforehand, and the live one stands still for what has changed since. Reads continue;
/// at most they wait for the moment in which the tables are renamed.
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
        unwatch(conn).await;
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
    let progress = Progress::new("counting the aggregates", "aggregate");
    let comparison = Comparison { live: &live.consumer, shadow: &shadow.consumer };
    let far = Look::at(conn, &comparison, false).await?.counts();
    if far.behind > NEARLY {
        bail!(refusal(&Behind { behind: far.behind, examples: far.examples }));
    }
    // For the plans of those who read it from the first moment on.
    sqlx::query("ANALYZE score_shadow.person, score_shadow.entry").execute(&mut *conn).await?;
    let swapped = compared(conn, &live, &shadow, &progress, dry_run).await;
    unwatch(conn).await;
    let Swapped { difference, published, stood_still } = swapped?;
    if let (false, Some(queue)) = (dry_run, &shadow.queue) {
        finish(conn, broker, queue).await?;
    }
    drop(progress);
    let now_live = if dry_run { &live.consumer } else { &shadow.consumer };
    let answer = json!({"live": now_live, "swapped": !dry_run, "published": published,
                        "difference": difference, "ahead": difference.apart,
                        "stood_still_seconds": stood_still.as_secs_f64()});
    args.common.answer(&answer, || {
        let events = many(i64::try_from(published).unwrap_or(i64::MAX), "event");
        let mut text = difference.text();
        if difference.apart > 0 {
            let persons = many(difference.apart, "person");
            let _ =
                writeln!(text, "the shadow has later events of {persons}; what they change is published too");
        }
        if dry_run {
            return format!("{text}{events} would be published, and {} would be live", shadow.consumer);
        }
        format!(
            "{text}{events} published, and {now_live} is live; {} is kept in the schema score_old until\n  \
             score-projector rebuild drop",
            live.consumer
        )
    })?;
    Ok(Verdict::Ok)
}

/// Compares the models while everybody goes on, and exchanges them.
async fn compared(
    conn: &mut PgConnection,
    live: &StoredModel,
    shadow: &StoredModel,
    progress: &Progress,
    dry_run: bool,
) -> anyhow::Result<Swapped> {
    let comparison = Comparison { live: &live.consumer, shadow: &shadow.consumer };
    progress.step("waiting for the writers", "attempt");
    remember(conn).await?;
    watch(conn).await?;
    comparison.models(conn, progress).await?;
    comparison.chains(conn, progress).await?;
    comparison.catch_up(conn, progress).await?;
    carry::before(conn, &comparison, progress, dry_run).await?;

    let (mut locked, mut caught_up, mut stalled, mut nearest) = (0, 0, 0, i64::MAX);
    loop {
        comparison.catch_up(conn, progress).await?;
        progress.step("exchanging the models", "attempt");
        let pauses = match exchange(conn, live, shadow, dry_run).await {
            Ok(Attempt::Done(swapped)) => return Ok(swapped),
            Ok(Attempt::Behind(behind)) => {
                caught_up += 1;
                stalled = if behind.behind < nearest { 0 } else { stalled + 1 };
                nearest = nearest.min(behind.behind);
                if stalled >= STALLED || caught_up >= CATCH_UPS {
                    bail!(refusal(&behind));
                }
                caught_up
            }
            Ok(Attempt::Changed) if locked < LOCK_ATTEMPTS => {
                locked += 1;
                locked
            }
            Ok(Attempt::Changed) => bail!(
                "another session changes the rows of the read model by hand; run this again when it has ended"
            ),
            Err(error) if locked < LOCK_ATTEMPTS && error.downcast_ref().is_some_and(is_lock) => {
                locked += 1;
                if locked % 10 == 0 {
                    eprintln!("another session holds a lock on the read model; {locked} attempts so far");
                }
                locked
            }
            Err(error) => return Err(error),
        };
        pause(pauses).await;
    }
}

/// Everything in one transaction.
async fn exchange(
    conn: &mut PgConnection,
    live: &StoredModel,
    shadow: &StoredModel,
    dry_run: bool,
) -> anyhow::Result<Attempt> {
    const TABLES: [&str; 4] = ["score.person", "score.entry", "score_shadow.person", "score_shadow.entry"];
    let comparison = Comparison { live: &live.consumer, shadow: &shadow.consumer };
    let mut tx = Connection::begin(&mut *conn).await?;
    // Or the locks below would wait for it, and the live model with them.
    without_vacuum(&mut tx, &TABLES).await?;
    limit_locks(&mut tx).await?;
    sqlx::query("SET LOCAL work_mem = '64MB'").execute(&mut *tx).await?;
    same_shape(&mut tx).await?;
    // The live model stands still from here on; the shadow catches up with where it stands.
    take(&mut tx, "live", live).await?;
    let since = Instant::now();
    loop {
        comparison.again(&mut tx, None).await?;
        let behind = behind(&mut tx, &comparison).await?;
        if behind.behind == 0 {
            break;
        }
        if since.elapsed() > CATCH_UP {
            tx.rollback().await?;
            return Ok(Attempt::Behind(behind));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    take(&mut tx, "shadow", shadow).await?;
    comparison.again(&mut tx, None).await?;

    let difference =
        difference(&mut tx, &comparison).await.context("the two models could not be compared")?;
    let published = emit::differences(&mut tx).await?;
    carry::over(&mut tx, &comparison).await?;
    if dry_run {
        tx.rollback().await?;
        return Ok(Attempt::Done(Swapped { difference, published, stood_still: since.elapsed() }));
    }
    lock_tables(&mut tx, &TABLES).await?;
    // Writers by hand do not lock the model's row.
    let changed: bool =
        sqlx::query_scalar("SELECT EXISTS (SELECT FROM score.changed_person)").fetch_one(&mut *tx).await?;
    if changed {
        tx.rollback().await?;
        return Ok(Attempt::Changed);
    }
    sqlx::query("SELECT score.forget_changes_of(to_regclass(name)) FROM unnest($1::text[]) AS name")
        .bind(TABLES.map(str::to_owned))
        .execute(&mut *tx)
        .await?;
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
    Ok(Attempt::Done(Swapped { difference, published, stood_still: since.elapsed() }))
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
async fn lock_tables(tx: &mut Transaction<'_, Postgres>, tables: &[&str]) -> anyhow::Result<()> {
    let sql = format!("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE", tables.join(", "));
    for attempt in 1.. {
        let mut savepoint = tx.begin().await?;
        match sqlx::raw_sql(AssertSqlSafe(&*sql)).execute(&mut *savepoint).await {
            Ok(_) => {
                savepoint.commit().await?;
                break;
            }
            Err(error) if is_lock(&error) && attempt < TABLE_ATTEMPTS => {
                savepoint.rollback().await?;
                pause(attempt).await;
            }
            // The live model goes on, and the swap tries once more.
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

fn refusal(behind: &Behind) -> String {
    format!(
        "the shadow is behind the live model with {}, so it may not take its place yet:\n  {}\n\
         score-projector rebuild status says how far it is",
        many(behind.behind, "aggregate"),
        behind.examples.join("\n  ")
    )
}
