//! `republish`: everybody's whole state once more, as baselines, beside the running API.

pub(crate) mod baseline;

use std::{
    fmt::Write,
    io::{IsTerminal, Read},
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail};
use daemon::{
    config::{
        SettingError,
        command::{CommandArgs, Verdict, bar, many, operator},
    },
    shutdown::Shutdown,
};
use events::Cpf;
use outbox::database::Failure;
use serde_json::json;
use sqlx::{Connection, PgConnection};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::baseline::{Batch, Progress};
use crate::{schema, store::describe};

/// Persons of one batch at most.
const BATCH: i64 = 100;
/// A batch that holds its locks for longer is followed by one of half the size.
const MOMENT: Duration = Duration::from_millis(50);
/// How long a batch waits for a person whom somebody else has locked, while it holds others.
const LOCK_TIMEOUT: &str = "SET lock_timeout = '250ms'";
/// How many times in a row it waits in vain before it gives up.
const ATTEMPTS: usize = 40;
/// How often it says where it is.
const REPORT: Duration = Duration::from_secs(1);
/// Counting everybody reads an index over everything.
const STATEMENT_TIMEOUT: Duration = Duration::from_mins(5);
/// So many who fit no event are named in the answer; all are in the log.
const NAMED: usize = 100;

/// Settings of `republish`.
#[derive(Debug, clap::Args)]
pub struct RepublishArgs {
    /// The database, and the form of the answer.
    #[command(flatten)]
    pub common: CommandArgs,
    /// Who.
    #[command(flatten)]
    pub whom: Whom,
    /// With --all: persons per second at most.
    #[arg(long, default_value = "500", value_parser = clap::value_parser!(u32).range(1..))]
    pub rate: u32,
    /// With --all: begin with the first person, also where the last time ended half-way.
    #[arg(long, conflicts_with_all = ["person", "cpf_stdin"])]
    pub restart: bool,
    /// Only count.
    #[arg(long)]
    pub dry_run: bool,
}

/// Whose state is published.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct Whom {
    /// Everybody, in the order of their ids. Ctrl-C ends it after the batch that is under way; the next
    /// time it goes on from there.
    #[arg(long)]
    pub all: bool,
    /// The person with this id.
    #[arg(long, value_name = "UUID")]
    pub person: Option<Uuid>,
    /// The person whose cpf comes on standard input. It has no place on a command line: every user of the
    /// machine could read it there, and the shell would remember it.
    #[arg(long)]
    pub cpf_stdin: bool,
}

/// Appends baselines, and says how many.
pub async fn republish(args: &RepublishArgs) -> anyhow::Result<Verdict> {
    let cpf = args.whom.cpf_stdin.then(read_cpf).transpose()?;
    let mut conn = args.common.connect("person-api republish", &schema::needed(), STATEMENT_TIMEOUT).await?;
    sqlx::query(LOCK_TIMEOUT).execute(&mut conn).await.map_err(|e| failed(&e))?;
    if args.whom.all { everybody(args, &mut conn).await } else { one(args, &mut conn, cpf).await }
}

fn read_cpf() -> anyhow::Result<Cpf> {
    let mut text = String::new();
    // A cpf is short; the rest of a stream that is something else need not be read.
    std::io::stdin().take(64).read_to_string(&mut text).context("standard input could not be read")?;
    let cpf = text.trim().parse();
    Ok(cpf.map_err(|_| {
        SettingError::new("standard input", "should be a cpf, an integer of at most 11 digits")
    })?)
}

