use lapin::{
    Channel, Connection, ErrorKind, ExchangeKind,
    options::{
        ExchangeBindOptions, ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions,
        QueueDeclareOptions, QueueDeleteOptions,
    },
    protocol::{AMQPErrorKind, AMQPSoftError},
    types::{AMQPValue, FieldTable, ShortString},
};

/// How often the broker redelivers a message before it moves it to the dead letters, where it is taken
/// alone. Deliveries are used up by consumers that die, not by events that are refused.
const DELIVERY_LIMIT: i64 = 20;
/// Dead letters are redelivered until they are settled. From RabbitMQ 4.0 on a queue without a limit
/// drops after 20, and before it there is no spelling for "none".
const NO_DELIVERY_LIMIT: i64 = 1_000_000_000;

/// A subscriber's exchange, the aggregate types that it follows, and its own queue.
///
/// A declaration can be repeated, and it checks: when a queue exists with other properties, the broker names the
/// difference, and the consumer waits with that reason. A queue's arguments can never be changed, so they are complete
/// from the start:
///
/// - `quorum`, durable: replicated where there is a cluster, and deliveries are counted.
/// - `x-delivery-limit`: explicit, because the default changed with RabbitMQ 4.0. A policy can lower it.
/// - dead letters to the fanout exchange `<queue>.dead`, `at-least-once`, with the routing key that they
///   had, into the queue `<queue>.dead`. The same sequencer consumes that queue.
/// - `x-overflow: reject-publish`: at-least-once dead-lettering needs it. When a policy limits the queue's length, the
///   publisher waits, and no message is dropped.
/// - `x-single-active-consumer`: other replicas stand by. The order does not depend on it, but replicas that share a
///   queue would hold many events and wait for each other's locks.
///
/// Settings that may change later (length, expiry) are left to policies.
#[derive(Clone, Debug)]
pub struct Topology {
    exchange: ShortString,
    by_aggregate: ShortString,
    queue: ShortString,
    dead: ShortString,
    aggregate_types: Vec<String>,
}

/// A name that AMQP cannot carry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} must be 1 to {limit} bytes long")]
pub struct InvalidTopology {
    what: &'static str,
    limit: usize,
}

impl Topology {
    /// `queue` receives every event of `aggregate_types` from the topic exchange `exchange`, through the headers exchange
    /// `by_aggregate`. This includes event types that are invented later.
    ///
    /// ```
    /// use inbox::Topology;
    ///
    /// // The queue `stock` receives all events of orders.
    /// let topology = Topology::new("event_dispatcher", "event_dispatcher.by_aggregate", "stock", &["order"]);
    /// assert!(topology.is_ok());
    /// ```
    pub fn new(
        exchange: &str,
        by_aggregate: &str,
        queue: &str,
        aggregate_types: &[&str],
    ) -> Result<Self, InvalidTopology> {
        let name = |what, name: &str, limit| match ShortString::try_new(name) {
            Ok(short) if (1..=limit).contains(&name.len()) => Ok(short),
            _ => Err(InvalidTopology { what, limit }),
        };
        for aggregate_type in aggregate_types {
            name("an aggregate type", aggregate_type, 255)?;
        }
        Ok(Self {
            exchange: name("the exchange's name", exchange, 255)?,
            by_aggregate: name("the name of the exchange by aggregate", by_aggregate, 255)?,
            queue: name("the queue's name", queue, 250)?,
            dead: name("the name of the queue of dead letters", &format!("{queue}.dead"), 255)?,
            aggregate_types: aggregate_types.iter().map(|&t| t.to_owned()).collect(),
        })
    }

    /// The subscriber's queue.
    pub(crate) fn queue(&self) -> &ShortString {
        &self.queue
    }

    /// The queue of its dead letters.
    pub(crate) fn dead(&self) -> &ShortString {
        &self.dead
    }

