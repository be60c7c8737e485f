//! What the commands beside `run` share: each asks the database, or changes something in it, says so,
//! and ends.

use std::{
    fmt,
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use serde::Serialize;
use sqlx::PgConnection;

use super::database::{Database, DatabaseArgs, Failure, Schema, SchemaError};
use crate::telemetry::TelemetryArgs;

/// Connecting takes no longer, or the database counts as away.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How a command ended that did what it was asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// Done, and there is nothing to say against it. Exit code 0.
    Well,
    /// Done, but the answer is one that somebody should look at. Exit code 3.
    NotWell,
}

impl From<Verdict> for ExitCode {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Well => Self::SUCCESS,
            Verdict::NotWell => Self::from(3),
        }
    }
}

/// What every command takes.
#[derive(Debug, clap::Args)]
pub struct CommandArgs {
    /// The database.
    #[command(flatten)]
    pub database: DatabaseArgs,
    /// Answer with one JSON document instead of text for people.
    #[arg(long, global = true)]
    pub json: bool,
    /// Logging.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}

impl CommandArgs {
    /// Connects, with every statement limited to `statement_timeout`, to a database whose `schemas` are
    /// the ones that this program knows. The server sees the connection as `application`.
    pub async fn connect(
        &self,
        application: &str,
        schemas: &[Schema],
        statement_timeout: Duration,
    ) -> anyhow::Result<PgConnection> {
        let mut conn = self.reach(application, statement_timeout).await?;
        let check = async {
            for schema in schemas {
                schema.check(&mut conn).await?;
            }
            Ok(())
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, check).await {
            Ok(Ok(())) => Ok(conn),
            Ok(Err(SchemaError::Database(error))) => Err(unreached(error)),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => bail!("the database did not answer within {CONNECT_TIMEOUT:?}"),
        }
    }

    /// As [`connect`](Self::connect), to whatever database it is.
    pub async fn reach(
        &self,
        application: &str,
        statement_timeout: Duration,
    ) -> anyhow::Result<PgConnection> {
        Self::reach_at(self.database.options(application, statement_timeout)?).await
    }

    /// As [`reach`](Self::reach), to a second database.
    pub async fn reach_at(database: Database) -> anyhow::Result<PgConnection> {
        match tokio::time::timeout(CONNECT_TIMEOUT, database.quiet().connect()).await {
            Ok(connected) => connected.map_err(unreached),
            Err(_) => bail!("the database did not answer within {CONNECT_TIMEOUT:?}"),
        }
    }

    /// Writes the answer to standard output: `text` for people, or `answer` as JSON.
    pub fn answer(&self, answer: &impl Serialize, text: impl FnOnce() -> String) -> anyhow::Result<()> {
        // What stands in it of others was made safe where it is put in; this is for what was forgotten.
        let text = if self.json {
            shown::json(&serde_json::to_string_pretty(answer)?).into_owned()
        } else {
            shown::lines(&text()).into_owned()
        };
        print(&text).context("the answer cannot be written")
    }
}

/// What the database said, for whoever sits at the terminal; and that it is away only when it is.
fn unreached(error: sqlx::Error) -> anyhow::Error {
    match Failure::of(&error) {
        Failure::Away | Failure::Login | Failure::Restarting | Failure::Resources => {
            anyhow::Error::new(error).context("the database cannot be reached")
        }
        _ => anyhow!(outbox::database::reason(&error)),
    }
}

/// Writes a text and a newline to standard output. A reader that has seen enough, such as `head`, is no
/// error, where `println!` would panic.
pub fn print(text: &str) -> io::Result<()> {
    let mut output = io::stdout().lock();
    match writeln!(output, "{}", text.trim_end()).and_then(|()| output.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// A number and its noun, which has an `s` when there are more of it, or none.
pub fn many<N: Copy + fmt::Display + PartialEq + From<u8>>(count: N, noun: &str) -> String {
    if count == N::from(1) { format!("1 {noun}") } else { format!("{count} {noun}s") }
}

/// A time span for people: as exact as somebody needs it who wonders whether to act.
pub fn span(seconds: f64) -> String {
    match seconds.max(0.0) {
        s if s < 10.0 => format!("{s:.1} s"),
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 2.0 * 3_600.0 => format!("{:.0} min", s / 60.0),
        s if s < 48.0 * 3_600.0 => format!("{:.0} h", s / 3_600.0),
        s => format!("{:.0} days", s / 86_400.0),
    }
}

/// How far it is, for whoever watches, by what is done of all:
/// `[######              ]  30 %  3000 events, 1000/s, 7.0 s left`.
pub fn bar((done, all): (i64, i64), count: u64, noun: &str, took: Duration) -> String {
    const WIDTH: usize = 20;
    let percent =
        u32::try_from((i128::from(done) * 100).checked_div(all.into()).unwrap_or(100)).unwrap_or(0).min(100);
    let filled = "#".repeat(percent as usize * WIDTH / 100);
    let text = format!("[{filled:<WIDTH$}] {percent:>3} %  {}", many(count, noun));
    if percent == 0 {
        return text;
    }
    #[expect(clippy::cast_precision_loss, reason = "for a rate it is exact enough")]
    let count = count as f64;
    let seconds = took.as_secs_f64().max(0.001);
    let left = span(seconds * f64::from(100 - percent) / f64::from(percent));
    // Blanks over what was there before.
    format!("{text}, {:.0}/s, {left} left    ", count / seconds)
}

/// Who does it by hand, for whoever finds what was done: `user@host`.
pub fn operator() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let user = std::env::var("USER").unwrap_or_else(|_| "somebody".to_owned());
    format!("{user}@{}", if host.trim().is_empty() { "localhost" } else { host.trim() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_says_how_far_it_is() {
        let took = Duration::from_secs(3);
        insta::assert_snapshot!(bar((300, 1_000), 3_000, "event", took), @"[######              ]  30 %  3000 events, 1000/s, 7.0 s left");
        insta::assert_snapshot!(bar((0, 1_000), 0, "event", took), @"[                    ]   0 %  0 events");
        insta::assert_snapshot!(bar((0, 0), 1, "event", took), @"[####################] 100 %  1 event, 0/s, 0.0 s left");
    }
}
