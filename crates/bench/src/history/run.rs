//! Runs operations one after the other, beside the writers, and watches each.

use std::{collections::BTreeMap, process::Stdio, time::Duration};

use anyhow::{Context, bail};
use serde::Serialize;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, BufReader},
    process::{Child, Command},
    sync::mpsc,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    OPERATOR,
    operation::Operation,
    watch::{self, Locks},
    writers::{Waits, Writers},
};
use crate::{memory::peak_of, statistics::float};
use devstack::{binary, program::Program, say, stack::Stack, users};

/// How long an interrupted command may take to say how far it was.
const FAREWELL: Duration = Duration::from_secs(10);
/// How often a process's memory is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// How many lines of an operation's output an error shows.
const SHOWN: usize = 5;

/// The programs that only read, or do what a client asks, once more with the operator's role: so the statistics tell
/// their statements from those of the writers.
#[derive(Debug)]
pub(crate) struct Apis {
    pub(crate) person: Program,
    pub(crate) score: Program,
}

/// The operations so far.
#[derive(Debug)]
pub(crate) struct Run<'a> {
    pub(crate) stack: &'a mut Stack,
    pub(crate) apis: Apis,
    pub(crate) writers: Option<Writers>,
    /// What the names in braces stand for.
    pub(crate) names: BTreeMap<&'static str, String>,
    /// How long an operation may take, and how long a sampled one does.
    pub(crate) limits: [Duration; 2],
    /// Only operations whose lines contain one of these; all where there are none.
    pub(crate) only: &'a [String],
    pub(crate) done: Vec<Outcome>,
}

/// What became of an operation.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Outcome {
    #[serde(flatten)]
    pub(crate) operation: Operation,
    pub(crate) seconds: f64,
    pub(crate) end: End,
    /// Units of its count.
    pub(crate) done: Option<i64>,
    /// The same, a second.
    pub(crate) rate: Option<f64>,
    #[serde(flatten)]
    pub(crate) cost: Cost,
    #[serde(flatten)]
    pub(crate) locks: Locks,
    /// The longest write beside it, in seconds.
    pub(crate) longest_write: f64,
    pub(crate) failed_writes: usize,
    /// How late a score was, in seconds.
    pub(crate) score_late: f64,
    /// The process's peak, in megabytes.
    pub(crate) memory: Option<f64>,
    /// The longest time without a line of output, in seconds.
    pub(crate) silent: f64,
    /// Statements of it that still ran when it had ended.
    pub(crate) left_behind: i64,
}

/// How an operation ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum End {
    /// With this exit code, or status.
    Done(u16),
    /// It was interrupted at the limit. What its last statement has cost is not counted.
    Limit,
    /// The reason.
    Failed(String),
}

/// What the statements have cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, sqlx::FromRow)]
pub(crate) struct Cost {
    pub(crate) statements: i64,
    pub(crate) rows: i64,
    /// Buffers that were found or read.
    pub(crate) buffers: i64,
    /// Blocks of temporary files that were read or written.
    pub(crate) temporary: i64,
}

