use chrono::{DateTime, Utc};
use lapin::{BasicProperties, message::Delivery, types::AMQPValue};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::{headers, incarnation::Incarnation, malformed::Malformed};

/// A message as the broker delivered it.
#[derive(Clone, Debug)]
pub struct Envelope {
    /// The routing key it was published with.
    pub routing_key: String,
    /// AMQP's properties, headers included.
    pub properties: BasicProperties,
    /// The body.
    pub body: Vec<u8>,
}

/// An event, as the contract describes it: a message that names its aggregate and the aggregate's version.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// AMQP's `message_id`.
    pub id: Uuid,
    /// The source with its incarnation (`shop`, `shop~2`): AMQP's `app_id`.
    pub source: String,
    /// The type of the aggregate.
    pub aggregate_type: String,
    /// The id of the aggregate.
    pub aggregate_id: String,
    /// The aggregate's version after this event: 1, 2, 3, … without holes.
    pub version: i64,
    /// The event type, usually also the routing key.
    pub type_: String,
    /// AMQP's `timestamp`, to the second.
    pub occurred_at: Option<DateTime<Utc>>,
    /// The other headers, without those that the broker adds (`x-…`).
    pub headers: Map<String, Value>,
    /// The body as it was published.
    pub payload: Vec<u8>,
    /// It begins the aggregate's chain in a new incarnation of the source, and the handler has a state of the aggregate
    /// from an earlier one. That state is of a history that was lost: end it first, then apply the event. The sequencer
    /// sets this; a parsed message does not have it.
    pub begins_anew: bool,
}

/// The largest body of an event, as the outbox has it: RabbitMQ's own default for a message from 4.0 on.
const LARGEST_BODY: usize = 16 * 1024 * 1024;

/// The headers that become fields of an [`Event`].
const AGGREGATE_HEADERS: [&str; 3] = ["aggregate_type", "aggregate_id", "aggregate_version"];
const TEXT: &str = "a text of 1 to 255 bytes without NUL";
/// Without the largest integer, so that every version has a next one.
const VERSION: &str = "an integer from 1 to 2^63 - 2";
const SOURCE: &str = "a name, or a name, `~` and the number of an incarnation";
const INCARNATION: &str = "an integer from 1 to 2^63 - 1";
const CHAIN_START: &str = "chain_start";
const SOURCE_PARENT: &str = "source_parent";
const PREVIOUS_ID: &str = "previous_id";

impl From<Delivery> for Envelope {
    fn from(delivery: Delivery) -> Self {
        Self {
            routing_key: delivery.routing_key.as_str().to_owned(),
            properties: delivery.properties,
            body: delivery.data,
        }
    }
}

impl Envelope {
    /// Parses the event in the message.
    ///
    /// ```
    /// # fn example(message: inbox::Envelope) {
    /// match message.event() {
    ///     Ok(event) => println!("version {} of {}/{}", event.version, event.aggregate_type, event.aggregate_id),
    ///     Err(malformed) => println!("not an event: {malformed}"),
    /// }
    /// # }
    /// ```
    pub fn event(&self) -> Result<Event, Malformed> {
        let properties = &self.properties;
        let id = properties.message_id().as_ref().ok_or(Malformed::Missing("message_id"))?;
        let headers = properties.headers().as_ref().ok_or(Malformed::Missing("headers"))?;
        let header = |name| headers.inner().get(name).ok_or(Malformed::Missing(name));
        let property = |name, value: &Option<lapin::types::ShortString>| match value {
            Some(value) => text(name, value.as_str().as_bytes()),
            None => Err(Malformed::Missing(name)),
        };
        let header_text = |name| match header(name)? {
            AMQPValue::LongString(value) => text(name, value.as_bytes()),
            AMQPValue::ShortString(value) => text(name, value.as_str().as_bytes()),
            AMQPValue::ByteArray(value) => text(name, value.as_slice()),
            _ => Err(Malformed::Invalid(name, TEXT)),
        };
        headers::check(headers)?;
        if self.body.len() > LARGEST_BODY {
            return Err(Malformed::Large);
        }
        // A flag of another type would be a jump or an erasure that is overlooked.
        for name in ["baseline", "erased", "replayed", CHAIN_START] {
            if !matches!(headers.inner().get(name), None | Some(AMQPValue::Boolean(_))) {
                return Err(Malformed::Invalid(name, "a boolean"));
            }
        }
        if headers.inner().get(SOURCE_PARENT).is_some_and(|parent| number(parent).is_none()) {
            return Err(Malformed::Invalid(SOURCE_PARENT, INCARNATION));
        }
        let source = property("app_id", properties.app_id())?;
        if Incarnation::parse(&source).is_none() {
            return Err(Malformed::Invalid("app_id", SOURCE));
        }
        Ok(Event {
            id: Uuid::try_parse(id.as_str()).map_err(|_| Malformed::Invalid("message_id", "a UUID"))?,
            source,
            aggregate_type: header_text("aggregate_type")?,
            aggregate_id: header_text("aggregate_id")?,
            version: version(header("aggregate_version")?)?,
            type_: property("type", properties.kind())?,
            occurred_at: properties
                .timestamp()
                .and_then(|seconds| DateTime::from_timestamp(seconds.try_into().ok()?, 0)),
            headers: headers
                .inner()
                .iter()
                .filter(|(name, _)| {
                    !AGGREGATE_HEADERS.contains(&name.as_str()) && !name.as_str().starts_with("x-")
                })
                .map(|(name, value)| (name.as_str().to_owned(), headers::to_json(value)))
                .collect(),
            payload: self.body.clone(),
            begins_anew: false,
        })
    }

