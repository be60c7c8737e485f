//! AMQP headers: the rules for an event's, and all of them as JSON.

use std::fmt::Write;

use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Map, Value, json};

use crate::malformed::Malformed;

/// How deep a header's value may be nested.
const DEPTH: usize = 4;
/// How many headers an event may have, without those that the broker adds.
const HEADERS: usize = 100;
/// How many bytes of a rejected message's headers are stored, as JSON.
const MAX_STORED_HEADERS: usize = 16 * 1024;
/// Replaces a value that is nested too deep.
const TOO_DEEP: &str = "(nested too deep; not kept)";

pub(crate) fn integer(value: &AMQPValue) -> Option<i64> {
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

/// Whether all of the headers arrived, and are such as an event may have.
pub(crate) fn check(headers: &FieldTable) -> Result<(), Malformed> {
    match headers.inner().get(amqp::REMOVED) {
        None => {}
        // Only the broker's own note of where the message has been.
        Some(AMQPValue::FieldTable(removed))
            if removed.inner().keys().all(|name| name.as_str() == "x-death") => {}
        Some(_) => {
            return Err(Malformed::Headers("could not be received whole; `x-removed` names what is missing"));
        }
    }
    let mut own =
        headers.inner().iter().filter(|(name, _)| !name.as_str().starts_with("x-")).map(|(_, value)| value);
    if own.clone().count() > HEADERS {
        return Err(Malformed::Headers("are more than 100"));
    }
    if own.any(|value| is_deep(value, DEPTH)) {
        return Err(Malformed::Headers("are nested more than 4 levels deep"));
    }
    Ok(())
}

/// Whether a value is nested in more than so many levels.
fn is_deep(value: &AMQPValue, levels: usize) -> bool {
    match (value, levels.checked_sub(1)) {
        (AMQPValue::FieldArray(_) | AMQPValue::FieldTable(_), None) => true,
        (AMQPValue::FieldArray(all), Some(levels)) => {
            all.as_slice().iter().any(|value| is_deep(value, levels))
        }
        (AMQPValue::FieldTable(all), Some(levels)) => {
            all.inner().values().any(|value| is_deep(value, levels))
        }
        _ => false,
    }
}

/// The headers of a rejected message, as far as they are stored.
pub(crate) fn stored(headers: &FieldTable) -> Value {
    bounded(headers.inner().iter().map(|(name, value)| (name.as_str().to_owned(), to_json(value))))
}

/// As many of the headers as are stored of a rejected message.
pub(crate) fn bounded(headers: impl IntoIterator<Item = (String, Value)>) -> Value {
    let mut stored = Map::new();
    let (mut left, mut missing) = (MAX_STORED_HEADERS, 0);
    for (name, value) in headers {
        match left.checked_sub(name.len() + value.to_string().len()) {
            Some(rest) => {
                left = rest;
                stored.insert(name, value);
            }
            None => missing += 1,
        }
    }
    if missing > 0 {
        stored.insert("…".to_owned(), format!("({missing} more, too large to be kept)").into());
    }
    stored.into()
}

/// A header's value as JSON.
pub(crate) fn to_json(value: &AMQPValue) -> Value {
    to_json_within(value, DEPTH)
}

/// With at most so many levels of arrays and tables.
fn to_json_within(value: &AMQPValue, levels: usize) -> Value {
    let within = levels.saturating_sub(1);
    match value {
        AMQPValue::FieldArray(_) | AMQPValue::FieldTable(_) if levels == 0 => TOO_DEEP.into(),
        AMQPValue::Boolean(b) => json!(b),
        AMQPValue::Float(f) => json!(f),
        AMQPValue::Double(f) => json!(f),
        AMQPValue::DecimalValue(d) => json!({"scale": d.scale, "value": d.value}),
        AMQPValue::ShortString(s) => json!(s.as_str()),
        AMQPValue::LongString(s) => bytes(s.as_bytes()),
        AMQPValue::ByteArray(b) => bytes(b.as_slice()),
        AMQPValue::FieldArray(all) => {
            all.as_slice().iter().map(|value| to_json_within(value, within)).collect()
        }
        AMQPValue::Timestamp(seconds) => json!(seconds),
        AMQPValue::FieldTable(all) => all
            .inner()
            .iter()
            .map(|(name, value)| (name.as_str().to_owned(), to_json_within(value, within)))
            .collect(),
        AMQPValue::Void => Value::Null,
        number => integer(number).map_or(Value::Null, Value::from),
    }
}

/// The protocol's long strings are bytes. Clients use them for texts; other bytes are written in hex.
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