impl Run<'_> {
    /// Runs some, in their order. One that fails does not stop the others.
    pub(crate) async fn all(&mut self, operations: &[Operation]) -> anyhow::Result<()> {
        for operation in operations {
            if self.only.is_empty() || self.only.iter().any(|part| operation.line.contains(part)) {
                self.one(*operation).await?;
            }
        }
        Ok(())
    }

    async fn one(&mut self, operation: Operation) -> anyhow::Result<()> {
        let name = Self::database(operation);
        let database = format!("{}/{name}", self.stack.servers.postgres.url());
        let mut conn = PgConnection::connect(&database).await?;
        let line = self.filled(operation.line)?;
        let count = async |conn: &mut PgConnection| -> anyhow::Result<i64> {
            match operation.count {
                Some(sql) => Ok(sqlx::query_scalar(sql).fetch_one(conn).await?),
                None => Ok(0),
            }
        };
        let before = count(&mut conn).await?;
        // It counts for all databases.
        sqlx::query("SELECT pg_stat_statements_reset($1::regrole::oid)")
            .bind(OPERATOR)
            .execute(&mut conn)
            .await?;
        let stop = CancellationToken::new();
        let locks = tokio::spawn({
            let (database, stop) = (database.clone(), stop.clone());
            async move { watch::locks(&database, stop).await }
        });
        self.waits();
        let begin = Instant::now();
        let ended = if operation.is_request() {
            Box::pin(self.request(&line)).await
        } else {
            let database = format!("{}/{name}", self.stack.servers.postgres.url_of(OPERATOR));
            Box::pin(self.command(&line, operation, &database)).await
        };
        let seconds = begin.elapsed().as_secs_f64();
        let waits = self.waits();
        stop.cancel();
        // After `pause`, nothing is published until `resume`.
        let follows = !operation.is_request() && !operation.line.ends_with(" pause");
        if let Some(writers) = self.writers.as_ref().filter(|_| follows) {
            writers.caught_up().await;
        }
        let late = waits.late.max(self.waits().late);
        let locks = locks.await??;
        let left_behind = left_behind(&mut conn, operation.is_request()).await?;
        let cost = cost(&mut conn).await?;
        let done = count(&mut conn).await? - before;
        conn.close().await?;
        let (end, memory, silent) = match ended {
            Ok(ended) => (ended.end, ended.memory, ended.silent),
            Err(error) => (End::Failed(format!("{error:#}")), None, 0.0),
        };
        let outcome = Outcome {
            operation,
            seconds,
            end,
            done: operation.count.map(|_| done.abs()),
            rate: operation.count.map(|_| float(done.abs()) / seconds),
            cost,
            locks,
            longest_write: waits.longest,
            failed_writes: waits.failed,
            score_late: late,
            memory,
            silent,
            left_behind,
        };
        say(&format!(
            "{}: {:.2} s, {} buffers, {:?}, the longest write {:.2} s",
            operation.line, outcome.seconds, cost.buffers, outcome.end, outcome.longest_write
        ));
        self.done.push(outcome);
        Ok(())
    }

    fn waits(&self) -> Waits {
        self.writers.as_ref().map(Writers::take).unwrap_or_default()
    }

    /// The database that an operation is about.
    fn database(operation: Operation) -> &'static str {
        let about_score = operation.score
            || operation.program().starts_with("score-")
            || operation.line.contains(" score-api")
            || operation.line.contains(" score-projector");
        if about_score { "score" } else { "person" }
    }

    fn filled(&self, line: &str) -> anyhow::Result<String> {
        let mut filled = line.to_owned();
        for (name, value) in &self.names {
            filled = filled.replace(&format!("{{{name}}}"), value);
        }
        // A body of JSON has braces with quotation marks.
        if let Some((_, name)) = filled.split_once('{').filter(|(_, rest)| !rest.starts_with('"')) {
            bail!("the history has no {name}");
        }
        Ok(filled)
    }

    async fn command(&mut self, line: &str, operation: Operation, database: &str) -> anyhow::Result<Ended> {
        let mut words = line.split(' ');
        let program = words.next().unwrap_or_default();
        let rabbitmq = &self.stack.servers.rabbitmq;
        let user = match program {
            "score-projector" => users::PROJECTOR,
            _ if line.contains("--to-queue") => users::REPLAY,
            _ if operation.score => users::SCORE_RELAY,
            _ => users::PERSON_RELAY,
        };
        let inbox = format!("{}/score", self.stack.servers.postgres.url_of(OPERATOR));
        let mut command = Command::new(binary::find(program)?);
        if program == "score-projector" {
            command.env("SOURCE", users::SOURCES);
        }
        let mut child = command
            .args(words)
            .env("DATABASE_URL", database)
            .env("INBOX_DATABASE_URL", inbox)
            .env("AMQP_URL", format!("{}/%2f", rabbitmq.url_of(user)))
            .env("LISTEN", self.listens(program).trim_start_matches("http://"))
            .env("LOG_FORMAT", "human")
            .env(devstack::proc::MARK, self.stack.folder().mark())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {program}"))?;
        let [limit, sample] = self.limits;
        watched(&mut child, if operation.sampled { sample } else { limit }).await
    }

    /// Where the running program listens.
    fn listens(&self, program: &str) -> String {
        match program {
            "person-api" => self.stack.person_api.url(),
            "score-api" => self.stack.score_api.url(),
            "score-projector" => self.stack.score_projector.url(),
            "score-relay" => self.stack.score_relay.url(),
            _ => self.stack.person_relay.url(),
        }
    }

    async fn request(&mut self, line: &str) -> anyhow::Result<Ended> {
        let mut parts = line.splitn(3, ' ');
        let (method, target) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let (program, path) = target.split_once('/').context("a path")?;
        let (url, process) = match program {
            "person-api" => (self.apis.person.url(), self.apis.person.process()),
            "score-api" => (self.apis.score.url(), self.apis.score.process()),
            _ => (self.listens(program), None),
        };
        let pid = process.map(|process| process.pid());
        if let Some(pid) = pid {
            watch::forget_peak(pid);
        }
        let client = reqwest::Client::builder().no_proxy().timeout(self.limits[0]).build()?;
        let mut request = client.request(method.parse()?, format!("{url}/{path}"));
        if let Some(body) = parts.next() {
            request = request.header("content-type", "application/json").body(body.to_owned());
        }
        let response = request.send().await?;
        let (status, body) = (response.status(), response.text().await?);
        let memory = pid.and_then(peak_of);
        let end = if status.is_client_error() || status.is_server_error() {
            End::Failed(format!("{status}: {body}"))
        } else {
            End::Done(status.as_u16())
        };
        Ok(Ended { end, memory, silent: 0.0 })
    }
}

