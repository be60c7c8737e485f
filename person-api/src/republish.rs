//! `republish`: publishes the whole state of persons once more, as baselines, beside the running API.

pub(crate) mod baseline;

use std::{
    fmt::Write,
    io::Read,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail};
use daemon::{
    command::{CommandArgs, Verdict, many, operator},
    config::SettingError,
    shutdown::Shutdown,
};
use events::Cpf;
use outbox::{
    AppendError,
    database::{Failure, describe},
};
use serde_json::json;
use sqlx::{Connection, PgConnection};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::baseline::{Batch, Progress};
use crate::schema;

/// The largest number of persons in a batch.
const BATCH: i64 = 100;
/// After a batch that holds its locks for longer, the next one has half the size.
const MOMENT: Duration = Duration::from_millis(50);
/// How long a batch, which holds locks, waits for one more; and how many blocks the server asks its disk for at a time,
/// on systems where it can.
const SETTINGS: &str = "SELECT set_config('lock_timeout', '250ms', false),
    CASE WHEN version() ~ 'linux' THEN set_config('effective_io_concurrency', '64', false) END";
/// After how many failed waits in a row the command gives up.
const ATTEMPTS: usize = 40;
/// Counting all persons reads a whole index.
const STATEMENT_TIMEOUT: Duration = Duration::from_mins(5);
/// The largest number of persons that the result names as too large for an event. The log names all.
const NAMED: usize = 100;

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
    /// With --all: begin with the first person, even if the last run did not finish.
    #[arg(long, conflicts_with_all = ["person", "cpf_stdin"])]
    pub restart: bool,
    /// Only count.
    #[arg(long)]
    pub dry_run: bool,
}

/// The persons whose state is published.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct Selection {
    /// All persons, in the order of their ids. Ctrl-C ends the command after the current batch; the next run continues
    /// from there.
    #[arg(long)]
    pub all: bool,
    /// The person with this id.
    #[arg(long, value_name = "UUID")]
    pub person: Option<Uuid>,
    /// The person whose cpf comes on standard input. On a command line, every user of the machine could read the cpf, and
    /// the shell would store it in its history.
    #[arg(long)]
    pub cpf_stdin: bool,
}

/// Appends baselines, and prints how many.
pub async fn republish(args: &RepublishArgs) -> anyhow::Result<Verdict> {
    let cpf = args.selection.cpf_stdin.then(read_cpf).transpose()?;
    let mut conn = args.common.connect("person-api republish", &schema::needed(), STATEMENT_TIMEOUT).await?;
    sqlx::query(SETTINGS).execute(&mut conn).await.map_err(failed)?;
    if args.selection.all { all(args, &mut conn).await } else { one(args, &mut conn, cpf).await }
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
    let mut tx = conn.begin().await.map_err(failed)?;
    let locked =
        baseline::lock_one(&mut tx, args.selection.person, cpf).await.map_err(|e| match Failure::of(&e) {
            Failure::Locked => anyhow!("the person is locked by another transaction; nothing was published"),
            _ => failed(e),
        })?;
    let Some(id) = locked else {
        bail!("there is no such person; nothing was published");
    };
    let batch = if args.dry_run {
        Batch { persons: 1, ..Batch::default() }
    } else {
        baseline::append(&mut tx, &[id]).await.map_err(failed)?
    };
    tx.commit().await.map_err(failed)?;
    wake(conn).await;
    let result = json!({"person": id, "dry_run": args.dry_run, "persons": batch.persons, "too_large": batch.too_large});
    args.common.answer(&result, || match (batch.persons, args.dry_run) {
        (0, _) => format!("the person {id} does not fit an event; nothing was published"),
        (_, true) => format!("the person {id} would be republished"),
        (_, false) => format!("the person {id} was republished"),
    })?;
    Ok(if batch.persons == 0 { Verdict::Attention } else { Verdict::Ok })
}

async fn all(args: &RepublishArgs, conn: &mut PgConnection) -> anyhow::Result<Verdict> {
    let source = outbox::source(conn).await?.to_string();
    if args.dry_run {
        return count(args, conn, &source).await;
    }
    take_lock(conn).await?;
    let unfinished = unfinished(args, conn, &source).await?;
    let resumed = unfinished.is_some();
    let mut progress = match unfinished {
        Some(progress) => progress,
        None => baseline::begin(conn, &source, &operator()).await.map_err(failed)?,
    };
    let mut run = Run { args, too_large: Vec::new(), now: 0 };
    let ended = run.batches(conn, &mut progress, Shutdown::on_signals()?.requested()).await;
    let Progress { persons, total, too_large, .. } = progress;
    let finished = ended.with_context(|| {
        format!("stopped after {persons} of {}; run it again to go on", many(total, "person"))
    })?;
    let result = json!({
        "finished": finished, "dry_run": false, "resumed": resumed, "persons": persons,
        "this_time": run.now, "total": total, "too_large": too_large, "left_out": run.too_large,
    });
    args.common.answer(&result, || {
        let mut text = if finished {
            format!("{} republished", many(persons, "person"))
        } else {
            format!("{persons} of {} republished; interrupted: run it again to go on", many(total, "person"))
        };
        if resumed {
            let _ = write!(text, "; {} of them this time", run.now);
        }
        if too_large > 0 {
            let _ = write!(text, "; {too_large} left out: too large for an event");
        }
        for id in &run.too_large {
            let _ = write!(text, "\n  {id}");
        }
        text
    })?;
    Ok(if finished && too_large == 0 { Verdict::Ok } else { Verdict::Attention })
}