    /// Everything except the body, for an operator who reads a rejected message. Bounded in bytes and depth.
    pub(crate) fn properties_json(&self) -> Value {
        let p = &self.properties;
        let text = |value: &Option<lapin::types::ShortString>| value.as_ref().map(|v| v.as_str().to_owned());
        let mut all = json!({
            "message_id": text(p.message_id()),
            "type": text(p.kind()),
            "app_id": text(p.app_id()),
            "timestamp": p.timestamp(),
            "content_type": text(p.content_type()),
            "content_encoding": text(p.content_encoding()),
            "delivery_mode": p.delivery_mode(),
            "priority": p.priority(),
            "correlation_id": text(p.correlation_id()),
            "reply_to": text(p.reply_to()),
            "expiration": text(p.expiration()),
            "user_id": text(p.user_id()),
            "headers": p.headers().as_ref().map(headers::stored),
        });
        if let Some(all) = all.as_object_mut() {
            all.retain(|_, value| !value.is_null());
        }
        all
    }
}

impl Event {
    /// Whether it has the aggregate's complete state, so that it may follow any lower version.
    ///
    /// ```
    /// # let event = inbox::Event {
    /// #     id: uuid::Uuid::nil(),
    /// #     source: "shop".to_owned(),
    /// #     aggregate_type: "order".to_owned(),
    /// #     aggregate_id: "7".to_owned(),
    /// #     version: 1,
    /// #     type_: "order.new".to_owned(),
    /// #     occurred_at: None,
    /// #     headers: serde_json::Map::new(),
    /// #     payload: b"{}".to_vec(),
    /// #     begins_anew: false,
    /// # };
    /// let mut event = event;
    /// assert!(!event.is_baseline());
    /// event.headers.insert("baseline".to_owned(), true.into());
    /// assert!(event.is_baseline());
    /// ```
    pub fn is_baseline(&self) -> bool {
        self.flag("baseline")
    }

    /// Whether its content was erased: it advances the version and has no other effect.
    ///
    /// ```
    /// # let event = inbox::Event {
    /// #     id: uuid::Uuid::nil(),
    /// #     source: "shop".to_owned(),
    /// #     aggregate_type: "order".to_owned(),
    /// #     aggregate_id: "7".to_owned(),
    /// #     version: 1,
    /// #     type_: "order.new".to_owned(),
    /// #     occurred_at: None,
    /// #     headers: serde_json::Map::new(),
    /// #     payload: b"{}".to_vec(),
    /// #     begins_anew: false,
    /// # };
    /// let mut event = event;
    /// assert!(!event.is_erased());
    /// event.headers.insert("erased".to_owned(), true.into());
    /// assert!(event.is_erased());
    /// ```
    pub fn is_erased(&self) -> bool {
        self.flag("erased")
    }

