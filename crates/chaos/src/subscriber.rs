//! A subscriber past all proxies. It has a durable queue for every event, and records each delivery.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context;
use futures_util::{FutureExt, StreamExt};
use lapin::{
    Channel, Connection, ExchangeKind,
    message::Delivery,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicQosOptions, ExchangeBindOptions, ExchangeDeclareOptions,
        QueueBindOptions, QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable, ShortString},
};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::{
    broker::{BY_AGGREGATE, EXCHANGE, bind_aggregate, connect},
    event::{AggregateKey, EventSummary, MEMO, NOTE, ScoreEntry, hash},
    violation::{Violation, Violations},
};

/// Its queue.
pub(crate) const QUEUE: &str = "witness";
/// Its bindings by event type: every type but those of notes and memos.
const BINDINGS: [&str; 5] = ["person.#", "income.#", "asset.#", "debt.#", "score.#"];
/// How many messages the broker sends ahead, and one acknowledgement covers.
const PREFETCH: u16 = 500;
/// The pause before it connects again.
const PAUSE: Duration = Duration::from_millis(200);

/// Everything that was delivered.
#[derive(Debug, Default)]
pub(crate) struct Deliveries {
    pub(crate) chains: HashMap<AggregateKey, BTreeMap<i64, EventSummary>>,
    /// Versions that were delivered for the first time after a later one.
    pub(crate) inversions: Vec<(AggregateKey, i64)>,
    pub(crate) total: u64,
    /// Deliveries of events that had been delivered before.
    pub(crate) repeated: u64,
}

/// The subscriber.
#[derive(Debug)]
pub(crate) struct Subscriber {
    url: String,
    violations: Arc<Violations>,
    deliveries: Mutex<Deliveries>,
}

impl Subscriber {
    /// Declares its queue.
    pub(crate) async fn new(url: &str, violations: Arc<Violations>) -> anyhow::Result<Self> {
        let subscriber = Self { url: url.to_owned(), violations, deliveries: Mutex::default() };
        let (connection, channel) = subscriber.connect().await?;
        let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
        channel
            .exchange_declare(EXCHANGE.into(), ExchangeKind::Topic, durable, FieldTable::default())
            .await?;
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        // Without a limit a quorum queue of RabbitMQ 3 redelivers out of order.
        arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(1_000_000));
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare(QUEUE.into(), durable, arguments).await?;
        let (options, none) = (QueueBindOptions::default(), FieldTable::default());
        for binding in BINDINGS {
            channel.queue_bind(QUEUE.into(), EXCHANGE.into(), binding.into(), options, none.clone()).await?;
        }
        let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
        channel.exchange_declare(BY_AGGREGATE.into(), ExchangeKind::Headers, durable, none.clone()).await?;
        let options = ExchangeBindOptions::default();
        channel.exchange_bind(BY_AGGREGATE.into(), EXCHANGE.into(), "#".into(), options, none).await?;
        for aggregate_type in [NOTE, MEMO] {
            bind_aggregate(&channel, QUEUE, aggregate_type, true).await?;
        }
        connection.close(200, "bye".into()).await?;
        Ok(subscriber)
    }

    /// Consumes until `stop`.
    pub(crate) async fn run(&self, stop: &CancellationToken) {
        while !stop.is_cancelled() {
            // The session ends when the broker does.
            let _away = stop.run_until_cancelled(self.session()).await;
            stop.run_until_cancelled(tokio::time::sleep(PAUSE)).await;
        }
    }

    /// What came so far.
    pub(crate) fn deliveries(&self) -> MutexGuard<'_, Deliveries> {
        self.deliveries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn connect(&self) -> anyhow::Result<(Connection, Channel)> {
        connect(&self.url).await
    }

    async fn session(&self) -> anyhow::Result<()> {
        let (_connection, channel) = self.connect().await?;
        channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
        let (options, none) = (BasicConsumeOptions::default(), FieldTable::default());
        let mut deliveries = channel.basic_consume(QUEUE.into(), "".into(), options, none).await?;
        while let Some(delivery) = deliveries.next().await {
            let mut last = self.record(&delivery?);
            for _ in 1..PREFETCH {
                let Some(Some(delivery)) = deliveries.next().now_or_never() else { break };
                last = self.record(&delivery?);
            }
            channel.basic_ack(last, BasicAckOptions { multiple: true }).await?;
        }
        Ok(())
    }

    /// Records a delivery, and returns its tag.
    fn record(&self, delivery: &Delivery) -> u64 {
        match read(delivery) {
            Ok((key, version, seen)) => self.record_event(key, version, seen, delivery.redelivered),
            Err(error) => self
                .violations
                .add(Violation::EventWrong, format!("a delivery that is not an event: {error:#}")),
        }
        delivery.delivery_tag
    }

    fn record_event(&self, key: AggregateKey, version: i64, seen: EventSummary, redelivered: bool) {
        let mut deliveries = self.deliveries();
        deliveries.total += 1;
        let chain = deliveries.chains.entry(key.clone()).or_default();
        let behind = chain.last_key_value().is_some_and(|(last, _)| *last > version);
        let Some(before) = chain.get_mut(&version) else {
            chain.insert(version, seen);
            // The broker may redeliver out of order.
            if behind && !redelivered {
                deliveries.inversions.push((key, version));
            }
            return;
        };
        let (of, contradiction) = (format!("{}/{} version {version}", key.0, key.1), before.id != seen.id);
        if contradiction {
            let (one, other) = (before.id, seen.id);
            self.violations.add(Violation::EventTakenBack, format!("{of}: event {one}, then event {other}"));
        } else if before.hash != seen.hash && !before.erased && !seen.erased {
            self.violations
                .add(Violation::EventWrong, format!("{of}: event {} came with two bodies", seen.id));
        }
        deliveries.repeated += 1;
    }
}

