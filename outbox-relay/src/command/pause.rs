//! `pause` and `resume`: a relay name publishes nothing until it is told to go on.

use chrono::{DateTime, Utc};
use outbox::database::{Attempts, is_conflict};
use serde_json::json;
use sqlx::PgConnection;

use super::{CommandArgs, Verdict, connect, not_done, operator, state, time};
use crate::config::{STATEMENT_TIMEOUT, relay_name};

/// Pauses `$1`, unless it is paused already.
const PAUSE: &str = "\
UPDATE outbox.relay r SET paused_at = coalesce(r.paused_at, now()), paused_by = coalesce(r.paused_by, $2)
FROM outbox.relay before WHERE r.name = $1 AND before.name = r.name
RETURNING before.paused_at AS since, before.paused_by AS by,
          (SELECT leads FROM outbox.relay_status s WHERE s.name = r.name) AS leads";

const RESUME: &str = "\
UPDATE outbox.relay r SET paused_at = NULL, paused_by = NULL
FROM outbox.relay before WHERE r.name = $1 AND before.name = r.name AND $2::text IS NULL
RETURNING before.paused_at AS since, before.paused_by AS by,
          (SELECT leads FROM outbox.relay_status s WHERE s.name = r.name) AS leads";

/// A relay before it was paused or resumed.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct Before {
    /// Since when it was paused already.
    pub since: Option<DateTime<Utc>>,
    /// The operator who had paused it.
    pub by: Option<String>,
    /// A relay of this name leads.
    pub leads: bool,
}

impl Before {
    /// The pause that there was, for people.
    pub fn text(&self) -> Option<String> {
        let by = self.by.as_deref().map_or(String::new(), |by| format!(" by {by}"));
        self.since.map(|since| format!("paused{by} since {}", time(Some(since))))
    }
}

/// Settings of `pause` and `resume`.
#[derive(Debug, clap::Args)]
pub struct PauseArgs {
    /// The database, and the form of the answer.
    #[command(flatten)]
    pub common: CommandArgs,
    /// The relay's name.
    #[arg(long, env = "RELAY_NAME", default_value = "default", value_parser = relay_name)]
    pub name: String,
}

/// Pauses a relay. Its leader, and whoever leads after it, reads nothing and publishes nothing more, but for
/// what is under way; writers do not notice. Pausing what is paused changes nothing.
pub async fn pause(args: &PauseArgs, reason: Option<&str>) -> anyhow::Result<Verdict> {
    let who = operator();
    let by = reason.map_or(who.clone(), |reason| format!("{who} ({reason})"));
    change(args, Some(&by)).await
}

/// Lets a relay go on. Resuming what is not paused changes nothing.
pub async fn resume(args: &PauseArgs) -> anyhow::Result<Verdict> {
    change(args, None).await
}

/// Pauses the relay called `name` for the operator `by`, or, without one, lets it go on. Fails where there is no such
/// relay.
pub async fn set(conn: &mut PgConnection, name: &str, by: Option<&str>) -> anyhow::Result<Before> {
    state::known(conn, name).await?;
    let sql = if by.is_some() { PAUSE } else { RESUME };
    // Not `again`, whose closure would keep the future from being sent to another thread.
    let mut attempts = Attempts::default();
    loop {
        let set = sqlx::query_as(sql).bind(name).bind(by).fetch_one(&mut *conn).await;
        if is_conflict(&set) && attempts.again().await {
            continue;
        }
        return set.map_err(|error| not_done(error, "nothing was changed"));
    }
}

async fn change(args: &PauseArgs, by: Option<&str>) -> anyhow::Result<Verdict> {
    let (name, pause) = (&args.name, by.is_some());
    let mut conn = connect(&args.common, if pause { "pause" } else { "resume" }, STATEMENT_TIMEOUT).await?;
    let was = set(&mut conn, name, by).await?;
    let (before, leads) = (was.text(), was.leads);
    let answer = json!({"relay": name, "paused": pause, "before": before, "led": leads});
    args.common.answer(&answer, || {
        let said = match (pause, &before) {
            (true, None) => format!("{name} is paused; it goes on with: outbox-relay resume"),
            (true, Some(before)) => format!("nothing to do: {name} was {before}"),
            (false, Some(before)) => format!("{name} goes on; it was {before}"),
            (false, None) => format!("nothing to do: {name} was not paused"),
        };
        let heard = if leads { "its leader hears of it within about a second" } else { "no relay leads now" };
        format!("{said}\n{heard}")
    })?;
    Ok(Verdict::Ok)
}
