//! A connection to the broker past all proxies, and the two exchanges.

use std::time::Duration;

use anyhow::Context;
use lapin::{
    Channel, Connection, ConnectionProperties,
    options::QueueBindOptions,
    types::{AMQPValue, FieldTable},
};

/// Where the relays publish to.
pub(crate) const EXCHANGE: &str = "event_dispatcher";
/// The same events, to be bound by their aggregates.
pub(crate) const BY_AGGREGATE: &str = "event_dispatcher.by_aggregate";
/// No answer of the broker takes longer.
const ANSWER: Duration = Duration::from_secs(20);

/// A connection past all proxies, with a channel.
pub(crate) async fn connect(url: &str) -> anyhow::Result<(Connection, Channel)> {
    let connecting = async {
        let connection = Connection::connect(url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        anyhow::Ok((connection, channel))
    };
    tokio::time::timeout(ANSWER, connecting).await.context("RabbitMQ does not answer")?
}

/// Binds a queue to all events of aggregates of this type, or removes the binding.
pub(crate) async fn bind_aggregate(
    channel: &Channel,
    queue: &str,
    aggregate_type: &str,
    bound: bool,
) -> anyhow::Result<()> {
    let mut matching = FieldTable::default();
    matching.insert("x-match".into(), AMQPValue::LongString("all".into()));
    matching.insert("aggregate_type".into(), AMQPValue::LongString(aggregate_type.into()));
    let (queue, exchange) = (queue.into(), BY_AGGREGATE.into());
    if bound {
        channel.queue_bind(queue, exchange, "".into(), QueueBindOptions::default(), matching).await?;
    } else {
        channel.queue_unbind(queue, exchange, "".into(), matching).await?;
    }
    Ok(())
}