/// Reads a message, and checks what the contract promises of every one.
fn read(delivery: &Delivery) -> anyhow::Result<(AggregateKey, i64, EventSummary)> {
    let properties = &delivery.properties;
    let text = |value: &Option<ShortString>| value.as_ref().map(|value| value.as_str().to_owned());
    let headers = properties.headers().as_ref().context("no headers")?;
    let header = |name: &str| match headers.inner().get(name) {
        Some(AMQPValue::LongString(text)) => Ok(text.to_string()),
        other => anyhow::bail!("the header {name} is {other:?}"),
    };
    let version = match headers.inner().get("aggregate_version") {
        Some(AMQPValue::LongLongInt(version)) => *version,
        other => anyhow::bail!("the header aggregate_version is {other:?}"),
    };
    let key = (header("aggregate_type")?, header("aggregate_id")?);
    let id = text(properties.message_id()).context("no message_id")?.parse()?;
    let type_ = text(properties.kind()).context("no type")?;
    let source = if key.0 == "score" { "score" } else { "person" };
    let of = format!("{}/{} version {version}", key.0, key.1);
    anyhow::ensure!(type_ == delivery.routing_key.as_str(), "{of}: its type is not its routing key");
    anyhow::ensure!(text(properties.app_id()).as_deref() == Some(source), "{of}: another app_id");
    anyhow::ensure!(*properties.delivery_mode() == Some(2), "{of}: not persistent");
    let body: Value = serde_json::from_slice(&delivery.data).with_context(|| format!("{of}: its body"))?;
    let number = |name: &str| body[name].as_number().map(ToString::to_string);
    let entry = number("score").zip(number("total")).filter(|_| key.0 == "score");
    let seen = EventSummary {
        id,
        type_,
        hash: hash(&delivery.data),
        record: body["id"].as_str().unwrap_or_default().to_owned(),
        erased: body["erased"] == Value::Bool(true),
        entry: entry.map(|(score, total)| ScoreEntry { score, total }),
    };
    Ok((key, version, seen))
}
