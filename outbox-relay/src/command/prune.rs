//! `prune`: empties partitions that need not be kept, now.

use std::{fmt::Write, time::Duration};

use anyhow::Context;
use serde_json::json;

use super::{CommandArgs, Verdict, connect};
use crate::partition;

/// Looking for baselines reads an index over a whole partition.
const STATEMENT_TIMEOUT: Duration = Duration::from_mins(10);

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

/// Retires partitions, the oldest first, up to the first that must be kept, and says why that one must.
pub async fn prune(args: &PruneArgs) -> anyhow::Result<Verdict> {
    let mut conn = connect(&args.common, "prune", STATEMENT_TIMEOUT).await?;
    let partitions = partition::retire(&mut conn, args.keep, args.without_baseline, args.dry_run)
        .await
        .context("not everything could be retired; what was is gone, and prune can be run again")?;
    args.common.answer(&json!({"dry_run": args.dry_run, "partitions": partitions}), || {
        let done = if args.dry_run { "would be retired" } else { "retired" };
        let mut text = String::new();
        for partition in &partitions {
            let fate = partition.kept.as_ref().map_or(done.to_owned(), |reason| format!("kept: {reason}"));
            let _ = writeln!(text, "{}: {fate}", partition.name);
        }
        if text.is_empty() { "there is nothing to retire".to_owned() } else { text }
    })?;
    Ok(Verdict::Ok)
}
