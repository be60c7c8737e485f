//! `make bench-history`: the system as it is after years. Fills private servers with a history, and runs every command and
//! every request beside writers: what does each cost, whom does it stop, and does it grow with the history?

mod alone;
mod cost;
mod fill;
mod operation;
mod order;
mod pace;
mod process;
mod run;
mod sequence;
mod table;
mod watch;
mod writers;

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use anyhow::{Context, bail};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use tokio::time::Instant;

use self::{
    fill::History,
    run::{Apis, Run},
    table::{Measured, Report},
};
use crate::{files, machine::machine, memory::peak_of, testbed::Testbed, wait};
use devstack::{
    folder::Folder, program::Program, say, servers::Setup, show, shutdown::Shutdown, stack::Stack,
};

/// The role whose statements are those of the operations.
const OPERATOR: &str = "history_operator";

/// While it is filled, nothing has to survive, and rows need no log.
const FILLING: Setup = Setup {
    settings: &[
        "shared_preload_libraries=pg_stat_statements,auto_explain",
        "wal_level=minimal",
        "max_wal_senders=0",
        "max_wal_size=4GB",
        "checkpoint_timeout=1h",
        "shared_buffers=1GB",
        "maintenance_work_mem=256MB",
    ],
    ..Setup::PASSING
};
/// As in production.
const MEASURING: &[&str] = &[
    "shared_preload_libraries=pg_stat_statements,auto_explain",
    "fsync=on",
    "full_page_writes=on",
    "max_wal_size=4GB",
    "shared_buffers=1GB",
    "track_activity_query_size=16384",
];

