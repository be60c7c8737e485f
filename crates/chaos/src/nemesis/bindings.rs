//! Bindings that are removed, and what their queues have missed.

use std::time::Duration;

use anyhow::ensure;
use sqlx::Connection;

use super::retry::until_done;
use crate::{
    broker::{bind_aggregate, connect},
    event::{MEMO, NOTE, Stretch},
    field::Field,
    subscriber::QUEUE,
};

/// The projector's queue.
const PROJECTOR: &str = "score";

/// The binding of the projector's queue, which the projector makes itself whenever it connects. What the queue has
/// missed, an operator publishes again.
pub(crate) async fn score_unbound(field: &Field, lasts: Duration) -> anyhow::Result<()> {
    let missed = unbound(field, lasts, PROJECTOR, &["person"]).await?;
    repair(field, missed).await
}

/// The subscriber's bindings of notes and memos: no queue takes these events.
pub(crate) async fn notes_unbound(field: &Field, lasts: Duration) -> anyhow::Result<Stretch> {
    unbound(field, lasts, QUEUE, &[NOTE, MEMO]).await
}

/// The subscriber's binding of memos alone.
pub(crate) async fn memos_unbound(field: &Field, lasts: Duration) -> anyhow::Result<Stretch> {
    unbound(field, lasts, QUEUE, &[MEMO]).await
}

/// Removes bindings for so long. Returns the positions whose events the queue may have missed.
async fn unbound(field: &Field, lasts: Duration, queue: &str, types: &[&str]) -> anyhow::Result<Stretch> {
    positions_during(field, async {
        until_done(async || bind(field, queue, types, false).await).await?;
        tokio::time::sleep(lasts).await;
        until_done(async || bind(field, queue, types, true).await).await
    })
    .await
}

async fn bind(field: &Field, queue: &str, types: &[&str], bound: bool) -> anyhow::Result<()> {
    let (connection, channel) = connect(&field.addresses.broker).await?;
    for aggregate_type in types {
        bind_aggregate(&channel, queue, aggregate_type, bound).await?;
    }
    Ok(connection.close(200, "bye".into()).await?)
}

/// Does it, and returns the positions that may have been routed meanwhile.
pub(crate) async fn positions_during(
    field: &Field,
    work: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<Stretch> {
    let above = until_done(async || position(field, ROUTED).await).await?;
    work.await?;
    let to = until_done(async || position(field, GIVEN).await).await?;
    Ok(Stretch { above, to })
}

/// Up to where everything has been routed: what waits aside is settled, and was not.
const ROUTED: &str = "SELECT least((SELECT coalesce(min(low_water), 0) FROM outbox.relay),
                                   (SELECT min(position) - 1 FROM outbox.parked))";
/// The last position that was given.
const GIVEN: &str = "SELECT last_value FROM outbox.position";

/// What a removed binding has kept from the projector's queue, an operator publishes again, to that queue alone.
/// By type, since notes have no place there; the inbox brings it into order.
async fn repair(field: &Field, Stretch { above, to }: Stretch) -> anyhow::Result<()> {
    until_done(async || {
        let settled = position(field, "SELECT coalesce(min(low_water), 0) FROM outbox.relay").await?;
        ensure!(settled >= to, "a replay goes no further than the relay has settled: {settled} of {to}");
        Ok(())
    })
    .await?;
    let (from, to, database) = ((above + 1).to_string(), to.to_string(), field.addresses.url("person"));
    let env = [("DATABASE_URL", database.as_str()), ("AMQP_URL", &field.addresses.replay)];
    for types in ["person.*", "income.*", "asset.*", "debt.*"] {
        let range = ["replay", "--from", &from, "--to", &to, "--type", types];
        let args = [&range[..], &["--to-queue", PROJECTOR, "--rate", "20000"]].concat();
        // Other faults interrupt it.
        until_done(async || field.operator.command(&args, &env).await).await?;
    }
    Ok(())
}

async fn position(field: &Field, sql: &'static str) -> anyhow::Result<i64> {
    let mut conn = field.addresses.connect("person").await?;
    let position = sqlx::query_scalar(sql).fetch_one(&mut conn).await?;
    conn.close().await?;
    Ok(position)
}
