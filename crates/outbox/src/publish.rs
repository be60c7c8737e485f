use std::{borrow::Cow, collections::BTreeSet};

use serde::Serialize;
use serde_json::{Map, Value, value::RawValue};
use sqlx::{Postgres, Transaction, types::Json};
use uuid::Uuid;

use crate::{AppendError, append::content_rule, prepare};

/// An event to be published, without a version: [`publish`] takes the next one of its aggregate.
///
/// ```
/// # #[derive(serde::Serialize)]
/// # struct Order { id: i64 }
/// # let order = Order { id: 7 };
/// use outbox::Event;
///
/// let event = Event::new("order.changed", "order", order.id.to_string(), &order).header("tenant", "north");
/// ```
#[derive(Clone, Debug)]
pub struct Event {
    id: Uuid,
    type_: Cow<'static, str>,
    aggregate_type: Cow<'static, str>,
    aggregate_id: String,
    body: Body,
    headers: Map<String, Value>,
}

#[derive(Clone, Debug)]
enum Body {
    Json(Box<RawValue>),
    /// The name of a function that returns it.
    Function(Cow<'static, str>),
    /// It cannot be written as JSON, for this reason.
    Unfit(String),
}

impl Event {
    /// An event with this body. If `body` cannot be written as JSON, publishing the event fails with
    /// [`AppendError::Unfit`].
    ///
    /// - `type_`: the event type and routing key, 1 to 255 bytes. The last event of an aggregate is `<aggregate type>.deleted`.
    /// - `aggregate_type`, `aggregate_id`: the thing that changed, 1 to 255 bytes each. They are in headers and logs, so
    ///   they must not be personal data.
    /// - `body`: the whole record. A [`RawValue`] is published byte for byte. If other transactions may change what it
    ///   contains, read it after [`lock`], or use [`reading`](Self::reading).
    pub fn new(
        type_: impl Into<Cow<'static, str>>,
        aggregate_type: impl Into<Cow<'static, str>>,
        aggregate_id: impl Into<String>,
        body: &(impl Serialize + ?Sized),
    ) -> Self {
        let body = serde_json::value::to_raw_value(body);
        let body = body.map_or_else(|error| Body::Unfit(format!("its body is no JSON: {error}")), Body::Json);
        Self::with(type_.into(), aggregate_type.into(), aggregate_id.into(), body)
    }

    /// An event whose body an SQL function reads, after the aggregate is locked: then it cannot be out of date. The function
    /// takes the id of the aggregate, for example as bigint, and returns json or jsonb. It runs with the rights of the
    /// connection's role. Name it with its schema: `shop.order_body`.
    pub fn reading(
        type_: impl Into<Cow<'static, str>>,
        aggregate_type: impl Into<Cow<'static, str>>,
        aggregate_id: impl Into<String>,
        function: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self::with(type_.into(), aggregate_type.into(), aggregate_id.into(), Body::Function(function.into()))
    }

    fn with(
        type_: Cow<'static, str>,
        aggregate_type: Cow<'static, str>,
        aggregate_id: String,
        body: Body,
    ) -> Self {
        Self { id: Uuid::now_v7(), type_, aggregate_type, aggregate_id, body, headers: Map::new() }
    }

    /// Sets the event's id, a UUIDv7. Otherwise it has a new one.
    #[must_use]
    pub fn id(self, id: Uuid) -> Self {
        Self { id, ..self }
    }

    /// Adds a header of the message, for example `("baseline", true)`.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.headers.insert(name.into(), value.into());
        self
    }

    /// Adds headers of the message.
    #[must_use]
    pub fn headers(mut self, headers: Map<String, Value>) -> Self {
        self.headers.extend(headers);
        self
    }

    fn aggregate(&self) -> (&str, &str) {
        (&self.aggregate_type, &self.aggregate_id)
    }

    /// The headers, in the trace of the current span, unless the caller gave another one.
    fn headers_in_trace(&self) -> Option<Cow<'_, Map<String, Value>>> {
        let headers = match crate::trace::current() {
            Some(parent) if !self.headers.contains_key("traceparent") => {
                let mut headers = self.headers.clone();
                headers.insert("traceparent".to_owned(), parent.into());
                Cow::Owned(headers)
            }
            _ => Cow::Borrowed(&self.headers),
        };
        (!headers.is_empty()).then_some(headers)
    }

    /// What the relay would refuse later is its writer's error now.
    fn check(&self, headers: Option<&Map<String, Value>>) -> Result<(), AppendError> {
        let rule = match &self.body {
            Body::Json(json) => content_rule(json.get(), headers),
            Body::Function(_) => content_rule("", headers),
            Body::Unfit(rule) => Some(rule.clone()),
        };
        rule.map_or(Ok(()), |rule| Err(AppendError::Unfit { id: self.id, type_: self.type_.clone(), rule }))
    }
}

/// A published event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Published {
    /// The event's id.
    pub id: Uuid,
    /// The version of the aggregate with this event.
    pub version: i64,
}

