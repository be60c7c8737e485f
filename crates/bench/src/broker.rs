//! A bare publisher and a bare consumer: how fast the broker is when they do nothing else.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use futures_util::StreamExt;
use lapin::{
    Channel, Confirmation, Connection, ConnectionProperties, ExchangeKind,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
};
use tokio::{sync::Barrier, task::JoinSet, time::Instant};

use super::events::Message;

/// Where the relay publishes to.
const EXCHANGE: &str = "event_dispatcher";
/// How many messages wait for their confirms at a time: as many as on each lane of the relay.
const CONFIRM_WINDOW: usize = 250;
/// Prefetch of the consumer, and how many messages one acknowledgement covers: as in the projector.
const PREFETCH: u16 = 200;
const ACK_BATCH: usize = 100;

/// A connection with a channel.
#[derive(Debug)]
pub(crate) struct BrokerConnection {
    connection: Connection,
    pub(crate) channel: Channel,
}

impl BrokerConnection {
    pub(crate) async fn open(url: &str) -> anyhow::Result<Self> {
        let connection = Connection::connect(url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        Ok(Self { connection, channel })
    }

    pub(crate) async fn close(self) -> anyhow::Result<()> {
        Ok(self.connection.close(200, "bye".into()).await?)
    }

    /// Makes an empty quorum queue that every event is routed to.
    pub(crate) async fn fresh_queue(&self, name: &str) -> anyhow::Result<()> {
        self.private_queue(name).await?;
        let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
        let none = FieldTable::default();
        self.channel.exchange_declare(EXCHANGE.into(), ExchangeKind::Topic, durable, none).await?;
        self.bind(name, "#").await
    }

    /// Routes the events of these types to a queue.
    pub(crate) async fn bind(&self, queue: &str, types: &str) -> anyhow::Result<()> {
        let (bind, none) = (QueueBindOptions::default(), FieldTable::default());
        Ok(self.channel.queue_bind(queue.into(), EXCHANGE.into(), types.into(), bind, none).await?)
    }

    /// Makes an empty quorum queue without a binding. It has a single active consumer, as the projector's queue has.
    pub(crate) async fn private_queue(&self, name: &str) -> anyhow::Result<()> {
        self.channel.queue_delete(name.into(), QueueDeleteOptions::default()).await?;
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        self.channel.queue_declare(name.into(), durable, arguments).await?;
        Ok(())
    }

    /// How many messages wait in a queue.
    pub(crate) async fn waiting(&self, queue: &str) -> anyhow::Result<i64> {
        let look = QueueDeclareOptions { passive: true, ..Default::default() };
        let queue = self.channel.queue_declare(queue.into(), look, FieldTable::default()).await?;
        Ok(queue.message_count().into())
    }

    pub(crate) async fn delete_queue(&self, name: &str) -> anyhow::Result<()> {
        self.channel.queue_delete(name.into(), QueueDeleteOptions::default()).await?;
        Ok(())
    }

    /// Asks for confirms.
    pub(crate) async fn confirmed(self) -> anyhow::Result<Self> {
        self.channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(self)
    }

    /// Publishes messages and awaits their confirms.
    pub(crate) async fn publish(&self, window: Vec<Message>) -> anyhow::Result<()> {
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let mut confirms = Vec::with_capacity(window.len());
        for Message { key, properties, body } in window {
            let publish = self.channel.basic_publish(EXCHANGE.into(), key, options, &body, properties);
            confirms.push(publish.await?);
        }
        for confirm in confirms {
            let confirm = confirm.await?;
            ensure!(
                matches!(confirm, Confirmation::Ack(None)),
                "the broker did not confirm a message: {confirm:?}"
            );
        }
        Ok(())
    }

    /// Publishes a message to this queue alone, and awaits its confirm.
    pub(crate) async fn publish_to(&self, queue: &str, message: Message) -> anyhow::Result<()> {
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let Message { properties, body, .. } = message;
        let confirm = self.channel.basic_publish("".into(), queue.into(), options, &body, properties).await?;
        let confirm = confirm.await?;
        ensure!(
            matches!(confirm, Confirmation::Ack(None)),
            "the broker did not confirm a message: {confirm:?}"
        );
        Ok(())
    }

    /// Consumes from a queue, with so many messages sent prefetch.
    pub(crate) async fn consume(&self, queue: &str, prefetch: u16) -> anyhow::Result<lapin::Consumer> {
        self.channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
        let (options, none) = (BasicConsumeOptions::default(), FieldTable::default());
        Ok(self.channel.basic_consume(queue.into(), "".into(), options, none).await?)
    }
}

/// Publishes these messages on so many connections, and returns how long it took.
pub(crate) async fn publish(url: &str, messages: Vec<Message>, lanes: usize) -> anyhow::Result<Duration> {
    let mut shares: Vec<Vec<Message>> = vec![Vec::new(); lanes];
    for (n, message) in messages.into_iter().enumerate() {
        shares[n % lanes].push(message);
    }
    let ready = Arc::new(Barrier::new(lanes + 1));
    let mut tasks = JoinSet::new();
    for mut share in shares {
        let connection = BrokerConnection::open(url).await?.confirmed().await?;
        let ready = Arc::clone(&ready);
        tasks.spawn(async move {
            ready.wait().await;
            while !share.is_empty() {
                let rest = share.split_off(share.len().min(CONFIRM_WINDOW));
                connection.publish(std::mem::replace(&mut share, rest)).await?;
            }
            anyhow::Ok(connection)
        });
    }
    ready.wait().await;
    let begin = Instant::now();
    let mut connections = Vec::new();
    while let Some(connection) = tasks.join_next().await {
        connections.push(connection??);
    }
    let took = begin.elapsed();
    for connection in connections {
        connection.close().await?;
    }
    Ok(took)
}

/// Consumes and acknowledges so many messages from a queue, and returns how long it took, with the connect.
pub(crate) async fn consume(url: &str, queue: &str, count: i64) -> anyhow::Result<Duration> {
    let begin = Instant::now();
    let connection = BrokerConnection::open(url).await?;
    let mut deliveries = connection.consume(queue, PREFETCH).await?;
    let mut left = usize::try_from(count)?;
    while left > 0 {
        let mut last = 0;
        for _ in 0..left.min(ACK_BATCH) {
            last = deliveries.next().await.context("the broker cancelled the consumer")??.delivery_tag;
            left -= 1;
        }
        connection.channel.basic_ack(last, BasicAckOptions { multiple: true }).await?;
    }
    // The broker responds in order, so the acknowledgements have arrived.
    ensure!(connection.waiting(queue).await? == 0, "the queue {queue} is not empty");
    let took = begin.elapsed();
    connection.close().await?;
    Ok(took)
}