    /// Whether the subscriber's queue does not exist. The refusal closes the channel, so it is one of its own.
    pub(crate) async fn lacks_queue(&self, connection: &Connection) -> lapin::Result<bool> {
        let channel = connection.create_channel().await?;
        let options = QueueDeclareOptions { passive: true, ..Default::default() };
        match channel.queue_declare(self.queue.clone(), options, FieldTable::default()).await {
            Ok(_) => channel.close(200, "bye".into()).await.map(|()| false),
            Err(error) => match error.kind() {
                // Whatever else it is, the declaration says so.
                ErrorKind::ProtocolError(amqp) => {
                    Ok(amqp.kind() == &AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND))
                }
                _ => Err(error),
            },
        }
    }

    /// Declares everything, the source of each arrow before the arrow.
    pub(crate) async fn declare(&self, channel: &Channel) -> lapin::Result<()> {
        let exchange = |name: &ShortString, kind| {
            let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
            channel.exchange_declare(name.clone(), kind, options, FieldTable::default())
        };
        exchange(&self.exchange, ExchangeKind::Topic).await?;
        exchange(&self.by_aggregate, ExchangeKind::Headers).await?;
        exchange(&self.dead, ExchangeKind::Fanout).await?;
        channel
            .exchange_bind(
                self.by_aggregate.clone(),
                self.exchange.clone(),
                "#".into(),
                ExchangeBindOptions::default(),
                FieldTable::default(),
            )
            .await?;

        // The dead letters' queue first, so that no letter is ever without one.
        self.declare_queue(channel, &self.dead, NO_DELIVERY_LIMIT, &[]).await?;
        self.bind(channel, &self.dead, &self.dead, FieldTable::default()).await?;
        let dead_lettering =
            [("x-dead-letter-exchange", self.dead.as_str()), ("x-dead-letter-strategy", "at-least-once")];
        self.declare_queue(channel, &self.queue, DELIVERY_LIMIT, &dead_lettering).await?;
        for aggregate_type in &self.aggregate_types {
            self.bind(channel, &self.queue, &self.by_aggregate, matching(aggregate_type)).await?;
        }
        Ok(())
    }

    /// Deletes the queues, with the exchange of the dead letters. The bindings go first: a publisher whose
    /// message is routed to a quorum queue that is being deleted gets a nack, or loses its connection
    /// (rabbitmq-server#15333).
    pub(crate) async fn delete(&self, channel: &Channel) -> lapin::Result<()> {
        for aggregate_type in &self.aggregate_types {
            let (queue, exchange) = (self.queue.clone(), self.by_aggregate.clone());
            channel.queue_unbind(queue, exchange, "".into(), matching(aggregate_type)).await?;
        }
        for queue in [&self.queue, &self.dead] {
            channel.queue_delete(queue.clone(), QueueDeleteOptions::default()).await?;
        }
        channel.exchange_delete(self.dead.clone(), ExchangeDeleteOptions::default()).await
    }

    async fn declare_queue(
        &self,
        channel: &Channel,
        name: &ShortString,
        delivery_limit: i64,
        texts: &[(&'static str, &str)],
    ) -> lapin::Result<()> {
        let mut arguments = FieldTable::default();
        let common = [("x-queue-type", "quorum"), ("x-overflow", "reject-publish")];
        for (argument, text) in common.iter().chain(texts) {
            arguments.insert((*argument).into(), AMQPValue::LongString((*text).into()));
        }
        arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(delivery_limit));
        arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
        let options = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare(name.clone(), options, arguments).await.map(drop)
    }

    async fn bind(
        &self,
        channel: &Channel,
        queue: &ShortString,
        exchange: &ShortString,
        matching: FieldTable,
    ) -> lapin::Result<()> {
        let options = QueueBindOptions::default();
        channel.queue_bind(queue.clone(), exchange.clone(), "".into(), options, matching).await
    }
}

/// The arguments of a binding to every event of the aggregates of a type.
fn matching(aggregate_type: &str) -> FieldTable {
    let mut matching = FieldTable::default();
    matching.insert("x-match".into(), AMQPValue::LongString("all".into()));
    matching.insert("aggregate_type".into(), AMQPValue::LongString(aggregate_type.into()));
    matching
}