    /// Whether an operator had it published again.
    ///
    /// ```
    /// # let event = inbox::Event {
    /// #     id: uuid::Uuid::nil(),
    /// #     source: "shop".to_owned(),
    /// #     aggregate_type: "order".to_owned(),
    /// #     aggregate_id: "7".to_owned(),
    /// #     version: 1,
    /// #     type_: "order.new".to_owned(),
    /// #     occurred_at: None,
    /// #     headers: serde_json::Map::new(),
    /// #     payload: b"{}".to_vec(),
    /// #     begins_anew: false,
    /// # };
    /// let mut event = event;
    /// assert!(!event.is_replayed());
    /// event.headers.insert("replayed".to_owned(), true.into());
    /// assert!(event.is_replayed());
    /// ```
    pub fn is_replayed(&self) -> bool {
        self.flag("replayed")
    }

    /// Whether its aggregate was created after the incarnation of the source had begun, with this event. Only events of
    /// version 1 have it, and none of a source's first incarnation.
    ///
    /// ```
    /// # let event = inbox::Event {
    /// #     id: uuid::Uuid::nil(),
    /// #     source: "shop".to_owned(),
    /// #     aggregate_type: "order".to_owned(),
    /// #     aggregate_id: "7".to_owned(),
    /// #     version: 1,
    /// #     type_: "order.new".to_owned(),
    /// #     occurred_at: None,
    /// #     headers: serde_json::Map::new(),
    /// #     payload: b"{}".to_vec(),
    /// #     begins_anew: false,
    /// # };
    /// let mut event = event;
    /// assert!(!event.is_chain_start());
    /// event.headers.insert("chain_start".to_owned(), true.into());
    /// assert!(event.is_chain_start());
    /// ```
    pub fn is_chain_start(&self) -> bool {
        self.flag(CHAIN_START)
    }

    /// The incarnation that the event's incarnation of the source follows. None for a source's first incarnation, and
    /// where it is not known.
    ///
    /// ```
    /// # let event = inbox::Event {
    /// #     id: uuid::Uuid::nil(),
    /// #     source: "shop".to_owned(),
    /// #     aggregate_type: "order".to_owned(),
    /// #     aggregate_id: "7".to_owned(),
    /// #     version: 1,
    /// #     type_: "order.new".to_owned(),
    /// #     occurred_at: None,
    /// #     headers: serde_json::Map::new(),
    /// #     payload: b"{}".to_vec(),
    /// #     begins_anew: false,
    /// # };
    /// let mut event = event;
    /// assert_eq!(event.source_parent(), None);
    /// event.source = "shop~1764426123456".to_owned();
    /// event.headers.insert("source_parent".to_owned(), 1.into());
    /// assert_eq!(event.source_parent(), Some(1));
    /// ```
    pub fn source_parent(&self) -> Option<i64> {
        match self.headers.get(SOURCE_PARENT)? {
            Value::String(digits) => digits.parse().ok(),
            number => number.as_i64(),
        }
    }

    /// The id of the event before it in its aggregate's chain. None at the start of a chain, and where it is not known: a
    /// source may not send it, and what is no id says nothing.
    ///
    /// ```
    /// # let event = inbox::Event {
    /// #     id: uuid::Uuid::nil(),
    /// #     source: "shop".to_owned(),
    /// #     aggregate_type: "order".to_owned(),
    /// #     aggregate_id: "7".to_owned(),
    /// #     version: 2,
    /// #     type_: "order.changed".to_owned(),
    /// #     occurred_at: None,
    /// #     headers: serde_json::Map::new(),
    /// #     payload: b"{}".to_vec(),
    /// #     begins_anew: false,
    /// # };
    /// let mut event = event;
    /// assert_eq!(event.previous_id(), None);
    /// event.headers.insert("previous_id".to_owned(), "0198c5b1-7d3a-7c11-9b1e-0a4c5d6e7f80".into());
    /// assert!(event.previous_id().is_some());
    /// ```
    pub fn previous_id(&self) -> Option<Uuid> {
        previous_id(self.headers.get(PREVIOUS_ID)?)
    }

    /// Its trace (W3C Trace Context).
    ///
    /// ```
    /// # let event = inbox::Event {
    /// #     id: uuid::Uuid::nil(),
    /// #     source: "shop".to_owned(),
    /// #     aggregate_type: "order".to_owned(),
    /// #     aggregate_id: "7".to_owned(),
    /// #     version: 1,
    /// #     type_: "order.new".to_owned(),
    /// #     occurred_at: None,
    /// #     headers: serde_json::Map::new(),
    /// #     payload: b"{}".to_vec(),
    /// #     begins_anew: false,
    /// # };
    /// assert_eq!(event.traceparent(), None);
    /// ```
    pub fn traceparent(&self) -> Option<&str> {
        self.headers.get("traceparent")?.as_str()
    }

