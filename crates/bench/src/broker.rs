//! The barest publisher and consumer: what the broker takes and gives when there is nothing else to do.

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
/// As many as the relay has on their way together on each lane.
const WINDOW: usize = 250;
/// As many as the projector lets the broker send ahead, and acknowledges together.
const AHEAD: u16 = 200;
const TOGETHER: usize = 100;

/// A connection with a channel.
#[derive(Debug)]
pub(crate) struct Link {
    connection: Connection,
    pub(crate) channel: Channel,
}

impl Link {
    pub(crate) async fn open(url: &str) -> anyhow::Result<Self> {
        let connection = Connection::connect(url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        Ok(Self { connection, channel })
    }

    pub(crate) async fn close(self) -> anyhow::Result<()> {
        Ok(self.connection.close(200, "bye".into()).await?)
    }

    /// An empty quorum queue that gets everything.
    pub(crate) async fn fresh_queue(&self, name: &str) -> anyhow::Result<()> {
        self.private_queue(name).await?;
        let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
        let none = FieldTable::default;
        self.channel.exchange_declare(EXCHANGE.into(), ExchangeKind::Topic, durable, none()).await?;
        let bind = QueueBindOptions::default();
        Ok(self.channel.queue_bind(name.into(), EXCHANGE.into(), "#".into(), bind, none()).await?)
    }

    /// An empty quorum queue that nothing is bound to. One consumer at a time, as with the projector's.
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
            ensure!(matches!(confirm, Confirmation::Ack(None)), "a message was not taken: {confirm:?}");
        }
        Ok(())
    }

    /// Publishes a message to one queue alone, and awaits its confirm.
    pub(crate) async fn publish_to(&self, queue: &str, message: Message) -> anyhow::Result<()> {
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let Message { properties, body, .. } = message;
        let confirm = self.channel.basic_publish("".into(), queue.into(), options, &body, properties).await?;
        let confirm = confirm.await?;
        ensure!(matches!(confirm, Confirmation::Ack(None)), "a message was not taken: {confirm:?}");
        Ok(())
    }

    /// Consumes from a queue, with so many messages sent ahead.
    pub(crate) async fn consume(&self, queue: &str, ahead: u16) -> anyhow::Result<lapin::Consumer> {
        self.channel.basic_qos(ahead, BasicQosOptions::default()).await?;
        let (options, none) = (BasicConsumeOptions::default(), FieldTable::default());
        Ok(self.channel.basic_consume(queue.into(), "".into(), options, none).await?)
    }
}

/// Publishes messages that are in memory, on so many connections, and says how long it took.
pub(crate) async fn publish(url: &str, messages: Vec<Message>, lanes: usize) -> anyhow::Result<Duration> {
    let mut shares: Vec<Vec<Message>> = vec![Vec::new(); lanes];
    for (n, message) in messages.into_iter().enumerate() {
        shares[n % lanes].push(message);
    }
    let ready = Arc::new(Barrier::new(lanes + 1));
    let mut tasks = JoinSet::new();
    for mut share in shares {
        let link = Link::open(url).await?.confirmed().await?;
        let ready = Arc::clone(&ready);
        tasks.spawn(async move {
            ready.wait().await;
            while !share.is_empty() {
                let rest = share.split_off(share.len().min(WINDOW));
                link.publish(std::mem::replace(&mut share, rest)).await?;
            }
            anyhow::Ok(link)
        });
    }
    ready.wait().await;
    let begin = Instant::now();
    let mut links = Vec::new();
    while let Some(link) = tasks.join_next().await {
        links.push(link??);
    }
    let took = begin.elapsed();
    for link in links {
        link.close().await?;
    }
    Ok(took)
}

/// Consumes so many messages from a queue and acknowledges them, and says how long it took, connecting
/// included.
pub(crate) async fn consume(url: &str, queue: &str, count: i64) -> anyhow::Result<Duration> {
    let begin = Instant::now();
    let link = Link::open(url).await?;
    let mut deliveries = link.consume(queue, AHEAD).await?;
    let mut left = usize::try_from(count)?;
    while left > 0 {
        let mut last = 0;
        for _ in 0..left.min(TOGETHER) {
            last = deliveries.next().await.context("the broker cancelled the consumer")??.delivery_tag;
            left -= 1;
        }
        link.channel.basic_ack(last, BasicAckOptions { multiple: true }).await?;
    }
    // The broker answers in order, so the acks have arrived.
    ensure!(link.waiting(queue).await? == 0, "the queue {queue} is not empty");
    let took = begin.elapsed();
    link.close().await?;
    Ok(took)
}
