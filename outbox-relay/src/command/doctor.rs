//! `doctor`: goes through everything that can be wrong with an outbox and its relays, and says of each
//! what was found and what to do.

mod broker;
mod captures;
mod checks;
mod positions;
mod relays;
mod settings;
mod subscribers;
mod versions;

use std::{fmt::Write as _, time::Duration};

use anyhow::anyhow;
use daemon::{config::broker::BrokerArgs, progress::Progress};
use lapin::types::ShortString;
use serde::Serialize;
use sqlx::{Connection, PgConnection};

use super::{CommandArgs, Verdict, many};
use crate::{
    config::{STATEMENT_TIMEOUT, relay_name},
    relay::exchange,
    subscribers::{ExpectArgs, Subscribers},
};

/// The examination of the database takes no longer: a connection may hang without a word.
const TIMEOUT: Duration = Duration::from_mins(1);
/// Closing is a courtesy.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Settings of `doctor`.
#[derive(Debug, clap::Args)]
pub struct DoctorArgs {
    /// What every command takes.
    #[command(flatten)]
    pub common: CommandArgs,
    /// The broker. Without it, only the database is looked at.
    #[command(flatten)]
    pub broker: BrokerArgs,
    /// Only the relay of this name, instead of all.
    #[arg(long, env = "RELAY_NAME", value_parser = relay_name)]
    pub name: Option<String>,
    /// Also compare each captured aggregate with its last event. This reads the captured tables, and locks nothing.
    #[arg(long)]
    pub deep: bool,
    /// The exchange that the relay publishes to. It is never declared here.
    #[arg(long, env = "EXCHANGE", default_value = "event_dispatcher", value_parser = exchange)]
    pub exchange: ShortString,
    /// The subscribers that should be there.
    #[command(flatten)]
    pub expect: ExpectArgs,
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Nothing is to be done.
    Ok,
    /// It works, and an operator should look at it.
    Warning,
    /// It does not work, or will not for long.
    Problem,
    /// It could not be checked.
    Skipped,
}

impl Outcome {
    /// As JSON has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Problem => "problem",
            Self::Skipped => "skipped",
        }
    }
}

/// What was looked at, and what was found.
#[derive(Debug, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// How it ended.
    pub state: Outcome,
    /// What was found.
    pub finding: String,
    /// What to do about it; none when nothing is to be done.
    pub advice: Option<String>,
}

impl Check {
    fn new(name: impl Into<String>, state: Outcome, finding: impl Into<String>) -> Self {
        Self { name: name.into(), state, finding: finding.into(), advice: None }
    }

    fn ok(name: impl Into<String>, finding: impl Into<String>) -> Self {
        Self::new(name, Outcome::Ok, finding)
    }

    fn skipped(name: impl Into<String>, finding: impl Into<String>) -> Self {
        Self::new(name, Outcome::Skipped, finding)
    }

    fn warning(name: impl Into<String>, finding: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { advice: Some(advice.into()), ..Self::new(name, Outcome::Warning, finding) }
    }

    fn problem(name: impl Into<String>, finding: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { advice: Some(advice.into()), ..Self::new(name, Outcome::Problem, finding) }
    }
}

/// All findings.
#[derive(Debug, Serialize)]
struct Report {
    verdict: String,
    problems: usize,
    warnings: usize,
    checks: Vec<Check>,
}

/// Examines the database and its relays: all of them, or the one called `name`. `second` is another connection of the
/// same kind. The broker is not looked at.
pub async fn examine(
    conn: &mut PgConnection,
    second: &mut PgConnection,
    name: Option<&str>,
) -> anyhow::Result<Vec<Check>> {
    let checks = checks::database(conn, second, name);
    tokio::time::timeout(TIMEOUT, checks)
        .await
        .map_err(|_| anyhow!("the database did not answer within {TIMEOUT:?}"))?
}

/// Examines the database, its relays and the broker. What it finds is an answer, not an error; a
/// database that cannot be reached is one.
pub async fn doctor(args: &DoctorArgs) -> anyhow::Result<Verdict> {
    let require_tls = args.common.database.require_tls;
    let nodes = broker::nodes(&args.broker, require_tls)?;
    let subscribers = match &nodes {
        Some(nodes) => Subscribers::new(&args.expect, nodes, &args.exchange, require_tls)?,
        None => None,
    };
    let mut conn = args.common.reach("outbox-relay doctor", STATEMENT_TIMEOUT).await?;
    let mut second = args.common.reach("outbox-relay doctor", STATEMENT_TIMEOUT).await?;
    let said = Progress::new("examining the database", "check");
    let mut checks = examine(&mut conn, &mut second, args.name.as_deref()).await?;
    if args.deep {
        checks.extend(captures::compare(&mut conn, &said).await?);
    }
    // The server need not keep a session while the broker takes its time.
    let closed = async { tokio::join!(conn.close(), second.close()) };
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, closed).await;
    said.step("examining the broker", "check");
    checks.extend(broker::checks(nodes, &args.exchange).await);
    checks.extend(subscribers::checks(subscribers, args.expect.expect.as_ref()).await);
    drop(said);
    let report = Report::new(checks);
    args.common.answer(&report, || report.text())?;
    Ok(report.verdict())
}

impl Report {
    fn new(checks: Vec<Check>) -> Self {
        let count = |state| checks.iter().filter(|check| check.state == state).count();
        let (problems, warnings) = (count(Outcome::Problem), count(Outcome::Warning));
        let counts: Vec<String> = [(problems, "problem"), (warnings, "warning")]
            .into_iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, noun)| many(i64::try_from(count).unwrap_or(i64::MAX), noun))
            .collect();
        let verdict = if counts.is_empty() { "healthy".to_owned() } else { counts.join(", ") };
        Self { verdict, problems, warnings, checks }
    }

    fn verdict(&self) -> Verdict {
        if self.problems + self.warnings == 0 { Verdict::Ok } else { Verdict::Attention }
    }

    fn text(&self) -> String {
        let mut text = format!("{}\n", self.verdict);
        for Check { name, state, finding, advice } in &self.checks {
            let _ = writeln!(text, "{:<8} {}: {}", state.as_str(), escape::line(name), escape::line(finding));
            if let Some(advice) = advice {
                let _ = writeln!(text, "         -> {}", escape::line(advice));
            }
        }
        text
    }
}
