//! Runs operations one after the other, beside the writers, and watches each.

use std::{collections::BTreeMap, process::Stdio, time::Duration};

use anyhow::{Context, bail};
use serde::Serialize;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::{process::Command, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    OPERATOR,
    cost::{self, Cost},
    operation::Operation,
    pace::{self, Counter},
    process::{Ended, watched},
    watch::{self, Locks},
    writers::{Waits, Writers},
};
use crate::{memory::peak_of, statistics::number};
use devstack::{binary, program::Program, say, stack::Stack, users};

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
    /// The same, a second, from the first progress to the last.
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
        cost::begin(&mut conn).await?;
        let stop = CancellationToken::new();
        let broker = format!("{}/%2f", self.stack.servers.rabbitmq.url());
        let pace = match operation.count {
            Some(count) => {
                let counter = Counter::open(count, &database, &broker).await?;
                Some(tokio::spawn(pace::watch(counter, stop.clone())))
            }
            None => None,
        };
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
        let pace = match pace {
            Some(pace) => Some(pace.await??),
            None => None,
        };
        let left_behind = cost::left_behind(&mut conn, operation.is_request()).await?;
        let cost = cost::cost(&mut conn).await?;
        conn.close().await?;
        let (end, memory, silent) = match ended {
            Ok(ended) => (ended.end, ended.memory, ended.silent),
            Err(error) => (End::Failed(format!("{error:#}")), None, 0.0),
        };
        let outcome = Outcome {
            operation,
            seconds,
            end,
            done: pace.map(|pace| pace.done()),
            rate: pace.map(|pace| pace.rate()),
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
            "{}: {:.2} s{}, {} buffers, {:?}, the longest write {:.2} s",
            operation.line,
            outcome.seconds,
            outcome.rate.map_or(String::new(), |rate| format!(", {}/s", number(rate))),
            cost.buffers,
            outcome.end,
            outcome.longest_write
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

/// Runs SQL that prepares an operation.
pub(crate) async fn prepare(stack: &Stack, database: &str, sql: String) -> anyhow::Result<()> {
    let mut conn = PgConnection::connect(&format!("{}/{database}", stack.servers.postgres.url())).await?;
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut conn).await?;
    Ok(conn.close().await?)
}
