//! Publishing a window of events, and knowing what became of each.

use std::{collections::HashSet, time::Duration};

use lapin::{
    BasicProperties, Confirmation, ErrorKind,
    message::BasicReturnMessage,
    options::BasicPublishOptions,
    protocol::{AMQPErrorKind, AMQPSoftError},
    types::{AMQPValue, FieldTable, ShortString},
};
use serde_json::Value;

use outbox::{MAX_HEADERS, MAX_PAYLOAD};

use crate::{
    broker::{BrokerError, Link},
    failpoint,
    reader::Event,
    sabotage::{self, Guard},
};

/// How long a window may take to be written and to be confirmed. While the broker blocks the
/// connection, publishing would hang for ever.
const TIMEOUT: Duration = Duration::from_secs(30);

/// What became of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The broker has it, in at least one queue.
    Confirmed,
    /// The broker took it, but no queue did.
    Unroutable,
    /// The broker could not take it now, for example because a queue is full.
    Nacked,
    /// It is refused for itself.
    Refused {
        /// Why.
        why: String,
        /// AMQP cannot carry it: no broker would take it, so it was not sent. Otherwise the broker said so.
        certain: bool,
    },
}

/// Publishes a window of events, at most one of each aggregate, and awaits every confirm, for as long as
/// it is `allowed`. An error leaves their fate unknown: discard the link and publish all of them again.
pub async fn publish(
    link: &Link,
    exchange: &ShortString,
    source: &str,
    window: &[&Event],
    allowed: impl Fn() -> bool,
) -> Result<Vec<Fate>, BrokerError> {
    let timeout = || match link.condition() {
        Ok(Some(reason)) => BrokerError::Publish(format!("the broker blocks publishers: {reason}")),
        _ => BrokerError::Publish(format!("no confirm within {TIMEOUT:?}")),
    };
    let work = async {
        let mut confirms = Vec::with_capacity(window.len());
        for event in window {
            let message = match message(event, source) {
                Ok(message) => message,
                Err(reason) => {
                    confirms.push(Err(reason));
                    continue;
                }
            };
            if !allowed() {
                return Err(BrokerError::NoLease);
            }
            let options = BasicPublishOptions { mandatory: true, ..Default::default() };
            let (key, properties) = message;
            let publish = link.channel.basic_publish(
                exchange.clone(),
                key,
                options,
                event.payload.as_bytes(),
                properties,
            );
            confirms.push(Ok(publish.await.map_err(|e| failed(&e))?));
        }
        failpoint::hit("publish");
        if sabotage::is_off(Guard::Confirms) {
            return Ok(vec![Fate::Confirmed; window.len()]);
        }
        let mut fates = Vec::with_capacity(window.len());
        let mut returned = Vec::new();
        for confirm in confirms {
            fates.push(match confirm {
                Err(why) => Fate::Refused { why: format!("AMQP cannot carry it: {why}"), certain: true },
                Ok(confirm) => match confirm.await.map_err(|e| failed(&e))? {
                    Confirmation::Ack(message) => {
                        returned.extend(message);
                        Fate::Confirmed
                    }
                    Confirmation::Nack(message) => {
                        returned.extend(message);
                        Fate::Nacked
                    }
                    Confirmation::NotRequested => {
                        return Err(BrokerError::Publish("the channel is not in confirm mode".to_owned()));
                    }
                },
            });
        }
        // A return can hang on the wrong confirm when the broker acks several at once; what it says by
        // its message id is certain. It always comes before the ack of its own message.
        returned.extend(link.channel.wait_for_confirms().await.map_err(|e| failed(&e))?);
        mark_returned(&mut fates, window, &returned)?;
        Ok(fates)
    };
    tokio::time::timeout(TIMEOUT, work).await.map_err(|_| timeout())?
}

/// A channel that the broker closed over what was published, or anything else that went wrong.
fn failed(error: &lapin::Error) -> BrokerError {
    if let ErrorKind::ProtocolError(amqp) = error.kind()
        && let AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED | AMQPSoftError::ACCESSREFUSED) =
            amqp.kind()
    {
        return BrokerError::Refused(amqp.get_message().to_string());
    }
    BrokerError::Publish(error.to_string())
}

fn mark_returned(
    fates: &mut [Fate],
    window: &[&Event],
    returned: &[BasicReturnMessage],
) -> Result<(), BrokerError> {
    let mut ids: HashSet<&str> = HashSet::with_capacity(returned.len());
    for message in returned {
        let id = message.delivery.properties.message_id().as_ref().map(ShortString::as_str);
        ids.insert(id.ok_or_else(|| BrokerError::Publish("a message came back without its id".to_owned()))?);
    }
    if ids.is_empty() {
        return Ok(());
    }
    for (fate, event) in fates.iter_mut().zip(window) {
        if ids.remove(event.id.to_string().as_str()) && *fate == Fate::Confirmed {
            *fate = Fate::Unroutable;
        }
    }
    if ids.is_empty() {
        Ok(())
    } else {
        Err(BrokerError::Publish("a message came back that is not in the window".to_owned()))
    }
}

/// The routing key and properties of an event; an error says why AMQP cannot carry it.
fn message(event: &Event, source: &str) -> Result<(ShortString, BasicProperties), String> {
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
    for (name, value) in event.headers.iter().flatten() {
        if matches!(name.as_str(), "CC" | "BCC") {
            return Err(format!("it has a header named {name}, which RabbitMQ takes for more routing keys"));
        }
        headers.insert(short("a header's name", name)?, header(value));
    }
    // After the writer's own headers, so that none of them can take these names.
    headers.insert("aggregate_type".into(), AMQPValue::LongString(event.aggregate_type.as_str().into()));
    headers.insert("aggregate_id".into(), AMQPValue::LongString(event.aggregate_id.as_str().into()));
    headers.insert("aggregate_version".into(), AMQPValue::LongLongInt(event.version));
    let key = short("the type", &event.type_)?;
    let properties = BasicProperties::default()
        .with_message_id(event.id.to_string().as_str().into())
        .with_type(key.clone())
        .with_app_id(short("the source", source)?)
        .with_timestamp(u64::try_from(event.created_at.timestamp()).unwrap_or(0))
        .with_content_type("application/json".into())
        // Persistent.
        .with_delivery_mode(2)
        .with_headers(headers);
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
