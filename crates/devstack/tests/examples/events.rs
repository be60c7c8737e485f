//! Events that no example writes: as a source does that is replayed, erased, restored, or forged.

use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions},
    types::{AMQPValue, FieldTable},
};
use serde_json::{Value, json};
use uuid::Uuid;

/// The source of these events.
pub(crate) const SOURCE: &str = "hand";
/// The user that publishes it.
pub(crate) const USER: &str = "devstack";

pub(crate) struct Event {
    type_: String,
    order: u32,
    version: i64,
    body: Value,
    source: String,
    user: Option<String>,
    headers: FieldTable,
}

/// An event of an order, whose body has the version as its status.
pub(crate) fn event(type_: &str, order: u32, version: i64) -> Event {
    let body =
        json!({"id": order, "status": format!("of {version}"), "total": 12_345_678_901_234_567_890_u64});
    let event = Event {
        type_: type_.to_owned(),
        order,
        version,
        body,
        source: SOURCE.to_owned(),
        user: Some(USER.to_owned()),
        headers: FieldTable::default(),
    };
    event
        .header("aggregate_type", "order")
        .header("aggregate_id", &order.to_string())
        .value("aggregate_version", AMQPValue::LongLongInt(version))
}

impl Event {
    fn value(mut self, name: &str, value: AMQPValue) -> Self {
        self.headers.insert(name.into(), value);
        self
    }

    pub(crate) fn header(self, name: &str, value: &str) -> Self {
        self.value(name, AMQPValue::LongString(value.into()))
    }

    pub(crate) fn flag(self, name: &str) -> Self {
        self.value(name, AMQPValue::Boolean(true))
    }

    /// Without its content.
    pub(crate) fn erased(self) -> Self {
        let body = json!({"id": self.order, "erased": true});
        self.body(body).flag("erased")
    }

    pub(crate) fn body(self, body: Value) -> Self {
        Self { body, ..self }
    }

    /// With another status.
    pub(crate) fn status(mut self, status: &str) -> Self {
        self.body["status"] = status.into();
        self
    }

    pub(crate) fn from(self, source: &str) -> Self {
        Self { source: source.to_owned(), ..self }
    }

    /// In the incarnation that follows the first.
    pub(crate) fn anew(self) -> Self {
        self.value("source_parent", AMQPValue::LongLongInt(1)).from(&format!("{SOURCE}~1764426123456"))
    }

    /// Without the user that the broker verifies.
    pub(crate) fn anonymous(self) -> Self {
        Self { user: None, ..self }
    }

    /// Its id. The same event has the same.
    pub(crate) fn id(&self) -> Uuid {
        id(&self.source, self.order, self.version)
    }
}

/// The id of an event.
fn id(source: &str, order: u32, version: i64) -> Uuid {
    let incarnation: u128 = if source.contains('~') { 2 } else { 1 };
    let number = (incarnation << 40) + (u128::from(order) << 16) + u128::try_from(version).unwrap();
    Uuid::from_u128(0x0198_c0de_0000_7000_8000_0000_0000_0000 + number)
}

/// The id of an event of the first incarnation.
pub(crate) fn id_of(order: u32, version: i64) -> String {
    id(SOURCE, order, version).to_string()
}

pub(crate) struct Publisher {
    channel: Channel,
    _connection: Connection,
}

impl Publisher {
    pub(crate) async fn new(amqp: &str) -> Self {
        let connection = Connection::connect(amqp, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        Self { channel, _connection: connection }
    }

    pub(crate) async fn publish(&self, event: Event) {
        let mut properties = BasicProperties::default()
            .with_message_id(event.id().to_string().as_str().into())
            .with_type(event.type_.as_str().into())
            .with_app_id(event.source.as_str().into())
            .with_headers(event.headers);
        if let Some(user) = event.user {
            properties = properties.with_user_id(user.as_str().into());
        }
        self.send(&event.type_, properties, event.body.to_string().as_bytes()).await;
    }

    /// A message that is no event, of the right source and user.
    pub(crate) async fn publish_nonsense(&self) {
        let mut headers = FieldTable::default();
        headers.insert("aggregate_type".into(), AMQPValue::LongString("order".into()));
        let properties = BasicProperties::default().with_app_id(SOURCE.into()).with_user_id(USER.into());
        self.send("order.new", properties.with_headers(headers), b"no event").await;
    }

    async fn send(&self, key: &str, properties: BasicProperties, body: &[u8]) {
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let published =
            self.channel.basic_publish("event_dispatcher".into(), key.into(), options, body, properties);
        let confirmed = published.await.unwrap().await.unwrap();
        assert!(confirmed.take_message().is_none(), "no queue takes it");
    }

    /// Removes what waits in a queue.
    pub(crate) async fn purge(&self, queue: &str) {
        self.channel.queue_purge(queue.into(), lapin::options::QueuePurgeOptions::default()).await.unwrap();
    }
}
