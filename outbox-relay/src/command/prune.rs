//! `prune`: empties partitions that need not be kept, now.

use std::{
    fmt::Write,
    time::{Duration, Instant},
};

use anyhow::Context;
use daemon::{progress::Progress, shutdown::Shutdown};
use serde::Serialize;
use serde_json::json;
use sqlx::PgConnection;

use super::{
    CommandArgs, Verdict,
    confirm::{self, can_ask},
    connect, many, span,
};
use crate::partition::{self, Candidate, Keeper, Retention};

/// Looking for baselines reads an index over a whole partition.
const STATEMENT_TIMEOUT: Duration = Duration::from_mins(10);
/// How long a partition is tried while a session uses it, and how long a relay is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// How soon it looks again while a relay is at it.
const AGAIN: Duration = Duration::from_millis(100);
/// So many aggregates that keep a partition are named.
const NAMED: usize = 5;
/// Positions of a partition that is made because writers begin the next one, and there is none.
const NEXT_SIZE: i64 = 1_000_000;

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
    /// With --without-baseline: do not ask. Without this the command asks on a terminal before it retires what cannot be
    /// replayed again; elsewhere it says what it would retire, with exit code 3.
    #[arg(long)]
    pub yes: bool,
}

/// What becomes of a partition.
#[derive(Debug, Serialize)]
struct Fate {
    name: String,
    /// The first position after it; none for the net.
    upper: Option<i64>,
    /// Why its events are kept; none when they may be, or were, retired.
    kept: Option<String>,
    /// What to do about it.
    advice: Option<String>,
    /// Aggregates in it without a newer baseline, some of them.
    without_baseline: Vec<String>,
    /// There are more of those.
    and_more: bool,
    /// A session uses it, for now.
    #[serde(skip)]
    in_use: bool,
}

/// What is done, as far as it has come.
#[derive(Debug, Default)]
struct Pruned {
    /// The partition that writers filled for long enough, and whether they have begun the next one.
    ended: Option<String>,
    /// The oldest first.
    partitions: Vec<Fate>,
    /// Each of `partitions` is told; otherwise it was interrupted.
    finished: bool,
    /// What cannot be replayed again may be retired, or there is none of it.
    confirmed: bool,
}

/// Retires partitions, the oldest first, up to the first that must be kept, and says of each that is left why it is. Ctrl-C
/// ends it before the next one.
pub async fn prune(args: &PruneArgs) -> anyhow::Result<Verdict> {
    let mut conn = connect(&args.common, "prune", STATEMENT_TIMEOUT).await?;
    let shutdown = Shutdown::on_signals()?;
    let stop = shutdown.requested();
    let retention = Retention::new(args.keep, args.without_baseline, PATIENCE);
    let mut pruned = Pruned { confirmed: true, ..Pruned::default() };
    let looked = stop.run_until_cancelled(look(&mut conn, &retention, args, &mut pruned)).await;
    let looked = looked.transpose().context("nothing was retired")?.is_some();
    let lost: Vec<&Fate> =
        pruned.partitions.iter().filter(|f| f.kept.is_none() && !f.without_baseline.is_empty()).collect();
    if looked && !args.dry_run && !args.yes && !lost.is_empty() {
        pruned.confirmed = can_ask()
            && confirm::confirmed(&question(&lost), stop).await.context("the answer could not be read")?;
    }
    if looked && (args.dry_run || !pruned.confirmed) {
        pruned.finished = true;
    } else if looked {
        let work = retire(&mut conn, &retention, &mut pruned.partitions);
        pruned.finished = match stop.run_until_cancelled(work).await {
            None => false,
            Some(done) => {
                done.with_context(|| {
                    format!(
                        "not everything could be retired; {}what was retired is gone, and prune can be run again",
                        pruned.text(args).replace('\n', "; ")
                    )
                })?;
                true
            }
        };
    }
    let document = json!({
        "dry_run": args.dry_run, "finished": pruned.finished, "confirmed": pruned.confirmed, "ended": pruned.ended,
        "partitions": pruned.partitions,
    });
    args.common.answer(&document, || {
        let mut text = pruned.text(args);
        if !pruned.finished {
            text.push_str(
                "interrupted; of the partition that was under way it is not known whether it was retired: run prune \
                 again to go on",
            );
        } else if text.is_empty() {
            text.push_str("there is nothing to retire");
        } else if !pruned.confirmed {
            text.push_str("nothing was retired: add --yes to give up the history of those aggregates");
        }
        text
    })?;
    let well = pruned.finished && pruned.confirmed && !pruned.partitions.iter().any(|fate| fate.in_use);
    Ok(if well { Verdict::Ok } else { Verdict::Attention })
}

/// Lets writers begin the next partition if it is time, and finds out what is to become of each.
async fn look(
    conn: &mut PgConnection,
    retention: &Retention,
    args: &PruneArgs,
    pruned: &mut Pruned,
) -> anyhow::Result<()> {
    pruned.ended = begin_next(conn, args).await?;
    let said = Progress::new("looking at partitions", "partition");
    let candidates = partition::candidates(conn).await?;
    let all = candidates.len() as u64;
    // The first that must stay: the baselines of its aggregates may lie in any above it.
    let mut first_kept: Option<String> = None;
    for (n, Candidate { name, upper }) in (0..).zip(candidates) {
        said.at(n, all);
        let most = i32::try_from(NAMED + 1)?;
        let keeper = retention.keeper(conn, &name, most).await?;
        let mut fate = Fate::new(name, upper, keeper, args);
        match &first_kept {
            Some(older) if fate.kept.is_none() && upper.is_some() => {
                fate.kept = Some(format!("{older} is older, and is kept"));
                fate.advice = Some("it goes once that one is gone".to_owned());
            }
            None if fate.kept.is_some() && upper.is_some() => first_kept = Some(fate.name.clone()),
            _ => {}
        }
        pruned.partitions.push(fate);
    }
    Ok(())
}

