use std::fmt::Write;

use chrono::{DateTime, Utc};
use lapin::{
    BasicProperties,
    message::Delivery,
    types::{AMQPValue, FieldTable},
};
use serde_json::{Map, Value, json};
use uuid::Uuid;

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

/// An event, as the contract describes it: a message that says which aggregate it is about and which
/// version of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// AMQP's `message_id`.
    pub id: Uuid,
    /// Who published it, with the incarnation (`person`, `person~2`): AMQP's `app_id`.
    pub source: String,
    /// What kind of thing it is about.
    pub aggregate_type: String,
    /// Which one.
    pub aggregate_id: String,
    /// The aggregate's version after this event: 1, 2, 3, … without holes.
    pub version: i64,
    /// The event type, as a rule also the routing key.
    pub type_: String,
    /// AMQP's `timestamp`, to the second.
    pub occurred_at: Option<DateTime<Utc>>,
    /// The headers beyond the aggregate's, without those that the broker adds (`x-…`).
    pub headers: Map<String, Value>,
    /// The body as it was published.
    pub payload: Vec<u8>,
}

/// Why a message is no event. Names the rule, never the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Every event carries it, this message does not.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// It is there, but not what it should be.
    #[error("{0} is not {1}")]
    Invalid(&'static str, &'static str),
}

/// The headers that become fields of an [`Event`].
const AGGREGATE_HEADERS: [&str; 3] = ["aggregate_type", "aggregate_id", "aggregate_version"];
const TEXT: &str = "a text of 1 to 255 bytes without NUL";
const VERSION: &str = "an integer of at least 1";

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
    /// Reads the event in it.
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
        // A flag of another type would be a jump or an erasure that is overlooked.
        for name in ["baseline", "erased", "replayed"] {
            if !matches!(headers.inner().get(name), None | Some(AMQPValue::Boolean(_))) {
                return Err(Malformed::Invalid(name, "a boolean"));
            }
        }
        Ok(Event {
            id: Uuid::try_parse(id.as_str()).map_err(|_| Malformed::Invalid("message_id", "a UUID"))?,
            source: property("app_id", properties.app_id())?,
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
                .map(|(name, value)| (name.as_str().to_owned(), to_json(value)))
                .collect(),
            payload: self.body.clone(),
        })
    }

    /// Everything but the body, for people who look at a rejected message.
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
            "headers": p.headers().as_ref().map(table),
        });
        if let Some(all) = all.as_object_mut() {
            all.retain(|_, value| !value.is_null());
        }
        all
    }
}

impl Event {
    /// It carries the aggregate's complete state, so it may follow any lower version.
    pub fn is_baseline(&self) -> bool {
        self.flag("baseline")
    }

    /// Its content was erased later: it advances the version and does nothing.
    pub fn is_erased(&self) -> bool {
        self.flag("erased")
    }

    /// It was published again on somebody's request.
    pub fn is_replayed(&self) -> bool {
        self.flag("replayed")
    }

    /// The trace it belongs to (W3C Trace Context).
    pub fn traceparent(&self) -> Option<&str> {
        self.headers.get("traceparent")?.as_str()
    }

    /// Whether it may follow any lower version: a baseline, or the end of the aggregate itself
    /// (`person.deleted` of a person, not `income.deleted`). Erased, it says nothing about the state.
    pub(crate) fn jumps(&self) -> bool {
        self.is_baseline() && !self.is_erased() || self.ends()
    }

    /// Whether the aggregate ends with it.
    pub(crate) fn ends(&self) -> bool {
        let deleted = self.type_.strip_suffix(".deleted").is_some_and(|of| of == self.aggregate_type);
        deleted && !self.is_erased()
    }

    /// When it was made, to the millisecond where its id tells (UUIDv7).
    pub(crate) fn made_at(&self) -> Option<DateTime<Utc>> {
        made_at(self.id).or(self.occurred_at)
    }

    fn flag(&self, name: &str) -> bool {
        self.headers.get(name) == Some(&Value::Bool(true))
    }
}

/// How often a message was delivered before and came back, as a quorum queue counts it.
pub(crate) fn returned(properties: &BasicProperties) -> i64 {
    let headers = properties.headers().as_ref();
    headers.and_then(|h| h.inner().get("x-delivery-count")).and_then(integer).unwrap_or(0)
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

/// Clients without typed headers send the version as digits.
fn version(value: &AMQPValue) -> Result<i64, Malformed> {
    let digits = match value {
        AMQPValue::LongString(digits) => Some(digits.as_bytes()),
        AMQPValue::ByteArray(digits) => Some(digits.as_slice()),
        _ => None,
    };
    digits
        .map_or_else(|| integer(value), |d| std::str::from_utf8(d).ok()?.parse().ok())
        .filter(|version| *version >= 1)
        .ok_or(Malformed::Invalid("aggregate_version", VERSION))
}

fn integer(value: &AMQPValue) -> Option<i64> {
    match *value {
        AMQPValue::ShortShortInt(n) => Some(n.into()),
        AMQPValue::ShortShortUInt(n) => Some(n.into()),
        AMQPValue::ShortInt(n) => Some(n.into()),
        AMQPValue::ShortUInt(n) => Some(n.into()),
        AMQPValue::LongInt(n) => Some(n.into()),
        AMQPValue::LongUInt(n) => Some(n.into()),
        AMQPValue::LongLongInt(n) => Some(n),
        _ => None,
    }
}

fn table(table: &FieldTable) -> Value {
    table.inner().iter().map(|(name, value)| (name.as_str().to_owned(), to_json(value))).collect()
}

fn to_json(value: &AMQPValue) -> Value {
    match value {
        AMQPValue::Boolean(b) => json!(b),
        AMQPValue::Float(f) => json!(f),
        AMQPValue::Double(f) => json!(f),
        AMQPValue::DecimalValue(d) => json!({"scale": d.scale, "value": d.value}),
        AMQPValue::ShortString(s) => json!(s.as_str()),
        AMQPValue::LongString(s) => bytes(s.as_bytes()),
        AMQPValue::ByteArray(b) => bytes(b.as_slice()),
        AMQPValue::FieldArray(all) => all.as_slice().iter().map(to_json).collect(),
        AMQPValue::Timestamp(seconds) => json!(seconds),
        AMQPValue::FieldTable(all) => table(all),
        AMQPValue::Void => Value::Null,
        number => integer(number).map_or(Value::Null, Value::from),
    }
}

/// Long strings are bytes by the protocol and texts by custom; what is no text is shown in hex.
fn bytes(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) => json!(text),
        Err(_) => json!({"hex": hex(bytes)}),
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut hex, b| {
        // Writing to a String cannot fail.
        let _ = write!(hex, "{b:02x}");
        hex
    })
}