    /// Its properties and headers, as [`Envelope::properties_json`] has those of its message.
    pub(crate) fn properties_json(&self) -> Value {
        let mut headers = self.headers.clone();
        let aggregate =
            [self.aggregate_type.as_str().into(), self.aggregate_id.as_str().into(), self.version.into()];
        headers.extend(AGGREGATE_HEADERS.map(str::to_owned).into_iter().zip(aggregate));
        let mut all = json!({
            "message_id": self.id,
            "type": self.type_,
            "app_id": self.source,
            "headers": headers::bounded(headers),
        });
        if let (Some(all), Some(at)) = (all.as_object_mut(), self.occurred_at) {
            all.insert("timestamp".to_owned(), at.timestamp().into());
        }
        all
    }

    /// Whether it may follow any lower version: a baseline, or the end of the aggregate itself
    /// (`order.deleted` of an order, not `line.deleted`). Erased, it says nothing about the state.
    pub(crate) fn jumps(&self) -> bool {
        !self.is_erased() && (self.is_baseline() || is_deletion(&self.type_, &self.aggregate_type))
    }

    /// The event that has to be applied before it. None where that is unknown, or where it may follow any.
    pub(crate) fn follows(&self) -> Option<Uuid> {
        self.previous_id().filter(|_| !self.jumps())
    }

    /// Whether the aggregate ends with it.
    pub(crate) fn ends(&self) -> bool {
        is_deletion(&self.type_, &self.aggregate_type) && !self.is_erased()
    }

    /// When it was created: to the millisecond by its id (UUIDv7), otherwise to the second.
    pub(crate) fn made_at(&self) -> Option<DateTime<Utc>> {
        made_at(self.id).or(self.occurred_at)
    }

    fn flag(&self, name: &str) -> bool {
        self.headers.get(name) == Some(&Value::Bool(true))
    }
}

/// The id in the header of this name. The zero UUID stands for none.
pub(crate) fn previous_id(header: &Value) -> Option<Uuid> {
    Uuid::try_parse(header.as_str()?).ok().filter(|id| !id.is_nil())
}

/// Whether a type is that of an aggregate's own deletion.
pub(crate) fn is_deletion(type_: &str, aggregate_type: &str) -> bool {
    type_.strip_suffix(".deleted") == Some(aggregate_type)
}

/// How often a message was delivered before and returned, as a quorum queue counts it.
pub(crate) fn returned(properties: &BasicProperties) -> i64 {
    let headers = properties.headers().as_ref();
    headers.and_then(|h| h.inner().get("x-delivery-count")).and_then(headers::integer).unwrap_or(0)
}

/// The time in a UUIDv7.
pub(crate) fn made_at(id: Uuid) -> Option<DateTime<Utc>> {
    if id.get_version_num() != 7 {
        return None;
    }
    let (seconds, nanos) = id.get_timestamp()?.to_unix();
    DateTime::from_timestamp(seconds.try_into().ok()?, nanos)
}

fn text(name: &'static str, bytes: &[u8]) -> Result<String, Malformed> {
    match std::str::from_utf8(bytes) {
        // NUL cannot be stored in a PostgreSQL text.
        Ok(text) if (1..=255).contains(&bytes.len()) && !text.contains('\0') => Ok(text.to_owned()),
        _ => Err(Malformed::Invalid(name, TEXT)),
    }
}

fn version(value: &AMQPValue) -> Result<i64, Malformed> {
    number(value)
        .filter(|version| *version < i64::MAX)
        .ok_or(Malformed::Invalid("aggregate_version", VERSION))
}

/// A number from 1 on. Clients without typed headers send it as digits.
fn number(value: &AMQPValue) -> Option<i64> {
    let digits = match value {
        AMQPValue::LongString(digits) => Some(digits.as_bytes()),
        AMQPValue::ByteArray(digits) => Some(digits.as_slice()),
        _ => None,
    };
    digits
        .map_or_else(|| headers::integer(value), |d| std::str::from_utf8(d).ok()?.parse().ok())
        .filter(|number| *number >= 1)
}
