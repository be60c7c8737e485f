use std::borrow::Cow;

use serde_json::{Map, Value, value::RawValue};
use sqlx::{Postgres, Transaction, types::Json};
use uuid::Uuid;

use crate::{AppendError, prepare};

/// An event to be appended with a version of the writer's own. Where the writer has none, [`publish`](crate::publish) takes
/// the next one.
#[derive(Clone, Debug)]
pub struct NewEvent {
    /// The event's own id, a UUIDv7: what a subscriber deduplicates by when it does not follow versions.
    pub id: Uuid,
    /// What kind of thing the event is about, 1 to 255 bytes.
    pub aggregate_type: Cow<'static, str>,
    /// Which one, 1 to 255 bytes. It travels in headers and logs, so it must not be personal data.
    pub aggregate_id: String,
    /// The aggregate's next version. Take it from the aggregate's row, under the row's lock, in the
    /// same transaction and before this call; then versions and positions rise together.
    pub version: i64,
    /// The event type and routing key, 1 to 255 bytes.
    pub type_: Cow<'static, str>,
    /// The body, forwarded byte for byte.
    pub payload: Box<RawValue>,
    /// Extra AMQP headers, such as `traceparent`.
    pub headers: Option<Map<String, Value>>,
}

/// A body has at most so many bytes: RabbitMQ's own default from 4.0 on. The schema says so too.
pub const MAX_PAYLOAD: usize = 16 * 1024 * 1024;
/// Headers have at most so many bytes, as JSON: a frame must hold them. The schema says so too.
pub const MAX_HEADERS: usize = 64 * 1024;
/// So many headers at most. The schema says so too.
pub const MAX_HEADER_COUNT: usize = 64;
/// So deep at most: a header's value is at depth 1, and what an array or an object in it has is one deeper. The
/// schema says so too.
pub const MAX_HEADER_DEPTH: usize = 4;

/// Appends events in the caller's transaction, in their order, in one round trip. Takes a transaction
/// by type: appending outside of one would be the dual write that an outbox is there to avoid.
///
/// Once the transaction is committed, call [`Waker::wake`](crate::Waker::wake); without it the events
/// leave a little later.
///
/// ```compile_fail
/// async fn dual_write(pool: sqlx::PgPool, event: outbox::NewEvent) {
///     outbox::append(&pool, &[event]).await.unwrap(); // a pool is no transaction
/// }
/// ```
pub async fn append(tx: &mut Transaction<'_, Postgres>, events: &[NewEvent]) -> Result<(), AppendError> {
    if events.is_empty() {
        return Ok(());
    }
    events.iter().try_for_each(check)?;
    let ids: Vec<Uuid> = events.iter().map(|e| e.id).collect();
    let aggregate_types: Vec<&str> = events.iter().map(|e| e.aggregate_type.as_ref()).collect();
    let aggregate_ids: Vec<&str> = events.iter().map(|e| e.aggregate_id.as_str()).collect();
    let versions: Vec<i64> = events.iter().map(|e| e.version).collect();
    let types: Vec<&str> = events.iter().map(|e| e.type_.as_ref()).collect();
    let payloads: Vec<&str> = events.iter().map(|e| e.payload.get()).collect();
    let headers: Vec<Option<Json<&Map<String, Value>>>> =
        events.iter().map(|e| e.headers.as_ref().map(Json)).collect();
    // The sort comes before the defaults are evaluated, so positions follow the order of the slice.
    // Payloads travel as text: a json array would be parsed twice.
    sqlx::query(
        "INSERT INTO outbox.event (id, aggregate_type, aggregate_id, version, type, payload, headers)
         SELECT id, aggregate_type, aggregate_id, version, type, payload::json, headers
         FROM unnest($1::uuid[], $2::text[], $3::text[], $4::bigint[], $5::text[], $6::text[], $7::jsonb[])
              WITH ORDINALITY AS new (id, aggregate_type, aggregate_id, version, type, payload, headers, n)
         ORDER BY n",
    )
    .bind(ids)
    .bind(aggregate_types)
    .bind(aggregate_ids)
    .bind(versions)
    .bind(types)
    .bind(payloads)
    .bind(headers)
    .persistent(prepare::by_name(tx))
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// What the relay would refuse later is its writer's error now.
fn check(event: &NewEvent) -> Result<(), AppendError> {
    let rule = if event.version == i64::MAX {
        Some("its version is the last that there is, which has no next one".to_owned())
    } else {
        content_rule(event.payload.get(), event.headers.as_ref())
    };
    rule.map_or(Ok(()), |rule| Err(AppendError::Unfit { id: event.id, type_: event.type_.clone(), rule }))
}

/// Which rule of the contract a body or headers break; none when they keep all.
pub(crate) fn content_rule(payload: &str, headers: Option<&Map<String, Value>>) -> Option<String> {
    let payload = payload.len();
    if payload > MAX_PAYLOAD {
        return Some(format!("its body has {payload} bytes, and at most {MAX_PAYLOAD} are allowed"));
    }
    let headers = headers?;
    let bytes = serde_json::to_string(headers).map_or(usize::MAX, |json| json.len());
    if bytes > MAX_HEADERS {
        return Some(format!("its headers have {bytes} bytes, and at most {MAX_HEADERS} are allowed"));
    }
    headers_rule(headers)
}

/// Which rule of the contract headers break, but for that of their size; none when they keep all.
pub fn headers_rule(headers: &Map<String, Value>) -> Option<String> {
    let count = headers.len();
    if count > MAX_HEADER_COUNT {
        return Some(format!("it has {count} headers, and at most {MAX_HEADER_COUNT} are allowed"));
    }
    for (name, value) in headers {
        if matches!(name.as_str(), "CC" | "BCC") {
            return Some(format!("it has a header named {name}, which RabbitMQ takes for more routing keys"));
        }
        if name.len() > 255 {
            return Some("a header's name is longer than 255 bytes".to_owned());
        }
        if is_deeper(value, MAX_HEADER_DEPTH - 1) {
            return Some(format!("a header is nested more than {MAX_HEADER_DEPTH} deep"));
        }
    }
    None
}

/// Whether something lies more than `levels` below a value. Looks no deeper than that.
fn is_deeper(value: &Value, levels: usize) -> bool {
    let deeper = |inner: &Value| levels == 0 || is_deeper(inner, levels - 1);
    match value {
        Value::Array(values) => values.iter().any(deeper),
        Value::Object(values) => values.values().any(deeper),
        _ => false,
    }
}
