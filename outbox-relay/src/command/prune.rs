//! `prune`: empties partitions that need not be kept, now.

use std::{fmt::Write, time::Duration};

use anyhow::Context;
use daemon::{progress::Progress, shutdown::Shutdown};
use serde_json::json;
use sqlx::PgConnection;

use super::{CommandArgs, Verdict, connect};
use crate::partition::{self, Partition, Retention};

/// Looking for baselines reads an index over a whole partition.
const STATEMENT_TIMEOUT: Duration = Duration::from_mins(10);
/// How long a partition is tried while a session uses it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Settings of `prune`.
#[derive(Debug, clap::Args)]
pub struct PruneArgs {
    /// The database, and the form of the answer.
    #[command(flatten)]
    pub common: CommandArgs,
    /// Keep what is younger than this.
    #[arg(long, env = "KEEP", value_parser = daemon::config::duration, value_name = "DURATION")]
    pub keep: Duration,
    /// Also where an aggregate has no newer baseline: its history cannot be replayed then.
    #[arg(long)]
    pub without_baseline: bool,
    /// Only say what would be done.
    #[arg(long)]
    pub dry_run: bool,
}

/// Retires partitions, the oldest first, up to the first that must be kept, and says why that one must. Ctrl-C ends it
/// before the next one.
pub async fn prune(args: &PruneArgs) -> anyhow::Result<Verdict> {
    let mut conn = connect(&args.common, "prune", STATEMENT_TIMEOUT).await?;
    let shutdown = Shutdown::on_signals()?;
    let mut partitions = Vec::new();
    let work = retire(&mut conn, args, &mut partitions);
    let finished = match shutdown.requested().run_until_cancelled(work).await {
        None => false,
        Some(done) => {
            done.with_context(|| {
                format!(
                    "not everything could be retired; {}what was retired is gone, and prune can be run again",
                    text(&partitions, args.dry_run).replace('\n', "; ")
                )
            })?;
            true
        }
    };
    let document = json!({"dry_run": args.dry_run, "finished": finished, "partitions": partitions});
    args.common.answer(&document, || {
        let mut text = text(&partitions, args.dry_run);
        if !finished {
            text.push_str(
                "interrupted; of the partition that was under way it is not known whether it was retired: run prune \
                 again to go on",
            );
        } else if text.is_empty() {
            text.push_str("there is nothing to retire");
        }
        text
    })?;
    let well = finished && !partitions.iter().any(|partition| partition.in_use);
    Ok(if well { Verdict::Ok } else { Verdict::Attention })
}

async fn retire(conn: &mut PgConnection, args: &PruneArgs, done: &mut Vec<Partition>) -> anyhow::Result<()> {
    let said = Progress::new("looking at partitions", "partition");
    let candidates = partition::candidates(conn).await?;
    let all = candidates.len() as u64;
    let mut retention = Retention::new(args.keep, args.without_baseline, args.dry_run, PATIENCE);
    for (n, candidate) in (0..).zip(candidates) {
        said.at(n, all);
        let partition = retention.one(conn, candidate).await?;
        let ends = partition.ends();
        done.push(partition);
        if ends {
            break;
        }
    }
    Ok(())
}

fn text(partitions: &[Partition], dry_run: bool) -> String {
    let done = if dry_run { "would be retired" } else { "retired" };
    let mut text = String::new();
    for partition in partitions {
        let fate = partition.kept.as_ref().map_or(done.to_owned(), |reason| format!("kept: {reason}"));
        let _ = writeln!(text, "{}: {fate}", partition.name);
    }
    text
}
