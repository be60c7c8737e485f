//! `pause` and `resume`: a relay name publishes nothing until it is told to go on.

use chrono::{DateTime, Utc};
use outbox::database::again;
use serde_json::json;

use super::{CommandArgs, Verdict, connect, not_done, operator, state, time};
use crate::config::{STATEMENT_TIMEOUT, relay_name};

/// Since when and by whom it was paused, and whether somebody leads.
type Before = (Option<DateTime<Utc>>, Option<String>, bool);

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
    change(
        args,
        "UPDATE outbox.relay r SET paused_at = coalesce(r.paused_at, now()), paused_by = coalesce(r.paused_by, $2)
         FROM outbox.relay before WHERE r.name = $1 AND before.name = r.name
         RETURNING before.paused_at, before.paused_by, (SELECT leads FROM outbox.relay_status s WHERE s.name = r.name)",
        &by,
        true,
    )
    .await
}

/// Lets a relay go on. Resuming what is not paused changes nothing.
pub async fn resume(args: &PauseArgs) -> anyhow::Result<Verdict> {
    change(
        args,
        "UPDATE outbox.relay r SET paused_at = NULL, paused_by = NULL
         FROM outbox.relay before WHERE r.name = $1 AND before.name = r.name AND $2 = $2
         RETURNING before.paused_at, before.paused_by, (SELECT leads FROM outbox.relay_status s WHERE s.name = r.name)",
        "",
        false,
    )
    .await
}

async fn change(args: &PauseArgs, sql: &'static str, by: &str, pause: bool) -> anyhow::Result<Verdict> {
    let name = &args.name;
    let mut conn = connect(&args.common, if pause { "pause" } else { "resume" }, STATEMENT_TIMEOUT).await?;
    state::known(&mut conn, name).await?;
    let (since, who, leads): Before =
        again(async || sqlx::query_as(sql).bind(name).bind(by).fetch_one(&mut conn).await)
            .await
            .map_err(|error| not_done(error, "nothing was changed"))?;
    let before = since.map(|since| {
        let who = who.as_deref().map_or(String::new(), |who| format!(" by {who}"));
        format!("paused{who} since {}", time(Some(since)))
    });
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
