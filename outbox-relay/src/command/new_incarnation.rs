//! `new-incarnation`: after a restore or a failover that lost commits, every chain of versions begins anew.

use anyhow::{Context, anyhow};
use outbox::database::{Failure, again};
use serde_json::json;
use sqlx::Connection;

use super::{CommandArgs, Verdict, connect, not_done};
use crate::config::STATEMENT_TIMEOUT;

/// Settings of `new-incarnation`.
#[derive(Debug, clap::Args)]
pub struct NewIncarnationArgs {
    /// The database, with the role that owns the schema, and the form of the answer.
    #[command(flatten)]
    pub common: CommandArgs,
    /// Do it; without this it is only said what would be done, with exit code 3.
    #[arg(long)]
    pub yes: bool,
}

/// Raises the incarnation, and with it the epoch of every relay: whoever leads is deposed by its next
/// statement, and publishes under the new source once it leads again.
pub async fn new_incarnation(args: &NewIncarnationArgs) -> anyhow::Result<Verdict> {
    let mut conn = connect(&args.common, "new-incarnation", STATEMENT_TIMEOUT).await?;
    let before = outbox::source(&mut conn).await?;
    let mut after = before.clone();
    after.incarnation += 1;
    if args.yes {
        let raised = again(async || {
            let mut tx = conn.begin().await?;
            for sql in [
                // What somebody has still to publish will be published under the new one.
                "UPDATE outbox.source SET incarnation = incarnation + 1, since = now(),
                     from_position = coalesce((SELECT min(low_water) FROM outbox.relay), 0)",
                "UPDATE outbox.relay SET epoch = epoch + 1",
            ] {
                sqlx::query(sql).execute(&mut *tx).await?;
            }
            tx.commit().await
        });
        raised.await.map_err(|error| match Failure::of(&error) {
            Failure::Forbidden => anyhow!(
                "this role may not change the source; nothing was changed; connect as the owner of the schema outbox"
            ),
            _ => not_done(error, "nothing was changed"),
        })?;
        after = outbox::source(&mut conn)
            .await
            .context("the incarnation was raised; what it is now, --json tells")?;
    }
    let (old, new) = (before.to_string(), after.to_string());
    args.common.answer(&json!({"before": old, "after": new, "done": args.yes}), || {
        if args.yes {
            format!(
                "this outbox publishes as {new} from now on, instead of {old}\nsubscribers that follow \
                 versions need a baseline of every aggregate under {new}"
            )
        } else {
            format!(
                "this outbox would publish as {new} instead of {old}, and every subscriber would begin anew; \
                 add --yes to do it"
            )
        }
    })?;
    Ok(if args.yes { Verdict::Ok } else { Verdict::Attention })
}
