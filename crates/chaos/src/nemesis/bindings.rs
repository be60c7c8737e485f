//! Bindings that are removed, and the repair of the queue that has missed events.

use std::time::Duration;

use anyhow::ensure;
use sqlx::Connection;
use tokio::sync::Mutex;

use super::retry::until_done;
use crate::{
    broker::{bind_aggregate, connect},
    event::{MEMO, NOTE, PositionRange},
    subscriber::QUEUE,
    testbed::Testbed,
};

/// One fault at a time where notes go: while the subscriber is unbound, another queue would have the only copy of what it
/// takes, and a full quorum queue takes one event more now and then.
pub(super) static NOTES: Mutex<()> = Mutex::const_new(());

/// The projector's queue.
const PROJECTOR: &str = "score";

/// Removes the binding of the projector's queue, which the projector also makes whenever it connects. An operator replays
/// the events that the queue has missed.
pub(crate) async fn score_unbound(testbed: &Testbed, lasts: Duration) -> anyhow::Result<()> {
    let missed = unbound(testbed, lasts, PROJECTOR, &["person"]).await?;
    repair(testbed, missed).await
}

/// Removes the subscriber's bindings of notes and memos. These events are unroutable.
pub(crate) async fn notes_unbound(testbed: &Testbed, lasts: Duration) -> anyhow::Result<PositionRange> {
    let _one = NOTES.lock().await;
    unbound(testbed, lasts, QUEUE, &[NOTE, MEMO]).await
}

/// Removes the subscriber's binding of memos alone.
pub(crate) async fn memos_unbound(testbed: &Testbed, lasts: Duration) -> anyhow::Result<PositionRange> {
    let _one = NOTES.lock().await;
    unbound(testbed, lasts, QUEUE, &[MEMO]).await
}

/// Removes bindings for so long, and returns the positions whose events the queue may have missed.
async fn unbound(
    testbed: &Testbed,
    lasts: Duration,
    queue: &str,
    types: &[&str],
) -> anyhow::Result<PositionRange> {
    positions_during(testbed, async {
        until_done(async || bind(testbed, queue, types, false).await).await?;
        tokio::time::sleep(lasts).await;
        until_done(async || bind(testbed, queue, types, true).await).await
    })
    .await
}

async fn bind(testbed: &Testbed, queue: &str, types: &[&str], bound: bool) -> anyhow::Result<()> {
    let (connection, channel) = connect(&testbed.addresses.broker).await?;
    for aggregate_type in types {
        bind_aggregate(&channel, queue, aggregate_type, bound).await?;
    }
    Ok(connection.close(200, "bye".into()).await?)
}

/// Runs `work`, and returns the positions that may have been published meanwhile.
pub(crate) async fn positions_during(
    testbed: &Testbed,
    work: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<PositionRange> {
    let after = until_done(async || position(testbed, ROUTED).await).await?;
    work.await?;
    let through = until_done(async || position(testbed, TAKEN).await).await?;
    Ok(PositionRange { after, through })
}

/// Up to this position every event has been routed. A parked event counts as settled, and was not routed.
const ROUTED: &str = "SELECT least((SELECT coalesce(min(low_water), 0) FROM outbox.relay),
                                   (SELECT min(position) - 1 FROM outbox.parked))";
/// The last position that was taken.
const TAKEN: &str = "SELECT last_value FROM outbox.position";

/// Replays these positions to the projector's queue alone: one replay for each event type, because notes do not belong
/// there. The inbox restores the order.
async fn repair(testbed: &Testbed, PositionRange { after, through }: PositionRange) -> anyhow::Result<()> {
    until_done(async || {
        let settled = position(testbed, "SELECT coalesce(min(low_water), 0) FROM outbox.relay").await?;
        ensure!(settled >= through, "the relay has settled {settled} of {through}: a replay goes no further");
        Ok(())
    })
    .await?;
    let (from, to, database) =
        ((after + 1).to_string(), through.to_string(), testbed.addresses.url("person"));
    let env = [("DATABASE_URL", database.as_str()), ("AMQP_URL", &testbed.addresses.replay)];
    for types in ["person.*", "income.*", "asset.*", "debt.*"] {
        let range = ["replay", "--from", &from, "--to", &to, "--type", types];
        let args = [&range[..], &["--to-queue", PROJECTOR, "--rate", "20000", "--yes"]].concat();
        // Other faults interrupt it, so it is tried again.
        until_done(async || testbed.operator.command(&args, &env).await).await?;
    }
    Ok(())
}

async fn position(testbed: &Testbed, sql: &'static str) -> anyhow::Result<i64> {
    let mut conn = testbed.addresses.connect("person").await?;
    let position = sqlx::query_scalar(sql).fetch_one(&mut conn).await?;
    conn.close().await?;
    Ok(position)
}
