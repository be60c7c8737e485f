//! Held events for operators: grouped by cause, listed page by page, or one event with its details. Each statement
//! reads a bounded number of rows, and reads a body only on request.

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::{Map, Value};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{chain::Key, ledger::UNREADABLE};

/// Held events with the same cause.
#[derive(Clone, Debug, Serialize, sqlx::FromRow)]
pub struct Group {
    /// `poison` or `trying`, the reason of the event that stops their aggregates, or `gap`.
    pub reason: String,
    /// The handler's error.
    pub error: Option<String>,
    /// How many events, including those behind the first.
    pub events: i64,
    /// Of how many aggregates.
    pub aggregates: i64,
    /// The highest number of attempts at one of them.
    pub attempts: i32,
    /// When the first of them was held.
    pub first_at: DateTime<Utc>,
    /// When one of them was last tried or held.
    pub last_at: DateTime<Utc>,
    /// The aggregate that has waited longest.
    #[sqlx(flatten)]
    pub oldest: Key,
    /// The version that it waits for: of a held event, or missing in a gap.
    pub version: i64,
}

/// All held events.
#[derive(Clone, Debug, Serialize)]
pub struct Groups {
    /// How many events.
    pub events: i64,
    /// By cause, the most events first.
    pub groups: Vec<Group>,
    /// How many causes are not listed.
    pub more: i64,
}

/// An event that waits, without its body.
#[derive(Clone, Debug, Serialize, sqlx::FromRow)]
pub struct HeldEvent {
    /// Its id.
    pub event_id: Uuid,
    /// Its aggregate.
    #[sqlx(flatten)]
    #[serde(flatten)]
    pub aggregate: Key,
    /// The aggregate's version.
    pub version: i64,
    /// The event type.
    #[sqlx(rename = "type")]
    #[serde(rename = "type")]
    pub type_: String,
    /// `gap`, `poison`, `trying` or `behind`.
    pub reason: String,
    /// The handler's error.
    pub error: Option<String>,
    /// How often it was tried.
    pub attempts: i32,
    /// When it was held.
    pub first_at: DateTime<Utc>,
    /// When it was last tried or held.
    pub last_at: DateTime<Utc>,
    /// The length of its body, in bytes.
    pub bytes: i32,
}

/// A held event with its headers and its aggregate's state.
#[derive(Clone, Debug, Serialize)]
pub struct HeldDetail {
    /// The event.
    #[serde(flatten)]
    pub event: HeldEvent,
    /// Its headers.
    pub headers: Map<String, Value>,
    /// The version at which its aggregate is.
    pub applied: i64,
    /// How many events of its aggregate are held behind it.
    pub behind: i64,
    /// Its body, if requested: as text, otherwise in hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
}

/// An event that was skipped.
#[derive(Clone, Debug, Serialize, sqlx::FromRow)]
pub struct Skipped {
    /// Its id.
    pub event_id: Uuid,
    /// Its aggregate.
    #[sqlx(flatten)]
    #[serde(flatten)]
    pub aggregate: Key,
    /// The aggregate's version.
    pub version: i64,
    /// The event type.
    #[sqlx(rename = "type")]
    #[serde(rename = "type")]
    pub type_: String,
    /// The handler's error.
    pub error: Option<String>,
    /// The operator who skipped it.
    pub skipped_by: String,
    /// The reason.
    pub why: String,
    /// When it was skipped.
    pub skipped_at: DateTime<Utc>,
}

/// Selects held events. All conditions must match.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Of this aggregate: its type and id, of any source.
    pub aggregate: Option<(String, String)>,
    /// With this reason.
    pub reason: Option<String>,
    /// With an error that contains this.
    pub error: Option<String>,
}

/// An aggregate waits for its lowest event that was tried, or for a version that has not arrived. One pass
/// over what is held, by the primary key, and a sum for each cause; the oldest is a minimum, not a sort.
const GROUPS: &str = "
WITH tried AS (
    SELECT DISTINCT ON (source, aggregate_type, aggregate_id)
           source, aggregate_type, aggregate_id, reason, error, attempts
    FROM inbox.held WHERE consumer = $1 AND reason IN ('poison', 'trying')
    ORDER BY source, aggregate_type, aggregate_id, version),
waiting AS (
    SELECT source, aggregate_type, aggregate_id, count(*) AS events, min(first_at) AS first_at, max(last_at) AS last_at
    FROM inbox.held WHERE consumer = $1 GROUP BY source, aggregate_type, aggregate_id),
