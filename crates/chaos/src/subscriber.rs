//! A subscriber past all proxies. It has a durable queue for every event, and records each delivery.

use std::{
    collections::{BTreeMap, HashMap, HashSet, btree_map::Entry},
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
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    broker::{BY_AGGREGATE, EXCHANGE, bind_aggregate, connect},
    event::{AggregateKey, EventSummary, Incarnation, MEMO, NOTE, source_of},
    violation::{Violation, Violations},
};

/// Its queue.
pub(crate) const QUEUE: &str = "witness";
/// Its bindings by event type: every type but those of notes and memos. Events that cannot be published have the type of
/// notes, and only their deletion its own.
const BINDINGS: [&str; 6] = ["person.#", "income.#", "asset.#", "debt.#", "score.#", "unpublishable.#"];
/// How many messages the broker sends ahead, and one acknowledgement covers.
const PREFETCH: u16 = 500;
/// The pause before it connects again.
const PAUSE: Duration = Duration::from_millis(200);

/// Everything that was delivered.
#[derive(Debug, Default)]
pub(crate) struct Deliveries {
    /// The events of each aggregate, in each incarnation of its source.
    pub(crate) chains: HashMap<Chain, BTreeMap<i64, EventSummary>>,
    /// Other events at a version that was delivered before: one of both must be of a lost time.
    pub(crate) contradictions: Vec<(Chain, i64, EventSummary)>,
    /// Versions that were delivered for the first time after a later one.
    pub(crate) inversions: Vec<(Chain, i64)>,
    /// The chains that have a baseline, a deletion or the start of the chain, so that an earlier one ends.
    pub(crate) begun: HashSet<Chain>,
    /// The newest incarnation of each source.
    newest: HashMap<&'static str, Incarnation>,
    /// The ids of all events.
    pub(crate) ids: HashSet<Uuid>,
    /// Deliveries of an incarnation after those of a later one.
    pub(crate) superseded: u64,
    pub(crate) total: u64,
    /// Deliveries of events that had been delivered before.
    pub(crate) repeated: u64,
}

/// An aggregate in an incarnation of its source.
pub(crate) type Chain = (Incarnation, AggregateKey);

impl Deliveries {
    /// This event, if it was delivered.
    pub(crate) fn find(&self, chain: &Chain, version: i64, id: Uuid) -> Option<&EventSummary> {
        let first = self.chains.get(chain).and_then(|events| events.get(&version));
        let others = self.contradictions.iter().filter(|(of, at, _)| of == chain && *at == version);
        first.into_iter().chain(others.map(|(_, _, event)| event)).find(|event| event.id == id)
    }
}

/// A message.
struct Message {
    chain: Chain,
    version: i64,
    event: EventSummary,
    /// The incarnation that its own one follows.
    parent: Option<Incarnation>,
    begins: bool,
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
            Ok(message) => self.record_event(message, delivery.redelivered),
            Err(error) => self
                .violations
                .add(Violation::EventWrong, format!("a delivery that is not an event: {error:#}")),
        }
        delivery.delivery_tag
    }

    fn record_event(&self, message: Message, redelivered: bool) {
        let Message { chain: key, version, event: seen, parent, begins } = message;
        let (incarnation, of) = (key.0, format!("{}/{} version {version}", key.1.0, key.1.1));
        let mut deliveries = self.deliveries();
        deliveries.total += 1;
        deliveries.ids.insert(seen.id);
        let newest = deliveries.newest.entry(source_of(&key.1.0)).or_insert(1);
        if incarnation > *newest {
            if parent != Some(*newest) {
                let example = format!(
                    "{of}: incarnation {incarnation} follows {parent:?}, and {newest} was the newest"
                );
                self.violations.add(Violation::EventWrong, example);
            }
            *newest = incarnation;
        } else if incarnation < *newest {
            deliveries.superseded += 1;
        }
        if begins {
            deliveries.begun.insert(key.clone());
        }
        let chain = deliveries.chains.entry(key.clone()).or_default();
        let behind = chain.last_key_value().is_some_and(|(last, _)| *last > version);
        if let Entry::Vacant(first) = chain.entry(version) {
            first.insert(seen);
            // The broker may redeliver out of order.
            if behind && !redelivered {
                deliveries.inversions.push((key, version));
            }
            return;
        }
        match deliveries.find(&key, version, seen.id) {
            None => deliveries.contradictions.push((key, version, seen)),
            Some(before) => {
                if before.hash != seen.hash && !before.erased && !seen.erased {
                    let example = format!("{of}: event {} came with two bodies", seen.id);
                    self.violations.add(Violation::EventWrong, example);
                }
                deliveries.repeated += 1;
            }
        }
    }
}

/// Reads a message, and checks what the contract promises of every one.
fn read(delivery: &Delivery) -> anyhow::Result<Message> {
    let properties = &delivery.properties;
    let text = |value: &Option<ShortString>| value.as_ref().map(|value| value.as_str().to_owned());
    let headers = properties.headers().as_ref().context("no headers")?.inner();
    let header = |name: &str| match headers.get(name) {
        Some(AMQPValue::LongString(text)) => Ok(text.to_string()),
        other => anyhow::bail!("the header {name} is {other:?}"),
    };
    let version = match headers.get("aggregate_version") {
        Some(AMQPValue::LongLongInt(version)) => *version,
        other => anyhow::bail!("the header aggregate_version is {other:?}"),
    };
    let key = (header("aggregate_type")?, header("aggregate_id")?);
    let of = format!("{}/{} version {version}", key.0, key.1);
    let parent = match headers.get("source_parent") {
        None => None,
        Some(AMQPValue::LongLongInt(parent)) => Some(*parent),
        other => anyhow::bail!("{of}: the header source_parent is {other:?}"),
    };
    let id = text(properties.message_id()).context("no message_id")?.parse()?;
    let type_ = text(properties.kind()).context("no type")?;
    anyhow::ensure!(type_ == delivery.routing_key.as_str(), "{of}: its type is not its routing key");
    let app_id = text(properties.app_id()).unwrap_or_default();
    let (source, incarnation) = match app_id.split_once('~') {
        None => (app_id.as_str(), 1),
        Some((source, incarnation)) => {
            (source, incarnation.parse().with_context(|| format!("{of}: its app_id"))?)
        }
    };
    anyhow::ensure!(source == source_of(&key.0), "{of}: another app_id");
    anyhow::ensure!(parent.is_some() == (incarnation > 1), "{of}: {app_id} follows {parent:?}");
    anyhow::ensure!(*properties.delivery_mode() == Some(2), "{of}: not persistent");
    let is_true = |name: &str| matches!(headers.get(name), Some(AMQPValue::Boolean(true)));
    let begins = is_true("baseline") || is_true("chain_start") || type_ == format!("{}.deleted", key.0);
    let erased = is_true("erased");
    let event = EventSummary::new(id, type_, &key.0, &delivery.data, erased)
        .with_context(|| format!("{of}: its body"))?;
    Ok(Message { chain: (incarnation, key), version, event, parent, begins })
}
