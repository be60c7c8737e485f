//! `forget`: removes a relay name that is not used any more, so that retention no longer waits for it.

use std::{borrow::Cow, time::Duration};

use anyhow::{Context, anyhow, bail};
use daemon::{progress::Progress, shutdown::Shutdown};
use outbox::database::again;
use serde_json::json;
use sqlx::{PgConnection, error::DatabaseError};

use super::{
    CommandArgs, Verdict, connect, many,
    state::{self, RelayRow},
    time,
};
use crate::config::relay_name;

/// What was set aside may be much.
const STATEMENT_TIMEOUT: Duration = Duration::from_mins(1);
/// So many rows at a time.
const BATCH: i64 = 10_000;

/// Settings of `forget`.
#[derive(Debug, clap::Args)]
pub struct ForgetArgs {
    /// The database, with the role that owns the schema, and the form of the answer.
    #[command(flatten)]
    pub common: CommandArgs,
    /// The relay's name.
    #[arg(value_parser = relay_name)]
    pub name: String,
    /// Do it; without this it is only said what would be done, with exit code 3.
    #[arg(long)]
    pub yes: bool,
}

/// Removes the name, its progress and what it set aside. Never that of a relay that runs: it would begin anew, and
/// publish everything that is stored once more.
pub async fn forget(args: &ForgetArgs) -> anyhow::Result<Verdict> {
    let mut conn = connect(&args.common, "forget", STATEMENT_TIMEOUT).await?;
    let name = &args.name;
    state::known(&mut conn, name).await?;
    // The leader's own lock: whoever leads has it, and nobody takes it before this session ends.
    let ours = "SELECT outbox.try_lead(id) FROM outbox.relay WHERE name = $1";
    let ours: Option<bool> = sqlx::query_scalar(ours)
        .bind(name)
        .fetch_optional(&mut conn)
        .await
        .context("whether the relay runs could not be found out; nothing was changed")?;
    let relays = state::relays(&mut conn, Some(name)).await.context("nothing was changed")?;
    let Some((row, _)) = relays.first() else { bail!("the relay {name} is gone already") };
    if ours != Some(true) {
        bail!(
            "the relay {name} runs, led by {}; stop it, and every other that has this name, and run this again",
            row.leader.as_deref().unwrap_or("a session that has its lock")
        );
    }
    let aside: i64 = sqlx::query_scalar("SELECT count(*) FROM outbox.parked WHERE relay = $1")
        .bind(name)
        .fetch_one(&mut conn)
        .await
        .context("what is set aside could not be counted; nothing was changed")?;
    if args.yes {
        remove(&mut conn, name, aside).await?;
        tracing::warn!(relay = name, aside, low_water = row.low_water, "forgotten by hand");
    }
    let unpublished = (row.last_position - row.settled()).max(0);
    let answer = json!({
        "relay": name, "forgotten": args.yes, "set_aside": aside, "low_water": row.low_water,
        "unpublished_at_most": unpublished,
    });
    args.common.answer(&answer, || text(args, row, aside, unpublished))?;
    Ok(if args.yes { Verdict::Ok } else { Verdict::Attention })
}

/// In steps: an interrupted one leaves the name, and goes on when it is run again.
async fn remove(conn: &mut PgConnection, name: &str, aside: i64) -> anyhow::Result<()> {
    let code =
        |error: &sqlx::Error| error.as_database_error().and_then(DatabaseError::code).map(Cow::into_owned);
    let forbidden = |error: sqlx::Error| match code(&error).as_deref() {
        Some("42501") => anyhow!(
            "this role may not remove a relay; the relay is still there; connect as the owner of the schema outbox"
        ),
        _ => anyhow!(error).context("not everything was removed; run it again"),
    };
    // Before anything is gone: whether the last step will be allowed.
    let may: bool = sqlx::query_scalar("SELECT has_table_privilege('outbox.relay', 'DELETE')")
        .fetch_one(&mut *conn)
        .await
        .map_err(forbidden)?;
    if !may {
        bail!(
            "this role may not remove a relay; nothing was changed; connect as the owner of the schema outbox"
        );
    }
    let shutdown = Shutdown::on_signals()?;
    let said = Progress::new("removing what is set aside", "event");
    let mut gone = 0;
    loop {
        said.at(gone, aside.unsigned_abs());
        if shutdown.requested().is_cancelled() {
            let gone = many(gone, "event");
            bail!(
                "interrupted: {gone} of {aside} removed, and the relay is still there; run this again to go on"
            );
        }
        let some = "DELETE FROM outbox.parked WHERE relay = $1 AND position IN
                        (SELECT position FROM outbox.parked WHERE relay = $1 ORDER BY position LIMIT $2)";
        let removed = again(async || sqlx::query(some).bind(name).bind(BATCH).execute(&mut *conn).await);
        let removed = removed.await.map_err(forbidden)?;
        if removed.rows_affected() == 0 {
            break;
        }
        gone += removed.rows_affected();
    }
    let last = "DELETE FROM outbox.relay WHERE name = $1";
    let last = again(async || sqlx::query(last).bind(name).execute(&mut *conn).await).await;
    last.map(|_| ()).map_err(forbidden)
}

fn text(args: &ForgetArgs, row: &RelayRow, aside: i64, unpublished: i64) -> String {
    let name = &args.name;
    let led = row.leader.as_ref().map_or_else(
        || "it has never run".to_owned(),
        |leader| format!("it was last led by {leader}, from {} on", time(row.leader_since)),
    );
    let lost = format!(
        "{} that it set aside, and at most {} that it has not settled (everything up to {} is)",
        many(aside, "event"),
        many(unpublished, "position"),
        row.low_water
    );
    if args.yes {
        format!(
            "the relay {name} is forgotten; it publishes no more: {lost}\nretention does not wait for it any more"
        )
    } else {
        format!(
            "the relay {name} would be forgotten ({led}); it would not publish {lost}; add --yes to do it"
        )
    }
}
