//! An event as AMQP carries it: its routing key, its properties and its headers.

use std::fmt;

use chrono::SecondsFormat;
use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable, ShortString},
};
use serde_json::Value;

use outbox::{MAX_HEADERS, MAX_PAYLOAD, Source};

use crate::event::Event;

/// Who publishes, as messages carry it.
#[derive(Clone, Debug)]
pub struct Origin {
    app_id: String,
    parent: Option<i64>,
    began_at_position: i64,
    cloudevents: bool,
}

impl Origin {
    /// Messages have the attributes of CloudEvents as well, or not.
    #[must_use]
    pub fn with_cloudevents(self, cloudevents: bool) -> Self {
        Self { cloudevents, ..self }
    }

    /// The source, with its incarnation.
    pub fn source(&self) -> &str {
        &self.app_id
    }
}

impl From<&Source> for Origin {
    fn from(source: &Source) -> Self {
        Self {
            app_id: source.to_string(),
            parent: source.parent,
            began_at_position: source.began_at_position,
            cloudevents: false,
        }
    }
}

impl Origin {
    /// Whether an event starts the chain of its aggregate also for who knows a chain of an earlier incarnation. A version 1
    /// from before the incarnation began may have been published once, before the database went back in time.
    fn starts_chain(&self, event: &Event) -> bool {
        self.parent.is_some() && event.version == 1 && event.position > self.began_at_position
    }
}

/// The relay's own headers, also where an event has none of them: a writer could break its aggregate's chain with them.
const NEVER_THE_WRITERS: [&str; 3] = ["previous_id", "source_parent", "chain_start"];

/// What the binding of CloudEvents to AMQP has before each attribute's name. It prefers this one to `cloudEvents:`, which
/// JMS does not allow.
const CLOUDEVENTS: &str = "cloudEvents_";

/// The attributes of CloudEvents 1.0, in binary mode: the body stays as it is, and `content_type` is its
/// `datacontenttype`.
fn cloudevents(event: &Event, origin: &Origin) -> [(&'static str, String); 6] {
    [
        ("specversion", "1.0".to_owned()),
        ("id", event.id.to_string()),
        ("source", origin.app_id.clone()),
        ("type", event.type_.clone()),
        ("subject", format!("{}/{}", event.aggregate_type, event.aggregate_id)),
        ("time", event.created_at.to_rfc3339_opts(SecondsFormat::Micros, true)),
    ]
}

/// As `app_id` spells it.
impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.app_id)
    }
}

/// The routing key and properties of an event; an error says why AMQP cannot carry it.
pub fn message(event: &Event, origin: &Origin) -> Result<(ShortString, BasicProperties), String> {
    let short = |what: &str, text: &str| {
        ShortString::try_new(text).map_err(|_| format!("{what} is longer than 255 bytes"))
    };
    let bytes = event.payload.len();
    if bytes > MAX_PAYLOAD {
        return Err(format!("its body has {bytes} bytes, and at most {MAX_PAYLOAD} are published"));
    }
    let mut headers = FieldTable::default();
    // A header frame above about 128 KiB would end the whole connection.
    if event.headers.as_ref().is_some_and(|h| serde_json::to_string(h).map_or(0, |s| s.len()) > MAX_HEADERS) {
        return Err(format!("its headers are larger than {MAX_HEADERS} bytes"));
    }
    if let Some(rule) = event.headers.as_ref().and_then(outbox::headers_rule) {
        return Err(rule);
    }
    // Longer ones would not fit beside the rest, and a schema without its checks could hold them.
    let bounded =
        |what: &str, text: &str| short(what, text).map(|text| AMQPValue::LongString(text.as_str().into()));
    let own =
        |name: &str| NEVER_THE_WRITERS.contains(&name) || origin.cloudevents && name.starts_with(CLOUDEVENTS);
    for (name, value) in event.headers.iter().flatten().filter(|(name, _)| !own(name)) {
        headers.insert(short("a header's name", name)?, header(value));
    }
    // After the writer's own headers, so that none of them can take these names.
    headers.insert("aggregate_type".into(), bounded("the aggregate's type", &event.aggregate_type)?);
    headers.insert("aggregate_id".into(), bounded("the aggregate's id", &event.aggregate_id)?);
    headers.insert("aggregate_version".into(), AMQPValue::LongLongInt(event.version));
    if let Some(previous) = event.previous_id {
        headers.insert("previous_id".into(), AMQPValue::LongString(previous.to_string().into()));
    }
    if let Some(parent) = origin.parent {
        headers.insert("source_parent".into(), AMQPValue::LongLongInt(parent));
    }
    if origin.starts_chain(event) {
        headers.insert("chain_start".into(), AMQPValue::Boolean(true));
    }
    if origin.cloudevents {
        for (name, value) in cloudevents(event, origin) {
            let name = format!("{CLOUDEVENTS}{name}");
            headers.insert(short("a header's name", &name)?, AMQPValue::LongString(value.into()));
        }
    }
    let key = short("the type", &event.type_)?;
    let mut properties = BasicProperties::default()
        .with_message_id(event.id.to_string().as_str().into())
        .with_type(key.clone())
        .with_app_id(short("the source", &origin.app_id)?)
        .with_content_type("application/json".into())
        // Persistent.
        .with_delivery_mode(2)
        .with_headers(headers);
    // AMQP counts from 1970 on. An earlier time is left out: 0 would be a lie.
    if let Ok(seconds) = u64::try_from(event.created_at.timestamp()) {
        properties = properties.with_timestamp(seconds);
    }
    Ok((key, properties))
}

/// A JSON value as an AMQP field. Numbers that are no 64-bit integer keep their exact text.
fn header(value: &Value) -> AMQPValue {
    match value {
        Value::Null => AMQPValue::Void,
        Value::Bool(b) => AMQPValue::Boolean(*b),
        Value::Number(n) => {
            n.as_i64().map_or_else(|| AMQPValue::LongString(n.to_string().into()), AMQPValue::LongLongInt)
        }
        Value::String(s) => AMQPValue::LongString(s.as_str().into()),
        Value::Array(_) | Value::Object(_) => AMQPValue::LongString(value.to_string().into()),
    }
}
