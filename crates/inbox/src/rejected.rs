//! Messages that cannot be applied, for operators: grouped by reason, one with its details, and deleted.

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use sqlx::PgConnection;

use crate::{held::text, rejection::Rejection};

/// The reasons for which a message is rejected.
pub const REASONS: [&str; 6] = {
    let [malformed, fork, foreign, wrong_user, superseded, unrelated] = Rejection::ALL;
    [
        malformed.as_str(),
        fork.as_str(),
        foreign.as_str(),
        wrong_user.as_str(),
        superseded.as_str(),
        unrelated.as_str(),
    ]
};

/// How many messages one statement deletes.
const BATCH: i64 = 10_000;

/// Messages that were rejected for the same reason.
#[derive(Clone, Debug, Serialize, sqlx::FromRow)]
pub struct Group {
    /// One of [`REASONS`].
    pub reason: String,
    /// The reason in detail.
    pub detail: String,
    /// How many messages.
    pub messages: i64,
    /// How often they were delivered.
    pub deliveries: i64,
    /// When the first was delivered.
    pub first_at: DateTime<Utc>,
    /// When the last was delivered.
    pub last_at: DateTime<Utc>,
    /// The number of the newest one.
    pub newest: i64,
}

/// All rejected messages.
#[derive(Clone, Debug, Serialize)]
pub struct Groups {
    /// How many messages.
    pub messages: i64,
    /// By reason and detail. There are few such texts, since none quotes a message.
    pub groups: Vec<Group>,
}

/// A message that was rejected.
#[derive(Clone, Debug, Serialize)]
pub struct Rejected {
    /// Its number.
    pub id: i64,
    /// One of [`REASONS`].
    pub reason: String,
    /// The reason in detail.
    pub detail: String,
    /// Its routing key.
    pub routing_key: String,
    /// Its properties, headers included.
    pub properties: Value,
    /// How often it was delivered.
    pub times: i64,
    /// When it was first delivered.
    pub first_at: DateTime<Utc>,
    /// When it was last delivered.
    pub last_at: DateTime<Utc>,
    /// When its properties and its body were erased, because its aggregate has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub erased_at: Option<DateTime<Utc>>,
    /// The length of its body, in bytes.
    pub bytes: i64,
    /// How many bytes of the body are stored.
    pub kept_bytes: i32,
    /// The stored part of its body, if requested: as text, otherwise in hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
}

/// Selects rejected messages. All conditions must match.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// With one of these numbers. Any, when empty.
    pub ids: Vec<i64>,
    /// With this reason.
    pub reason: Option<String>,
}

/// Groups all rejected messages by reason and detail.
///
/// ```
/// # async fn example(conn: &mut sqlx::PgConnection) -> sqlx::Result<()> {
/// for group in inbox::rejected::groups(conn, "stock").await?.groups {
///     println!("{} messages, {}: {}", group.messages, group.reason, group.detail);
/// }
/// # Ok(())
/// # }
/// ```
pub async fn groups(conn: &mut PgConnection, consumer: &str) -> sqlx::Result<Groups> {
    let groups: Vec<Group> = sqlx::query_as(
        "SELECT reason, detail, count(*) AS messages, sum(times)::bigint AS deliveries, min(first_at) AS first_at,
                max(last_at) AS last_at, max(id) AS newest
         FROM inbox.rejected WHERE consumer = $1 GROUP BY reason, detail ORDER BY messages DESC, reason, detail",
    )
    .bind(consumer)
    .fetch_all(conn)
    .await?;
    Ok(Groups { messages: groups.iter().map(|group| group.messages).sum(), groups })
}