/// One person, in one transaction.
async fn one(args: &RepublishArgs, conn: &mut PgConnection, cpf: Option<Cpf>) -> anyhow::Result<Verdict> {
    let mut tx = conn.begin().await.map_err(|e| failed(&e))?;
    let locked =
        baseline::lock_one(&mut tx, args.whom.person, cpf).await.map_err(|e| match Failure::of(&e) {
            Failure::Locked => anyhow!("the person is locked by another transaction; nothing was published"),
            _ => failed(&e),
        })?;
    let Some(id) = locked else {
        bail!("there is no such person; nothing was published");
    };
    let batch = if args.dry_run {
        Batch { persons: 1, ..Batch::default() }
    } else {
        baseline::append(&mut tx, &[id]).await.map_err(|e| failed(&e))?
    };
    tx.commit().await.map_err(|e| failed(&e))?;
    wake(conn).await;
    let answer = json!({"person": id, "dry_run": args.dry_run, "persons": batch.persons, "too_large": batch.too_large});
    args.common.answer(&answer, || match (batch.persons, args.dry_run) {
        (0, _) => format!("the person {id} does not fit an event; nothing was published"),
        (_, true) => format!("the person {id} would be republished"),
        (_, false) => format!("the person {id} was republished"),
    })?;
    Ok(if batch.persons == 0 { Verdict::NotWell } else { Verdict::Well })
}

async fn everybody(args: &RepublishArgs, conn: &mut PgConnection) -> anyhow::Result<Verdict> {
    let source = outbox::source(conn).await?.to_string();
    if args.dry_run {
        return count(args, conn, &source).await;
    }
    alone(conn).await?;
    let unfinished = unfinished(args, conn, &source).await?;
    let resumed = unfinished.is_some();
    let mut progress = match unfinished {
        Some(progress) => progress,
        None => baseline::begin(conn, &source, &operator()).await.map_err(|e| failed(&e))?,
    };
    let mut run = Run { args, too_large: Vec::new(), now: 0 };
    let ended = run.batches(conn, &mut progress, Shutdown::on_signals()?.requested()).await;
    let Progress { persons, total, too_large, .. } = progress;
    let finished = ended.with_context(|| {
        format!("stopped after {persons} of {}; run it again to go on", many(total, "person"))
    })?;
    let answer = json!({
        "finished": finished, "dry_run": false, "resumed": resumed, "persons": persons,
        "this_time": run.now, "total": total, "too_large": too_large, "left_out": run.too_large,
    });
    args.common.answer(&answer, || {
        let mut text = if finished {
            format!("{} republished", many(persons, "person"))
        } else {
            format!("{persons} of {} republished; interrupted: run it again to go on", many(total, "person"))
        };
        if resumed {
            let _ = write!(text, "; {} of them this time", run.now);
        }
        if too_large > 0 {
            let _ = write!(text, "; {too_large} more, who fit no event");
        }
        for id in &run.too_large {
            let _ = write!(text, "\n  {id}");
        }
        text
    })?;
    Ok(if finished && too_large == 0 { Verdict::Well } else { Verdict::NotWell })
}

/// The progress of the last time, where it is to be continued.
async fn unfinished(
    args: &RepublishArgs,
    conn: &mut PgConnection,
    source: &str,
) -> anyhow::Result<Option<Progress>> {
    let last = baseline::progress(conn).await.map_err(|e| failed(&e))?;
    Ok(last.filter(|last| !args.restart && !last.finished && last.source == source))
}

async fn count(args: &RepublishArgs, conn: &mut PgConnection, source: &str) -> anyhow::Result<Verdict> {
    let unfinished = unfinished(args, conn, source).await?;
    let (after, to) = unfinished.as_ref().map_or((Uuid::nil(), None), |p| (p.after_id, Some(p.to_id)));
    let persons = baseline::count(conn, after, to).await.map_err(|e| failed(&e))?;
    let answer = json!({"dry_run": true, "resumed": unfinished.is_some(), "persons": persons});
    args.common.answer(&answer, || {
        let rest = if unfinished.is_some() { "; the others were before it was interrupted" } else { "" };
        format!("{} would be republished{rest}", many(persons, "person"))
    })?;
    Ok(Verdict::Well)
}