/// The arguments of `bench history`.
#[derive(Clone, Debug, clap::Args)]
pub struct HistoryArgs {
    /// A history of 200,000 events, next to one of 20,000. Times are not held against anything, and docs/proof/history.md is
    /// not written. A debug build may run it.
    #[arg(long)]
    pub quick: bool,
    /// The length of the history. With the persons of many events it has 1.06 times as many.
    #[arg(long, value_name = "EVENTS")]
    pub events: Option<i64>,
    /// The length of the short history next to it.
    #[arg(long, value_name = "EVENTS")]
    pub short: Option<i64>,
    /// Only operations whose lines contain this; may be repeated. docs/proof/history.md is not written.
    #[arg(long, value_name = "TEXT")]
    pub only: Vec<String>,
    /// Also write everything as JSON to this file.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the plans of all statements that take longer than half a second, with their buffers, to this file.
    #[arg(long, value_name = "FILE")]
    pub plans: Option<PathBuf>,
    /// How many seconds an operation may take.
    #[arg(long, value_name = "SECONDS")]
    pub limit: Option<u64>,
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
struct Length {
    /// An operation, and one that is sampled.
    limits: [Duration; 2],
    /// The programs, watched while they have nothing to do.
    alone: Duration,
}

/// Measures. Exit code 1: something grows, is missed, or failed.
pub async fn run(args: &HistoryArgs) -> anyhow::Result<u8> {
    if cfg!(debug_assertions) && !args.quick {
        bail!("this is a debug build, which is many times slower: run make bench-history");
    }
    let checkout = devstack::command::checkout()?;
    sequence::every_command()?;
    let shutdown = Shutdown::watch()?;
    let measured = async {
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let (short, long) = if args.quick { (20_000, 200_000) } else { (100_000, 10_000_000) };
        let (short, long) = (args.short.unwrap_or(short), args.events.unwrap_or(long));
        let (short, long) = (Box::pin(one(args, short, &load)), Box::pin(one(args, long, &load)));
        // No time counts in a quick run, so both go on at once.
        let ((short, _), (long, machine)) =
            if args.quick { tokio::try_join!(short, long)? } else { (short.await?, long.await?) };
        anyhow::Ok(Report { quick: args.quick, machine, short, long })
    };
    let Some(report) = shutdown.requested.run_until_cancelled(Box::pin(measured)).await else {
        bail!("the bench was interrupted");
    };
    let report = report?;
    show(&format!("\n{}\n", report.page()));
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if !args.quick && args.only.is_empty() {
        files::write_into("make bench-history", &report.page(), &checkout.join("docs/proof/history.md"))?;
        say("the tables in docs/proof/history.md are written");
    }
    let broken = report.broken();
    for line in &broken {
        say(line);
    }
    Ok(u8::from(!broken.is_empty()))
}

/// One length of history, on servers of its own.
async fn one(
    args: &HistoryArgs,
    scale: i64,
    load: &str,
) -> anyhow::Result<(Measured, Vec<(&'static str, String)>)> {
    let history = History::of(scale);
    let mut stack = Stack::prepare(Folder::temporary()?, FILLING).await?;
    let begin = Instant::now();
    say(&format!("filling in {} events", history.scale));
    Box::pin(history.fill(&stack)).await?;
    let filled_in = begin.elapsed().as_secs_f64();
    say(&format!("filled in {filled_in:.0} s"));
    if !args.quick {
        stack.servers.postgres.stop(&tokio_util::sync::CancellationToken::new()).await;
        stack.servers.postgres.set(MEASURING);
        stack.servers.postgres.start().await?;
    }
    let limit = Duration::from_secs(args.limit.unwrap_or(if args.quick { 60 } else { 300 }));
    let length = Length {
        limits: [limit, sample(args.quick, scale)],
        alone: Duration::from_secs(if args.quick { 8 } else { 60 }),
    };
    let measured = Box::pin(measure(args, &mut stack, history, length)).await;
    if let Some(plans) = &args.plans {
        let log = stack.folder().path().join("log/postgres.log");
        std::fs::copy(&log, plans)
            .with_context(|| format!("cannot copy {} to {}", log.display(), plans.display()))?;
    }
    let mut testbed = Testbed { stack, size: crate::scale::Scale::QUICK, load: load.trim().to_owned() };
    let machine = machine(&testbed).await;
    for program in testbed.stack.programs() {
        program.kill().await;
    }
    testbed.stop().await;
    Ok((Measured { filled_in, ..measured? }, machine?))
}

/// How long a sample is. A long history begins with persons of many events: the sample has to come past them.
fn sample(quick: bool, scale: i64) -> Duration {
    let seconds = if quick { (scale / 500_000).clamp(2, 30) } else { 30 };
    Duration::from_secs(seconds.unsigned_abs())
}

async fn measure(
    args: &HistoryArgs,
    stack: &mut Stack,
    history: History,
    length: Length,
) -> anyhow::Result<Measured> {
    let (bytes, blocks, partitions) = operator(stack, args.plans.is_some()).await?;
    let [mut person, _, _, _, mut score] = stack.programs_on(["person", "score"], "%2f")?;
    for (program, database) in [(&mut person, "person"), (&mut score, "score")] {
        let url = format!("{}/{database}", stack.servers.postgres.url_of(OPERATOR));
        program.set_env("DATABASE_URL", &url);
    }
    let mut run = Run {
        stack,
        apis: Apis { person, score },
        writers: None,
        names: BTreeMap::new(),
        limits: length.limits,
        only: &args.only,
        done: Vec::new(),
    };
    for program in [&mut run.apis.person, &mut run.apis.score] {
        program.start().await?;
        program.ready(wait::READY_TIMEOUT).await?;
    }
    let order::Beside { alone, relay_rate } = Box::pin(order::all(&mut run, history, length)).await?;
    let peak = |program: &mut Program| {
        let pid = program.process()?.pid();
        Some((program.name().to_owned(), peak_of(pid)?))
    };
    let memory = run.stack.programs().into_iter().filter_map(peak).collect();
    for program in [&mut run.apis.person, &mut run.apis.score] {
        program.kill().await;
    }
    let outcomes = run.done;
    let scale = history.scale;
    Ok(Measured { scale, filled_in: 0.0, bytes, blocks, partitions, outcomes, relay_rate, alone, memory })
}

/// Makes the role of the operations, and says how large the databases are.
async fn operator(stack: &Stack, plans: bool) -> anyhow::Result<(i64, i64, i64)> {
    let url = stack.servers.postgres.url();
    let mut conn = PgConnection::connect(&format!("{url}/person")).await?;
    let password = &stack.folder().secrets().postgres;
    let role = format!("CREATE ROLE {OPERATOR} SUPERUSER LOGIN PASSWORD '{password}'");
    conn.execute(AssertSqlSafe(role)).await?;
    if plans {
        for (name, value) in [
            ("log_min_duration", "500"),
            ("log_analyze", "on"),
            ("log_timing", "off"),
            ("log_buffers", "on"),
            ("log_nested_statements", "on"),
        ] {
            conn.execute(AssertSqlSafe(format!("ALTER SYSTEM SET auto_explain.{name} = '{value}'"))).await?;
        }
        conn.execute("SELECT pg_reload_conf()").await?;
    }
    let mut score = PgConnection::connect(&format!("{url}/score")).await?;
    for conn in [&mut conn, &mut score] {
        conn.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements").await?;
    }
    score.close().await?;
    let size = sqlx::query_as(
        "SELECT pg_database_size('person') + pg_database_size('score'),
                (SELECT sum(c.relpages)::bigint FROM pg_partition_tree('outbox.event') t JOIN pg_class c ON c.oid = t.relid),
                (SELECT count(*) FROM outbox.partition WHERE NOT is_default)",
    )
    .fetch_one(&mut conn)
    .await?;
    conn.close().await?;
    Ok(size)
}
