//! The way to one queue alone: a temporary exchange that leads there and nowhere else, so that routing keys stay.

use std::time::Duration;

use amqp::Reconnect;
use anyhow::Context;
use lapin::{
    ExchangeKind,
    options::{ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions},
    types::{FieldTable, ShortString},
};
use uuid::Uuid;

use crate::broker::{Broker, Link};

/// The broker answers within this time, or counts as away.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The temporary exchange, and the connection that declares it.
pub(super) struct OneQueue {
    broker: Broker,
    reconnect: Reconnect,
    link: Link,
    queue: ShortString,
    /// The temporary exchange.
    pub(super) exchange: ShortString,
}

impl OneQueue {
    /// Declares the exchange of the replay `id`.
    pub(super) async fn open(broker: Broker, queue: ShortString, id: Uuid) -> anyhow::Result<Self> {
        let exchange = ShortString::try_new(format!("outbox-replay.{id}")).ok().context("a UUID is short")?;
        let mut reconnect = Reconnect::default();
        let link = broker.connect(&mut reconnect).await?;
        let route = Self { broker, reconnect, link, queue, exchange };
        route.declare().await?;
        Ok(route)
    }

    async fn declare(&self) -> anyhow::Result<()> {
        let channel = &self.link.channel;
        let declare = async {
            let passive = QueueDeclareOptions { passive: true, ..Default::default() };
            channel.queue_declare(self.queue.clone(), passive, FieldTable::default()).await?;
            let options = ExchangeDeclareOptions { auto_delete: true, ..Default::default() };
            let (exchange, kind) = (self.exchange.clone(), ExchangeKind::Fanout);
            channel.exchange_declare(exchange.clone(), kind, options, FieldTable::default()).await?;
            let (key, options) = (ShortString::default(), QueueBindOptions::default());
            channel.queue_bind(self.queue.clone(), exchange, key, options, FieldTable::default()).await
        };
        tokio::time::timeout(TIMEOUT, declare)
            .await
            .with_context(|| format!("the broker did not answer within {TIMEOUT:?}"))?
            .with_context(|| {
                format!(
                    "the queue {} does not exist, or this user may not bind to it; the user of AMQP_URL needs configure, \
                     write and read on outbox-replay.*, and write on the queue",
                    self.queue
                )
            })
    }

    /// Declares it again: a broker that restarts forgets it. When that fails, the next attempt to publish tells why.
    pub(super) async fn restore(&mut self) {
        if !self.link.channel.status().connected() {
            match self.broker.connect(&mut self.reconnect).await {
                Ok(link) => self.link = link,
                Err(_) => return,
            }
        }
        let _ = self.declare().await;
    }

    /// Deletes it.
    pub(super) async fn close(self) {
        let delete = self.link.channel.exchange_delete(self.exchange, ExchangeDeleteOptions::default());
        let _ = tokio::time::timeout(TIMEOUT, delete).await;
        self.link.close().await;
    }
}