/// One at a time: by a lock that ends with the connection.
async fn alone(conn: &mut PgConnection) -> anyhow::Result<()> {
    let locked: bool = sqlx::query_scalar("SELECT person.try_republish()")
        .fetch_one(&mut *conn)
        .await
        .map_err(|e| failed(&e))?;
    if locked {
        return Ok(());
    }
    let other = baseline::progress(conn).await.map_err(|e| failed(&e))?.filter(|other| !other.finished);
    let who = other.map_or_else(String::new, |other| {
        format!(
            "; {} began it, and {} of {} are done",
            other.started_by,
            other.persons,
            many(other.total, "person")
        )
    });
    bail!("somebody republishes everybody already{who}")
}

/// A republishing of everybody under way.
struct Run<'a> {
    args: &'a RepublishArgs,
    /// Who fits no event, of this time.
    too_large: Vec<Uuid>,
    /// Persons republished this time.
    now: u64,
}

impl Run<'_> {
    /// Batch after batch. False when it was interrupted.
    async fn batches(
        &mut self,
        conn: &mut PgConnection,
        progress: &mut Progress,
        stop: &CancellationToken,
    ) -> anyhow::Result<bool> {
        let (began, mut reported) = (Instant::now(), Instant::now());
        // Several batches a second, also at a low rate.
        let most = BATCH.min(i64::from(self.args.rate / 10)).max(1);
        let (mut size, mut attempts) = (1, 0);
        while !stop.is_cancelled() {
            let at = Instant::now();
            let batch = match self::batch(conn, progress, size).await {
                Ok(batch) => batch,
                // Somebody works on one of them: nobody else is to wait for that.
                Err(error) if matches!(Failure::of(&error), Failure::Locked | Failure::Conflict) => {
                    attempts += 1;
                    if attempts == ATTEMPTS {
                        bail!(
                            "the first person after {} stays locked by another transaction",
                            progress.after_id
                        );
                    }
                    size = 1;
                    continue;
                }
                Err(error) => return Err(failed(&error)),
            };
            attempts = 0;
            let next = if at.elapsed() > MOMENT { size / 2 } else { size * 2 };
            size = next.clamp(1, most);
            let Some(last) = batch.last else { return Ok(true) };
            wake(conn).await;
            progress.after_id = last;
            progress.persons += batch.persons;
            progress.too_large += i64::try_from(batch.too_large.len())?;
            self.now += u64::try_from(batch.persons)?;
            for person in batch.too_large {
                tracing::warn!(%person, "does not fit an event, and was left out");
                if self.too_large.len() < NAMED {
                    self.too_large.push(person);
                }
            }
            if reported.elapsed() >= REPORT && std::io::stderr().is_terminal() {
                reported = Instant::now();
                let done = (progress.persons + progress.too_large, progress.total);
                eprint!("\r{}", bar(done, self.now, "person", began.elapsed()));
            }
            // So many persons should have taken so long.
            let due =
                Duration::from_secs_f64(f64::from(u32::try_from(self.now)?) / f64::from(self.args.rate));
            stop.run_until_cancelled(tokio::time::sleep(due.saturating_sub(began.elapsed()))).await;
        }
        Ok(false)
    }
}

/// One batch and how far it leads, in one transaction. Not in one statement: see [`baseline`].
async fn batch(conn: &mut PgConnection, progress: &Progress, size: i64) -> sqlx::Result<Batch> {
    let mut tx = conn.begin().await?;
    let ids = baseline::lock(&mut tx, (progress.after_id, progress.to_id), size).await?;
    let batch = baseline::append(&mut tx, &ids).await?;
    baseline::store(&mut tx, &batch).await?;
    tx.commit().await?;
    Ok(batch)
}

/// Tells the relay; without it the events leave a little later.
async fn wake(conn: &mut PgConnection) {
    let notice = sqlx::query("SELECT pg_notify($1, '')").bind(outbox::CHANNEL).execute(conn).await;
    if let Err(error) = notice {
        tracing::debug!(error = describe(&error), "the relay was not woken; it will poll");
    }
}

/// What went wrong, without what is stored, which is personal data.
fn failed(error: &sqlx::Error) -> anyhow::Error {
    anyhow!("the database failed: {}", describe(error))
}