cause AS (
    SELECT coalesce(t.reason, 'gap') AS reason, t.error, sum(w.events)::bigint AS events, count(*) AS aggregates,
           coalesce(max(t.attempts), 0) AS attempts, min(w.first_at) AS first_at, max(w.last_at) AS last_at,
           min(ARRAY[to_char(w.first_at AT TIME ZONE 'UTC', 'YYYYMMDDHH24MISSUS'),
                     source, aggregate_type, aggregate_id]) AS oldest
    FROM waiting w LEFT JOIN tried t USING (source, aggregate_type, aggregate_id)
    GROUP BY 1, 2)
SELECT c.reason, c.error, c.events, c.aggregates, c.attempts, c.first_at, c.last_at,
       a.source, a.aggregate_type, a.aggregate_id, least(a.version, 9223372036854775806) + 1 AS version,
       sum(c.events) OVER ()::bigint AS all_events, count(*) OVER () AS all_groups
FROM cause c JOIN inbox.aggregate a
  ON (a.consumer, a.source, a.aggregate_type, a.aggregate_id) = ($1, c.oldest[2], c.oldest[3], c.oldest[4])
ORDER BY c.events DESC, c.first_at, c.error LIMIT $2";

const EVENT: &str = "
SELECT event_id, source, aggregate_type, aggregate_id, version, type, reason, error, attempts, first_at, last_at,
       octet_length(payload) AS bytes
FROM inbox.held";

/// Groups all held events by cause, and returns at most `limit` groups.
///
/// ```
/// # async fn example(conn: &mut sqlx::PgConnection) -> sqlx::Result<()> {
/// let groups = inbox::held::groups(conn, "stock", 50).await?;
/// for group in groups.groups {
///     println!("{} events, {}: {:?}", group.events, group.reason, group.error);
/// }
/// # Ok(())
/// # }
/// ```
pub async fn groups(conn: &mut PgConnection, consumer: &str, limit: i64) -> sqlx::Result<Groups> {
    #[derive(sqlx::FromRow)]
    struct Row {
        #[sqlx(flatten)]
        group: Group,
        all_events: i64,
        all_groups: i64,
    }
    let rows: Vec<Row> = sqlx::query_as(GROUPS).bind(consumer).bind(limit).fetch_all(conn).await?;
    let (events, all) = rows.first().map_or((0, 0), |row| (row.all_events, row.all_groups));
    let groups: Vec<Group> = rows.into_iter().map(|row| row.group).collect();
    let more = all - i64::try_from(groups.len()).unwrap_or(all);
    Ok(Groups { events, groups, more })
}

/// Lists at most `limit` held events after the one with the id `after`, in the order of their ids, which is the order of
/// creation.
///
/// ```
/// # async fn example(conn: &mut sqlx::PgConnection) -> sqlx::Result<()> {
/// use inbox::held::{self, Filter};
///
/// let poison = Filter { reason: Some("poison".to_owned()), ..Filter::default() };
/// let page = held::events(conn, "stock", &poison, None, 50).await?;
/// let next = held::events(conn, "stock", &poison, page.last().map(|event| event.event_id), 50).await?;
/// # Ok(())
/// # }
/// ```
pub async fn events(
    conn: &mut PgConnection,
    consumer: &str,
    filter: &Filter,
    after: Option<Uuid>,
    limit: i64,
) -> sqlx::Result<Vec<HeldEvent>> {
    let (aggregate_type, aggregate_id) = filter.aggregate.clone().unzip();
    let sql = format!(
        "{EVENT} WHERE consumer = $1 AND event_id > $2 AND ($3::text IS NULL OR (aggregate_type, aggregate_id) = ($3, $4))
           AND ($5::text IS NULL OR reason = $5) AND ($6::text IS NULL OR position($6 IN error) > 0)
         ORDER BY event_id LIMIT $7"
    );
    sqlx::query_as(sqlx::AssertSqlSafe(sql))
        .bind(consumer)
        .bind(after.unwrap_or_default())
        .bind(aggregate_type)
        .bind(aggregate_id)
        .bind(&filter.reason)
        .bind(&filter.error)
        .bind(limit)
        .fetch_all(conn)
        .await
}

