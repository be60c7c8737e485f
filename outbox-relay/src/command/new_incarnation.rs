//! `new-incarnation`: after a restore or a failover that lost commits, every chain of versions begins anew.

use std::time::Duration;

use anyhow::{Context, anyhow};
use daemon::progress::Progress;
use outbox::{
    Source,
    database::{Failure, again},
};
use serde_json::json;
use sqlx::{Connection, PgConnection};
use tokio::time::{Instant, sleep};

use super::{CommandArgs, Verdict, connect, not_done};
use crate::config::STATEMENT_TIMEOUT;

/// How long a leader may take to go on under the new incarnation: its next heartbeat tells it, and then it leads again.
const TAKE_OVER: Duration = Duration::from_secs(30);
/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Settings of `new-incarnation`.
#[derive(Debug, clap::Args)]
pub struct NewIncarnationArgs {
    /// The database, with the role that owns the schema, and the form of the answer.
    #[command(flatten)]
    pub common: CommandArgs,
    /// The incarnation that the new one follows, where it is not this database's present one: the newest one that the
    /// subscribers know. A subscriber that refuses an incarnation says which one that is.
    #[arg(long, value_name = "INCARNATION", value_parser = clap::value_parser!(i64).range(1..))]
    pub above: Option<i64>,
    /// Do it; without this it is only said what would be done, with exit code 3.
    #[arg(long)]
    pub yes: bool,
}

/// Raises the incarnation, and with it the epoch of every relay: whoever leads is deposed by its next statement, and
/// publishes under the new source once it leads again, which is waited for.
pub async fn new_incarnation(args: &NewIncarnationArgs) -> anyhow::Result<Verdict> {
    let mut conn = connect(&args.common, "new-incarnation", STATEMENT_TIMEOUT).await?;
    let before = outbox::source(&mut conn).await?;
    if !args.yes {
        let parent = args.above.unwrap_or(before.incarnation);
        args.common.answer(&json!({"before": before.to_string(), "parent": parent, "done": false}), || {
            format!(
                "this outbox would begin a new incarnation of {}, which follows {parent}, and every subscriber would \
                 begin anew; add --yes to do it",
                before.name
            )
        })?;
        return Ok(Verdict::Attention);
    }
    let after = begin(&mut conn, args.above).await?;
    let (old, new) = (before.to_string(), after.to_string());
    let state = taken_over(&mut conn, after.incarnation).await.with_context(|| {
        format!(
            "the incarnation {new} has begun; whether the relay has taken it over is unknown: run this again"
        )
    })?;
    let document = json!({
        "before": old, "after": new, "parent": after.parent, "done": true, "taken_over": state == TakeOver::Done,
    });
    args.common.answer(&document, || {
        let begun = if before == after {
            format!("the incarnation {new} has begun already, and nothing was published under it yet")
        } else {
            format!("the incarnation {new} has begun, after {old}")
        };
        let relay = match &state {
            TakeOver::Done => format!("the relay publishes as {new} from now on"),
            TakeOver::NoLeader => format!("no relay leads; the one that does next publishes as {new}"),
            TakeOver::Late(names) => format!(
                "after {TAKE_OVER:?}, these relay names are still led under the earlier incarnation: {names}. Look at \
                 their /ready; run this again to see whether they have taken over"
            ),
        };
        format!("{begun}\n{relay}\nsubscribers that follow versions need a baseline of every aggregate under {new}")
    })?;
    Ok(if matches!(state, TakeOver::Late(_)) { Verdict::Attention } else { Verdict::Ok })
}

/// Begins an incarnation, or finds that the present one is not used yet.
pub(super) async fn begin(conn: &mut PgConnection, above: Option<i64>) -> anyhow::Result<Source> {
    let begun = again(async || {
        let mut tx = conn.begin().await?;
        let begun = sqlx::query_as(
            "SELECT name, incarnation, parent, began_at_position FROM outbox.begin_incarnation($1)",
        );
        let begun: Source = begun.bind(above).fetch_one(&mut *tx).await?;
        tx.commit().await?;
        Ok(begun)
    });
    begun.await.map_err(|error| match Failure::of(&error) {
        Failure::Forbidden => anyhow!(
            "this role may not change the source; nothing was changed; connect as the owner of the schema outbox"
        ),
        _ => not_done(error, "nothing was changed"),
    })
}

/// How far the relays are with a new incarnation.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum TakeOver {
    /// Each name that is led is led under it.
    Done,
    /// No name is led.
    NoLeader,
    /// These were led under the earlier one for all of the time.
    Late(String),
}

/// Waits until every relay name that is led is led under `incarnation`.
pub(super) async fn taken_over(conn: &mut PgConnection, incarnation: i64) -> sqlx::Result<TakeOver> {
    let end = Instant::now() + TAKE_OVER;
    let what = format!("waiting for the relays to lead under the new incarnation, for at most {TAKE_OVER:?}");
    let _said = Progress::new(what, "relay");
    loop {
        // A leader that was deposed has no leadership for a moment: its row tells who leads next, and how.
        let (under, late): (bool, Option<String>) = sqlx::query_as(
            "SELECT coalesce(bool_or(r.incarnation = $1), false),
                    string_agg(r.name, ', ' ORDER BY r.name)
                        FILTER (WHERE r.incarnation IS DISTINCT FROM $1
                                  AND (outbox.leader_pid(r.id) IS NOT NULL
                                       OR r.heartbeat_at > clock_timestamp() - interval '15 seconds'))
             FROM outbox.relay r",
        )
        .bind(incarnation)
        .fetch_one(&mut *conn)
        .await?;
        match late {
            None if under => return Ok(TakeOver::Done),
            None => return Ok(TakeOver::NoLeader),
            Some(names) if Instant::now() >= end => return Ok(TakeOver::Late(names)),
            Some(_) => sleep(LOOK).await,
        }
    }
}