struct Ended {
    end: End,
    memory: Option<f64>,
    silent: f64,
}

/// Waits for a command's end, or interrupts it.
async fn watched(child: &mut Child, limit: Duration) -> anyhow::Result<Ended> {
    let (sender, mut lines) = mpsc::channel(64);
    let pid = child.id().context("it has ended")?;
    let output = child.stdout.take().context("a pipe")?;
    let errors = child.stderr.take().context("a pipe")?;
    tokio::spawn(pass(output, sender.clone()));
    tokio::spawn(pass(errors, sender));
    let begin = Instant::now();
    let (mut last, mut silent, mut memory) = (begin, 0.0_f64, None);
    let mut shown: Vec<String> = Vec::new();
    let mut interrupted = None;
    let mut looks = tokio::time::interval(LOOK);
    let mut open = true;
    let status = loop {
        tokio::select! {
            line = lines.recv(), if open => match line {
                Some(line) => {
                    silent = silent.max(last.elapsed().as_secs_f64());
                    last = Instant::now();
                    shown.push(line);
                    if shown.len() > SHOWN {
                        shown.remove(0);
                    }
                }
                None => open = false,
            },
            status = child.wait() => break status?,
            _ = looks.tick() => {
                memory = peak_of(pid).or(memory);
                match interrupted {
                    None if begin.elapsed() > limit => {
                        interrupted = Some(Instant::now());
                        let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
                        devstack::proc::signal(pid.as_slice(), rustix::process::Signal::INT);
                    }
                    Some(since) if since.elapsed() > FAREWELL => child.start_kill()?,
                    _ => {}
                }
            }
        }
    };
    silent = silent.max(last.elapsed().as_secs_f64());
    let end = match (interrupted, status.code()) {
        (Some(_), _) => End::Limit,
        // 3: done, and the result needs attention.
        (None, Some(code @ (0 | 3))) => End::Done(u16::try_from(code)?),
        (None, code) => {
            while let Some(line) = lines.recv().await {
                shown.push(line);
            }
            let last = shown.split_off(shown.len().saturating_sub(SHOWN));
            End::Failed(format!("exit code {code:?}: {}", last.join(" / ")))
        }
    };
    Ok(Ended { end, memory, silent })
}

async fn pass(output: impl AsyncRead + Unpin, to: mpsc::Sender<String>) {
    let mut lines = BufReader::new(output).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if to.send(line).await.is_err() {
            break;
        }
    }
}

/// Of the operator's statements since the last reset.
async fn cost(conn: &mut PgConnection) -> anyhow::Result<Cost> {
    let cost = sqlx::query_as(
        "SELECT coalesce(sum(calls), 0)::bigint AS statements, coalesce(sum(rows), 0)::bigint AS rows,
                coalesce(sum(shared_blks_hit + shared_blks_read + local_blks_hit + local_blks_read), 0)::bigint AS buffers,
                coalesce(sum(temp_blks_read + temp_blks_written), 0)::bigint AS temporary
         FROM pg_stat_statements(false) s WHERE s.userid = $1::regrole::oid",
    )
    .bind(OPERATOR)
    .fetch_one(conn)
    .await?;
    Ok(cost)
}

/// How many statements of a command still run although it has ended; they are ended.
async fn left_behind(conn: &mut PgConnection, serves: bool) -> anyhow::Result<i64> {
    if serves {
        return Ok(0);
    }
    // The server needs a moment to notice.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let count = sqlx::query_scalar(
        "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid))
         FROM pg_stat_activity WHERE usename = $1 AND state = 'active' AND query_start < now() - interval '0.3 s'",
    )
    .bind(OPERATOR)
    .fetch_one(conn)
    .await?;
    Ok(count)
}

/// Runs SQL that prepares an operation.
pub(crate) async fn prepare(stack: &Stack, database: &str, sql: String) -> anyhow::Result<()> {
    let mut conn = PgConnection::connect(&format!("{}/{database}", stack.servers.postgres.url())).await?;
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut conn).await?;
    Ok(conn.close().await?)
}