/// Reads the rejected message with this number. `with_body` also reads its body.
///
/// ```
/// # async fn example(conn: &mut sqlx::PgConnection) -> sqlx::Result<()> {
/// if let Some(message) = inbox::rejected::message(conn, "stock", 1, false).await? {
///     println!("{}: {}", message.reason, message.properties);
/// }
/// # Ok(())
/// # }
/// ```
pub async fn message(
    conn: &mut PgConnection,
    consumer: &str,
    id: i64,
    with_body: bool,
) -> sqlx::Result<Option<Rejected>> {
    #[derive(sqlx::FromRow)]
    struct Row {
        reason: String,
        detail: String,
        routing_key: String,
        properties: String,
        times: i64,
        first_at: DateTime<Utc>,
        last_at: DateTime<Utc>,
        erased_at: Option<DateTime<Utc>>,
        bytes: i64,
        kept_bytes: i32,
        body: Option<Vec<u8>>,
    }
    let row: Option<Row> = sqlx::query_as(
        "SELECT reason, detail, routing_key, properties::text AS properties, times, first_at, last_at, erased_at,
                coalesce(bytes, octet_length(body)) AS bytes, octet_length(body) AS kept_bytes,
                CASE WHEN $3 THEN body END AS body
         FROM inbox.rejected WHERE consumer = $1 AND id = $2",
    )
    .bind(consumer)
    .bind(id)
    .bind(with_body)
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| Rejected {
        id,
        reason: row.reason,
        detail: row.detail,
        routing_key: row.routing_key,
        // What was stored before it had a limit may be nested too deep to be read.
        properties: serde_json::from_str(&row.properties).unwrap_or(Value::Null),
        times: row.times,
        first_at: row.first_at,
        last_at: row.last_at,
        erased_at: row.erased_at,
        bytes: row.bytes,
        kept_bytes: row.kept_bytes,
        body: row.body.map(text),
    }))
}

/// Counts the messages that match.
///
/// ```
/// # async fn example(conn: &mut sqlx::PgConnection) -> sqlx::Result<()> {
/// use inbox::rejected::{self, Filter};
///
/// let forks = Filter { reason: Some("fork".to_owned()), ..Filter::default() };
/// let count = rejected::count(conn, "stock", &forks).await?;
/// # Ok(())
/// # }
/// ```
pub async fn count(conn: &mut PgConnection, consumer: &str, filter: &Filter) -> sqlx::Result<i64> {
    sqlx::query_scalar(
        "SELECT count(*) FROM inbox.rejected
         WHERE consumer = $1 AND (cardinality($2::bigint[]) = 0 OR id = ANY($2)) AND ($3::text IS NULL OR reason = $3)",
    )
    .bind(consumer)
    .bind(&filter.ids)
    .bind(&filter.reason)
    .fetch_one(conn)
    .await
}

/// Deletes the messages that match and are stored now, in transactions of 10,000. Returns how many they were.
///
/// ```
/// # async fn example(conn: &mut sqlx::PgConnection) -> sqlx::Result<()> {
/// use inbox::rejected::{self, Filter};
///
/// let forks = Filter { reason: Some("fork".to_owned()), ..Filter::default() };
/// let deleted = rejected::drop(conn, "stock", &forks).await?;
/// # Ok(())
/// # }
/// ```
pub async fn drop(conn: &mut PgConnection, consumer: &str, filter: &Filter) -> sqlx::Result<u64> {
    let until: Option<i64> = sqlx::query_scalar("SELECT max(id) FROM inbox.rejected WHERE consumer = $1")
        .bind(consumer)
        .fetch_one(&mut *conn)
        .await?;
    let mut dropped = 0;
    let mut attempts = outbox::database::Attempts::default();
    loop {
        let some = sqlx::query(
            "DELETE FROM inbox.rejected WHERE id IN (
                 SELECT id FROM inbox.rejected
                 WHERE consumer = $1 AND id <= $2 AND (cardinality($3::bigint[]) = 0 OR id = ANY($3))
                   AND ($4::text IS NULL OR reason = $4)
                 ORDER BY id LIMIT $5)",
        )
        .bind(consumer)
        .bind(until.unwrap_or_default())
        .bind(&filter.ids)
        .bind(&filter.reason)
        .bind(BATCH)
        .execute(&mut *conn)
        .await;
        if outbox::database::is_conflict(&some) && attempts.again().await {
            continue;
        }
        let some = some?.rows_affected();
        if some == 0 {
            return Ok(dropped);
        }
        attempts = outbox::database::Attempts::default();
        dropped += some;
    }
}