/// The progress of the last run, if this one continues it.
async fn unfinished(
    args: &RepublishArgs,
    conn: &mut PgConnection,
    source: &str,
) -> anyhow::Result<Option<Progress>> {
    let last = baseline::progress(conn).await.map_err(failed)?;
    Ok(last.filter(|last| !args.restart && !last.finished && last.source == source))
}

async fn count(args: &RepublishArgs, conn: &mut PgConnection, source: &str) -> anyhow::Result<Verdict> {
    let unfinished = unfinished(args, conn, source).await?;
    let (after, to) = unfinished.as_ref().map_or((Uuid::nil(), None), |p| (p.after_id, Some(p.to_id)));
    let persons = baseline::count(conn, after, to).await.map_err(failed)?;
    let result = json!({"dry_run": true, "resumed": unfinished.is_some(), "persons": persons});
    args.common.answer(&result, || {
        let rest = if unfinished.is_some() { "; the others were before it was interrupted" } else { "" };
        format!("{} would be republished{rest}", many(persons, "person"))
    })?;
    Ok(Verdict::Ok)
}

/// Takes the lock that admits one `republish --all` at a time. It ends with the connection.
async fn take_lock(conn: &mut PgConnection) -> anyhow::Result<()> {
    let locked: bool =
        sqlx::query_scalar("SELECT person.try_republish()").fetch_one(&mut *conn).await.map_err(failed)?;
    if locked {
        return Ok(());
    }
    let other = baseline::progress(conn).await.map_err(failed)?.filter(|other| !other.finished);
    let who = other.map_or_else(String::new, |other| {
        format!(
            "; {} started it, and {} of {} are done",
            other.started_by,
            other.persons,
            many(other.total, "person")
        )
    });
    bail!("another `republish --all` is running{who}")
}

/// A `republish --all` under way.
struct Run<'a> {
    args: &'a RepublishArgs,
    /// The persons who do not fit an event, of this run.
    too_large: Vec<Uuid>,
    /// How many persons this run has republished.
    now: u64,
}

impl Run<'_> {
    /// Publishes batch after batch. False when it was interrupted.
    async fn batches(
        &mut self,
        conn: &mut PgConnection,
        progress: &mut Progress,
        stop: &CancellationToken,
    ) -> anyhow::Result<bool> {
        let (began, said) = (Instant::now(), daemon::progress::Progress::new("republishing", "person"));
        // Several batches a second, even at a low rate.
        let most = BATCH.min(i64::from(self.args.rate / 10)).max(1);
        let (mut size, mut attempts) = (1, 0);
        while !stop.is_cancelled() {
            let range = (progress.after_id, progress.to_id);
            baseline::read_ahead(conn, range, size).await.map_err(failed)?;
            let at = Instant::now();
            let batch = match self::batch(conn, range, size).await {
                Ok(batch) => batch,
                // Another transaction has locked one of them. The rollback lets the writers of the others go on.
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
                Err(error) => return Err(failed(error)),
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
            let way = |persons| u64::try_from(persons).unwrap_or(0);
            said.along((way(progress.persons + progress.too_large), way(progress.total)), self.now);
            // The time that so many persons should have taken.
            let due =
                Duration::from_secs_f64(f64::from(u32::try_from(self.now)?) / f64::from(self.args.rate));
            stop.run_until_cancelled(tokio::time::sleep(due.saturating_sub(began.elapsed()))).await;
        }
        Ok(false)
    }
}

/// One batch and the progress after it, in one transaction. Not in one statement: see [`baseline`].
async fn batch(conn: &mut PgConnection, range: (Uuid, Uuid), size: i64) -> sqlx::Result<Batch> {
    let mut tx = conn.begin().await?;
    let ids = baseline::lock(&mut tx, range, size).await?;
    let batch = baseline::append(&mut tx, &ids).await?;
    baseline::store(&mut tx, &batch).await?;
    tx.commit().await?;
    Ok(batch)
}

/// Wakes the relay. Without this the relay polls, and the events leave a little later.
async fn wake(conn: &mut PgConnection) {
    let notice = sqlx::query("SELECT pg_notify($1, '')").bind(outbox::CHANNEL).execute(conn).await;
    if let Err(error) = notice {
        tracing::debug!(error = describe(&error), "the relay was not woken; it will poll");
    }
}

/// The failure, without stored values, which are personal data. The outbox's own words name the person by id.
fn failed(error: sqlx::Error) -> anyhow::Error {
    match AppendError::from(error) {
        AppendError::Conflict(error) | AppendError::Database(error) => {
            anyhow!("the database failed: {}", describe(&error))
        }
        refused => anyhow!("the outbox refused a baseline: {refused}"),
    }
}
