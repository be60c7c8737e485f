//! `republish`: publishes the whole score of persons once more, as baselines, beside a running projector. For subscribers to
//! `score.*` after the score database was restored, and for those that begin late.

use std::time::Duration;

use anyhow::{Context, anyhow};
use daemon::shutdown::Shutdown;
use events::{ScoreBaseline, ScoreBaselineEntry};
use outbox::{
    AppendError,
    database::{Failure, describe},
};
use serde_json::json;
use sqlx::{Connection, PgConnection, Postgres, Transaction};
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    batch::entry::{Entry, ScoreEvent},
    command::{CommandArgs, STATEMENT_TIMEOUT, Verdict, many},
    publish, schema, store,
};

/// The largest number of persons in a transaction, which locks their chains.
const BATCH: i64 = 100;
/// How long a batch waits for a lock, so that it keeps the projector waiting for no longer.
const LOCK_TIMEOUT: &str = "SET lock_timeout = '250ms'";
/// After how many failed waits in a row the command gives up.
const ATTEMPTS: usize = 40;
/// The pause after a failed wait.
const PAUSE: Duration = Duration::from_millis(100);

/// Settings of `republish`.
#[derive(Debug, clap::Args)]
pub struct RepublishArgs {
    /// The database, and the form of the result.
    #[command(flatten)]
    pub common: CommandArgs,
    /// Which persons.
    #[command(flatten)]
    pub selection: Selection,
    /// With --all: the maximum number of persons per second.
    #[arg(long, default_value = "500", value_parser = clap::value_parser!(u32).range(1..))]
    pub rate: u32,
    /// With --all: only the persons after this one, in the order of their ids. An interrupted run names it.
    #[arg(long, value_name = "UUID", conflicts_with = "person")]
    pub after: Option<Uuid>,
}

/// The persons whose score is published.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct Selection {
    /// All persons of whom a score was ever published, in the order of their ids. Ctrl-C ends the command after the
    /// current batch.
    #[arg(long)]
    pub all: bool,
    /// The person with this id.
    #[arg(long, value_name = "UUID")]
    pub person: Option<Uuid>,
}

/// Appends baselines, and prints how many.
pub async fn republish(args: &RepublishArgs) -> anyhow::Result<Verdict> {
    let mut conn =
        args.common.connect("score-projector republish", &schema::needed(), STATEMENT_TIMEOUT).await?;
    publish::hand_over_chains(&mut conn).await.map_err(|error| anyhow!(publish::reason(&error)))?;
    sqlx::query(LOCK_TIMEOUT).execute(&mut conn).await.map_err(|error| failed(&error))?;
    let stop = Shutdown::on_signals()?;
    let stop = stop.requested();
    let (mut last, mut persons) = (args.after, 0_u64);
    let began = Instant::now();
    let finished = loop {
        let (page, published) = batch(&mut conn, args.selection.person, last).await.with_context(|| {
            let after = last.map_or_else(String::new, |last| format!("; go on with --after {last}"));
            format!("stopped after {}{after}", many(i64::try_from(persons).unwrap_or(i64::MAX), "person"))
        })?;
        persons += published;
        let Some(end) = page else { break true };
        last = Some(end);
        if args.selection.person.is_some() {
            break true;
        }
        let due = began + Duration::from_millis(persons.saturating_mul(1_000) / u64::from(args.rate));
        if stop.run_until_cancelled(tokio::time::sleep_until(due)).await.is_none() {
            break false;
        }
    };
    let result = json!({"finished": finished, "persons": persons, "last": last});
    args.common.answer(&result, || {
        let persons = many(i64::try_from(persons).unwrap_or(i64::MAX), "person");
        match last {
            Some(last) if !finished => {
                format!("the scores of {persons} republished; interrupted: go on with --after {last}")
            }
            _ => format!("the scores of {persons} republished"),
        }
    })?;
    Ok(if finished && (persons > 0 || args.selection.all) { Verdict::Ok } else { Verdict::Attention })
}

/// Publishes the next persons after `last`, or `one`. Returns the last of them, and how many were published.
async fn batch(
    conn: &mut PgConnection,
    one: Option<Uuid>,
    last: Option<Uuid>,
) -> anyhow::Result<(Option<Uuid>, u64)> {
    let mut attempts = 0;
    loop {
        match attempt(conn, one, last).await {
            // The projector has locked one of them.
            Err(error) if is_locked(&error) && attempts < ATTEMPTS => {
                attempts += 1;
                tokio::time::sleep(PAUSE).await;
            }
            done => return done,
        }
    }
}

fn is_locked(error: &anyhow::Error) -> bool {
    let sqlx = error.chain().find_map(|cause| match cause.downcast_ref::<AppendError>() {
        Some(error) => error.database(),
        None => cause.downcast_ref::<sqlx::Error>(),
    });
    sqlx.is_some_and(|error| matches!(Failure::of(error), Failure::Locked | Failure::Conflict))
}

async fn attempt(
    conn: &mut PgConnection,
    one: Option<Uuid>,
    last: Option<Uuid>,
) -> anyhow::Result<(Option<Uuid>, u64)> {
    let mut tx = conn.begin().await?;
    let ids: Vec<Uuid> = sqlx::query_scalar(
        "SELECT aggregate_id::uuid FROM outbox.aggregate
         WHERE aggregate_type = $1 AND version > 0
           AND ($2::text IS NULL OR aggregate_id = $2) AND ($3::text IS NULL OR aggregate_id > $3)
         ORDER BY aggregate_id LIMIT $4",
    )
    .bind(events::AGGREGATE_SCORE)
    .bind(one.map(|id| id.to_string()))
    .bind(last.map(|id| id.to_string()))
    .bind(BATCH)
    .fetch_all(&mut *tx)
    .await?;
    // Whoever changes a score and publishes it takes this lock as well, and keeps it until the commit. So what the next
    // statement reads is the state at this version.
    let names: Vec<String> = ids.iter().map(Uuid::to_string).collect();
    let scores = names.iter().map(|id| (events::AGGREGATE_SCORE, id.as_str())).collect();
    outbox::lock_all(&mut tx, scores).await?;
    let Some(end) = ids.last().copied() else { return Ok((None, 0)) };
    // A chain whose person is gone has ended.
    let events = baselines(&mut tx, &ids).await?;
    let published = events.len() as u64;
    publish::append(&mut tx, events).await?;
    tx.commit().await?;
    Ok((Some(end), published))
}

/// The whole scores of those who are there.
async fn baselines(tx: &mut Transaction<'_, Postgres>, ids: &[Uuid]) -> anyhow::Result<Vec<ScoreEvent>> {
    let scores = store::scores(tx, "score", ids).await?;
    let baseline = |(id, (person, entries)): (Uuid, store::Score)| {
        let entry = |Entry { id, kind, value, score, created_at }| ScoreBaselineEntry {
            id,
            kind,
            value,
            score,
            created_at,
        };
        let entries = entries.into_values().map(entry).collect();
        ScoreEvent::baseline(&ScoreBaseline { id, cpf: person.cpf, total: person.total, entries })
    };
    scores.into_iter().map(|score| baseline(score).map_err(|refusal| anyhow!("{refusal}"))).collect()
}

/// The failure, without stored values, which are personal data.
fn failed(error: &sqlx::Error) -> anyhow::Error {
    anyhow!("the database failed: {}", describe(error))
}