/// Reads the held event with this id. `with_body` also reads its body, which usually has personal data.
///
/// ```
/// # async fn example(conn: &mut sqlx::PgConnection, id: uuid::Uuid) -> sqlx::Result<()> {
/// if let Some(detail) = inbox::held::event(conn, "stock", id, false).await? {
///     println!("{} is at version {}", detail.event.aggregate, detail.applied);
/// }
/// # Ok(())
/// # }
/// ```
pub async fn event(
    conn: &mut PgConnection,
    consumer: &str,
    id: Uuid,
    with_body: bool,
) -> sqlx::Result<Option<HeldDetail>> {
    let sql = format!("{EVENT} WHERE consumer = $1 AND event_id = $2 ORDER BY version LIMIT 1");
    let found: Option<HeldEvent> =
        sqlx::query_as(sqlx::AssertSqlSafe(sql)).bind(consumer).bind(id).fetch_optional(&mut *conn).await?;
    let Some(event) = found else { return Ok(None) };
    let sql = "
        SELECT h.headers::text AS headers, a.version AS applied, (SELECT count(*) FROM inbox.held b
                   WHERE (b.consumer, b.source, b.aggregate_type, b.aggregate_id)
                       = (h.consumer, h.source, h.aggregate_type, h.aggregate_id) AND b.version > h.version) AS behind,
               CASE WHEN $6 THEN h.payload END AS body
        FROM inbox.held h JOIN inbox.aggregate a USING (consumer, source, aggregate_type, aggregate_id)
        WHERE (h.consumer, h.source, h.aggregate_type, h.aggregate_id, h.version) = ($1, $2, $3, $4, $5)";
    let rest: Option<Rest> = sqlx::query_as(sql)
        .bind(consumer)
        .bind(&event.aggregate.source)
        .bind(&event.aggregate.aggregate_type)
        .bind(&event.aggregate.aggregate_id)
        .bind(event.version)
        .bind(with_body)
        .fetch_optional(conn)
        .await?;
    Ok(rest.map(|rest| HeldDetail {
        event,
        headers: serde_json::from_str(&rest.headers).unwrap_or_else(|_| unreadable()),
        applied: rest.applied,
        behind: rest.behind,
        body: rest.body.map(text),
    }))
}

#[derive(sqlx::FromRow)]
struct Rest {
    headers: String,
    applied: i64,
    behind: i64,
    body: Option<Vec<u8>>,
}

/// Replaces headers that an older release stored without a limit and that are nested too deep to be read.
fn unreadable() -> Map<String, Value> {
    Map::from_iter([("…".to_owned(), UNREADABLE.into())])
}

/// Lists the held events of this version of an aggregate, one for each source.
///
/// ```
/// # async fn example(conn: &mut sqlx::PgConnection) -> sqlx::Result<()> {
/// let events = inbox::held::at(conn, "stock", "order", "7", 3).await?;
/// # Ok(())
/// # }
/// ```
pub async fn at(
    conn: &mut PgConnection,
    consumer: &str,
    aggregate_type: &str,
    aggregate_id: &str,
    version: i64,
) -> sqlx::Result<Vec<HeldEvent>> {
    let sql = format!(
        "{EVENT} WHERE (consumer, aggregate_type, aggregate_id, version) = ($1, $2, $3, $4) ORDER BY source LIMIT 10"
    );
    sqlx::query_as(sqlx::AssertSqlSafe(sql))
        .bind(consumer)
        .bind(aggregate_type)
        .bind(aggregate_id)
        .bind(version)
        .fetch_all(conn)
        .await
}

/// Reads the record of a skipped event by the event's id.
///
/// ```
/// # async fn example(conn: &mut sqlx::PgConnection, id: uuid::Uuid) -> sqlx::Result<()> {
/// if let Some(skipped) = inbox::held::skipped(conn, "stock", id).await? {
///     println!("skipped by {}: {}", skipped.skipped_by, skipped.why);
/// }
/// # Ok(())
/// # }
/// ```
pub async fn skipped(conn: &mut PgConnection, consumer: &str, id: Uuid) -> sqlx::Result<Option<Skipped>> {
    sqlx::query_as(
        "SELECT event_id, source, aggregate_type, aggregate_id, version, type, error, skipped_by, why, skipped_at
         FROM inbox.skipped WHERE consumer = $1 AND event_id = $2 LIMIT 1",
    )
    .bind(consumer)
    .bind(id)
    .fetch_optional(conn)
    .await
}

/// A body as text, otherwise in hexadecimal.
pub(crate) fn text(body: Vec<u8>) -> String {
    String::from_utf8(body).unwrap_or_else(|error| crate::headers::hex(error.as_bytes()))
}
