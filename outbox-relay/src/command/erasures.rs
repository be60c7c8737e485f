//! `erasures`: which ended aggregates are still being erased, and how far each is.

use std::{fmt::Write, time::Duration};

use anyhow::Context;
use chrono::{DateTime, Utc};
use daemon::{progress::Progress, shutdown::Shutdown};
use serde::Serialize;
use serde_json::json;
use sqlx::PgConnection;

use super::{CommandArgs, Verdict, connect, time};
use crate::erasure::{self, Size};

/// A step ends itself well before.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);
/// At most so many rows are read.
const MAX_ROWS: i64 = 1_000;

/// Settings of `erasures`.
#[derive(Debug, clap::Args)]
pub struct ErasuresArgs {
    /// The database, and the form of the answer.
    #[command(flatten)]
    pub common: CommandArgs,
    /// Erase what is left now, step by step, instead of leaving it to a running relay.
    #[arg(long)]
    pub finish: bool,
    /// With --finish: a step rewrites so many events of one aggregate at most.
    #[arg(long, env = "ERASURE_STEP", default_value = "1000", value_parser = clap::value_parser!(i64).range(1..=100_000), value_name = "COUNT")]
    pub erasure_step: i64,
}

/// An erasure that is not complete.
#[derive(Debug, Serialize, sqlx::FromRow)]
struct Erasure {
    aggregate_type: String,
    aggregate_id: String,
    below: i64,
    done_version: i64,
    erased: i64,
    asked_at: DateTime<Utc>,
    worked_at: Option<DateTime<Utc>>,
}

/// Takes step after step until nothing is left, or until it is interrupted: then what is left is shown.
async fn finish(conn: &mut PgConnection, most: i64) -> anyhow::Result<()> {
    const AGAIN: &str =
        "not everything could be erased; what was is gone, and erasures --finish can be run again";
    let shutdown = Shutdown::on_signals()?;
    let said = Progress::new("erasing", "event");
    let versions = "SELECT coalesce(sum(below - done_version - 1), 0)::bigint FROM outbox.erasure";
    let all: i64 = sqlx::query_scalar(versions).fetch_one(&mut *conn).await.context(AGAIN)?;
    let (mut size, mut done) = (Size::new(most), 0);
    while !shutdown.requested().is_cancelled() {
        let Some(step) = erasure::step(conn, &mut size).await.context(AGAIN)? else { break };
        done += step.erased.unsigned_abs();
        said.at(done, all.unsigned_abs().max(done));
    }
    Ok(())
}

/// Shows what is left, after erasing it where that was asked.
pub async fn erasures(args: &ErasuresArgs) -> anyhow::Result<Verdict> {
    let mut conn = connect(&args.common, "erasures", STATEMENT_TIMEOUT).await?;
    if args.finish {
        finish(&mut conn, args.erasure_step).await?;
    }
    let left: Vec<Erasure> = sqlx::query_as(
        "SELECT aggregate_type, aggregate_id, below, done_version, erased, asked_at, worked_at
         FROM outbox.erasure ORDER BY id LIMIT $1",
    )
    .bind(MAX_ROWS)
    .fetch_all(&mut conn)
    .await
    .context("the erasures could not be read")?;
    args.common.answer(&json!({"erasures": left}), || {
        if left.is_empty() {
            return "nothing is left to be erased".to_owned();
        }
        left.iter().fold(String::new(), |mut text, erasure| {
            let Erasure { aggregate_type, aggregate_id, below, done_version, erased, worked_at, .. } = erasure;
            let step = worked_at.map_or_else(
                || "no step was taken yet".to_owned(),
                |at| format!("the last step was on {}", time(Some(at))),
            );
            let _ = writeln!(
                text,
                "{aggregate_type}/{aggregate_id}: ended at version {below} on {}; rewritten up to version {done_version} \
                 ({erased} events); {step}",
                time(Some(erasure.asked_at)),
            );
            text
        })
    })?;
    Ok(if left.is_empty() { Verdict::Ok } else { Verdict::Attention })
}