/// Publishes an event in the caller's transaction: locks its aggregate until the end of the transaction, and takes the next
/// version. Nothing is needed before: no version, and no row.
///
/// Lock your own rows before. Once the transaction is committed, call [`Waker::wake`](crate::Waker::wake); without it the
/// event leaves a little later.
///
/// With the feature `opentelemetry`, the header `traceparent` continues the trace of OpenTelemetry's current context.
///
/// ```no_run
/// # async fn pay(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
/// let mut tx = pool.begin().await?;
/// sqlx::query("UPDATE orders SET status = 'paid' WHERE id = 7").execute(&mut *tx).await?;
/// let body = serde_json::json!({"id": 7, "status": "paid"});
/// outbox::publish(&mut tx, outbox::Event::new("order.changed", "order", "7", &body)).await?;
/// tx.commit().await?;
/// # Ok(())
/// # }
/// ```
///
/// A pool is no transaction:
///
/// ```compile_fail
/// async fn dual_write(pool: sqlx::PgPool, event: outbox::Event) {
///     outbox::publish(&pool, event).await.unwrap();
/// }
/// ```
pub async fn publish(tx: &mut Transaction<'_, Postgres>, event: Event) -> Result<Published, AppendError> {
    let version = versions(tx, std::slice::from_ref(&event)).await?.into_iter().next();
    let version = version.ok_or(AppendError::Database(sqlx::Error::RowNotFound))?;
    Ok(Published { id: event.id, version })
}

/// As [`publish`], for many events: their positions follow the order of the slice. It locks the aggregates in the order of
/// their types and ids, so that two transactions that publish of the same ones do not deadlock.
pub async fn publish_all(
    tx: &mut Transaction<'_, Postgres>,
    events: &[Event],
) -> Result<Vec<Published>, AppendError> {
    if events.is_empty() {
        return Ok(Vec::new());
    }
    let versions = versions(tx, events).await?;
    Ok(events.iter().zip(versions).map(|(event, version)| Published { id: event.id, version }).collect())
}

async fn versions(tx: &mut Transaction<'_, Postgres>, events: &[Event]) -> Result<Vec<i64>, AppendError> {
    let headers: Vec<Option<Cow<'_, Map<String, Value>>>> =
        events.iter().map(Event::headers_in_trace).collect();
    events.iter().zip(&headers).try_for_each(|(event, headers)| event.check(headers.as_deref()))?;
    let payload = |event: &Event| match &event.body {
        Body::Json(json) => Some(json.get().to_owned()),
        Body::Function(_) | Body::Unfit(_) => None,
    };
    let function = |event: &Event| match &event.body {
        Body::Function(name) => Some(name.to_string()),
        Body::Json(_) | Body::Unfit(_) => None,
    };
    // The events lock their aggregates one by one. In the order of locks that is enough; otherwise they are locked before.
    let is_sorted = events.is_sorted_by_key(Event::aggregate);
    // Volatile functions are called after the sort, so positions follow the order of the slice. Payloads travel as text: a
    // json array would be parsed twice.
    let versions = sqlx::query_scalar(
        "WITH locked AS MATERIALIZED (
             SELECT outbox.lock(aggregate_type, aggregate_id) AS version
             FROM (SELECT DISTINCT aggregate_type COLLATE \"C\", aggregate_id COLLATE \"C\"
                   FROM unnest($2::text[], $3::text[]) AS a (aggregate_type, aggregate_id)
                   WHERE NOT $8 ORDER BY 1, 2) AS a (aggregate_type, aggregate_id))
         SELECT outbox.publish(type, aggregate_type, aggregate_id, payload::json, headers, id, body)
         FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::jsonb[], $6::uuid[], $7::text[])
              WITH ORDINALITY AS new (type, aggregate_type, aggregate_id, payload, headers, id, body, n)
         WHERE (SELECT count(version) FROM locked) >= 0
         ORDER BY n",
    )
    .bind(events.iter().map(|event| event.type_.as_ref()).collect::<Vec<&str>>())
    .bind(events.iter().map(|event| event.aggregate_type.as_ref()).collect::<Vec<&str>>())
    .bind(events.iter().map(|event| event.aggregate_id.as_str()).collect::<Vec<&str>>())
    .bind(events.iter().map(payload).collect::<Vec<Option<String>>>())
    .bind(headers.iter().map(|headers| headers.as_deref().map(Json)).collect::<Vec<_>>())
    .bind(events.iter().map(|event| event.id).collect::<Vec<Uuid>>())
    .bind(events.iter().map(function).collect::<Vec<Option<String>>>())
    .bind(is_sorted)
    .persistent(prepare::by_name(tx))
    .fetch_all(&mut **tx)
    .await?;
    Ok(versions)
}

/// Locks an aggregate until the end of the transaction, and returns the version of its last event; 0 without one. What is
/// read afterwards is its state at this version: nobody else publishes of it. Lock your own rows before.
pub async fn lock(
    tx: &mut Transaction<'_, Postgres>,
    aggregate_type: &str,
    aggregate_id: &str,
) -> Result<i64, AppendError> {
    let version = sqlx::query_scalar("SELECT outbox.lock($1, $2)")
        .bind(aggregate_type)
        .bind(aggregate_id)
        .persistent(prepare::by_name(tx))
        .fetch_one(&mut **tx)
        .await?;
    Ok(version)
}

/// As [`lock`], for many aggregates, in one round trip. A set of type and id: its order is the one in which everybody has to
/// lock, as other orders deadlock. The versions follow it.
pub async fn lock_all(
    tx: &mut Transaction<'_, Postgres>,
    aggregates: BTreeSet<(&str, &str)>,
) -> Result<Vec<i64>, AppendError> {
    let (types, ids): (Vec<&str>, Vec<&str>) = aggregates.into_iter().unzip();
    let versions = sqlx::query_scalar(
        "SELECT outbox.lock(aggregate_type, aggregate_id)
         FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS a (aggregate_type, aggregate_id, n)
         ORDER BY n",
    )
    .bind(types)
    .bind(ids)
    .persistent(prepare::by_name(tx))
    .fetch_all(&mut **tx)
    .await?;
    Ok(versions)
}