/// Lets writers begin the next partition if it is time, and returns which one has ended. A relay may be at it just now.
async fn begin_next(conn: &mut PgConnection, args: &PruneArgs) -> anyhow::Result<Option<String>> {
    let began = Instant::now();
    loop {
        let in_use = partition::in_use(conn, Some(args.keep)).await?;
        if !in_use.is_due {
            return Ok(None);
        } else if args.dry_run {
            return Ok(Some(in_use.name));
        }
        if !in_use.has_next {
            sqlx::query("SELECT outbox.add_partition($1)").bind(NEXT_SIZE).execute(&mut *conn).await?;
        }
        let ended = partition::begin_next(conn, Some(args.keep)).await?;
        if ended.is_some() || began.elapsed() >= PATIENCE {
            return Ok(ended);
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Retires what nothing keeps. What a session uses ends it: the older ones go first.
async fn retire(conn: &mut PgConnection, retention: &Retention, fates: &mut [Fate]) -> anyhow::Result<()> {
    let said = Progress::new("retiring partitions", "partition");
    let all = fates.len() as u64;
    let mut used: Option<String> = None;
    for (n, fate) in (0..).zip(fates.iter_mut().filter(|fate| fate.kept.is_none())) {
        said.at(n, all);
        if let Some(older) = &used {
            fate.kept = Some(format!("{older} is older, and is kept"));
            continue;
        }
        fate.kept = retention.retire(conn, &fate.name).await?;
        fate.in_use = fate.kept.is_some();
        if fate.in_use && fate.upper.is_some() {
            used = Some(fate.name.clone());
        }
    }
    Ok(())
}

impl Fate {
    fn new(name: String, upper: Option<i64>, keeper: Option<Keeper>, args: &PruneArgs) -> Self {
        let Some(Keeper { kind, reason, mut aggregates }) = keeper else {
            return Self {
                name,
                upper,
                kept: None,
                advice: None,
                without_baseline: Vec::new(),
                and_more: false,
                in_use: false,
            };
        };
        let and_more = aggregates.len() > NAMED;
        aggregates.truncate(NAMED);
        let lacking = kind == "lacking";
        let kept = match (lacking, args.without_baseline) {
            (true, true) => None,
            (true, false) => Some(format!("{reason}: {}", names(&aggregates, and_more))),
            _ => Some(reason),
        };
        let advice = kept.as_ref().and_then(|_| advice(&kind, args.keep));
        Self { name, upper, kept, advice, without_baseline: aggregates, and_more, in_use: false }
    }
}

/// What to do about what keeps a partition.
fn advice(kind: &str, keep: Duration) -> Option<String> {
    Some(match kind {
        "in use" => format!(
            "nothing: writers begin the next one when this has been in use for {}",
            span(partition::in_use_for(keep).as_secs_f64())
        ),
        "unread" => "start a relay: outbox-relay run".to_owned(),
        "unsettled" => {
            "start that relay; if the name is no longer used, run outbox-relay forget NAME".to_owned()
        }
        "parked" => "see outbox-relay parked list".to_owned(),
        "replayed" => "wait for its end".to_owned(),
        "young" => "wait, or choose a smaller --keep".to_owned(),
        "lacking" => {
            "publish a baseline of each (of captured tables: outbox-relay backfill TYPE), or give up their \
                      history with --without-baseline"
                .to_owned()
        }
        _ => return None,
    })
}

fn names(aggregates: &[String], and_more: bool) -> String {
    format!("{}{}", aggregates.join(", "), if and_more { " and more" } else { "" })
}

fn question(lost: &[&Fate]) -> String {
    let mut text = String::new();
    for Fate { name, without_baseline, and_more, .. } in lost {
        let _ = writeln!(text, "{name}: without a newer baseline: {}", names(without_baseline, *and_more));
    }
    let _ = write!(
        text,
        "Retire {}, so that the history of these aggregates cannot be replayed any more?",
        many(lost.len() as u64, "partition")
    );
    text
}

impl Pruned {
    fn text(&self, args: &PruneArgs) -> String {
        let would = args.dry_run || !self.confirmed;
        let mut text = String::new();
        if let Some(name) = &self.ended {
            let begin = if args.dry_run { "would begin" } else { "begin" };
            let _ = writeln!(text, "{name}: writers {begin} the next partition");
        }
        for fate in &self.partitions {
            let _ = write!(text, "{}: ", fate.name);
            let _ = match &fate.kept {
                Some(reason) => write!(text, "kept: {}", escape::line(reason)),
                None if would => write!(text, "would be retired"),
                None => write!(text, "retired"),
            };
            if fate.kept.is_none() && !fate.without_baseline.is_empty() {
                let names = names(&fate.without_baseline, fate.and_more);
                let _ = write!(text, "; without a newer baseline: {}", escape::line(&names));
            }
            text.push('\n');
            if let Some(advice) = &fate.advice {
                let _ = writeln!(text, "  -> {advice}");
            }
        }
        text
    }
}
