//! What is held, for people who look: grouped by cause, listed page by page, and one event whole. Each
//! statement is bounded by what it returns, and none reads a body that nobody asked for.

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::{Map, Value};
use sqlx::{PgConnection, Postgres, Transaction};
use uuid::Uuid;

use crate::{
    chain::Key,
    ledger::{Ledger, UNREADABLE},
};

/// Held events that wait for the same thing.
#[derive(Clone, Debug, Serialize, sqlx::FromRow)]
pub struct Group {
    /// `poison` or `trying`, when that is what their aggregates' first event is, else `gap`.
    pub reason: String,
    /// What its handler said.
    pub error: Option<String>,
    /// How many events, those behind the first ones included.
    pub events: i64,
    /// Of how many aggregates.
    pub aggregates: i64,
    /// How often one of them was tried at most.
    pub attempts: i32,
    /// Since when the first of them waits.
    pub first_at: DateTime<Utc>,
    /// When something last happened to one of them.
    pub last_at: DateTime<Utc>,
    /// An aggregate that waits for longest.
    #[sqlx(flatten)]
    pub oldest: Key,
    /// The event that it waits for: held, or, in a gap, not there.
    pub version: i64,
}

/// All that is held.
#[derive(Clone, Debug, Serialize)]
pub struct Groups {
    /// How many events.
    pub events: i64,
    /// By cause, those with the most events first.
    pub groups: Vec<Group>,
    /// How many causes there are beyond those.
    pub more: i64,
}

/// An event that waits, without its body.
#[derive(Clone, Debug, Serialize, sqlx::FromRow)]
pub struct HeldEvent {
    /// Its id.
    pub event_id: Uuid,
    /// Whose it is.
    #[sqlx(flatten)]
    #[serde(flatten)]
    pub aggregate: Key,
    /// Which version of it.
    pub version: i64,
    /// The event type.
    #[sqlx(rename = "type")]
    #[serde(rename = "type")]
    pub type_: String,
    /// `gap`, `poison`, `trying` or `behind`.
    pub reason: String,
    /// What the handler said.
    pub error: Option<String>,
    /// How often it was tried.
    pub attempts: i32,
    /// Since when it waits.
    pub first_at: DateTime<Utc>,
    /// When something last happened to it.
    pub last_at: DateTime<Utc>,
    /// How long its body is.
    pub bytes: i32,
}

/// A held event and its surroundings.
#[derive(Clone, Debug, Serialize)]
pub struct HeldDetail {
    /// The event.
    #[serde(flatten)]
    pub event: HeldEvent,
    /// Its headers.
    pub headers: Map<String, Value>,
    /// The version its aggregate stands at.
    pub applied: i64,
    /// How many events of its aggregate are held behind it.
    pub behind: i64,
    /// Its body, where it was asked for: text, or else hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
}

/// An event that was skipped.
#[derive(Clone, Debug, Serialize, sqlx::FromRow)]
pub struct Skipped {
    /// Its id.
    pub event_id: Uuid,
    /// Whose it was.
    #[sqlx(flatten)]
    #[serde(flatten)]
    pub aggregate: Key,
    /// Which version of it.
    pub version: i64,
    /// The event type.
    #[sqlx(rename = "type")]
    #[serde(rename = "type")]
    pub type_: String,
    /// What the handler had said.
    pub error: Option<String>,
    /// Who did it.
    pub skipped_by: String,
    /// And why.
    pub why: String,
    /// And when.
    pub skipped_at: DateTime<Utc>,
}

/// Which held events; all conditions hold.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Of this aggregate: its type and id, whoever published it.
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

/// Everything that is held, by cause: at most `limit` of them.
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

/// Held events after the one with the id `after`, at most `limit`, in the order of their ids, which is
/// that of their making.
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

/// The held event with this id. Its body is personal data as a rule, so it is only read when asked for.
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

/// Stands for headers that were stored before they had a limit, and are nested too deep to be read.
fn unreadable() -> Map<String, Value> {
    Map::from_iter([("…".to_owned(), UNREADABLE.into())])
}

/// The held events of this version of an aggregate: one of each source that has it.
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

/// The record of the event with this id, if it was skipped.
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

/// Aggregates after `after`, at most `limit`, that a redrive may bring on: one of their events was tried,
/// or stands next and was left when the process that applied them died.
pub(crate) async fn due(
    conn: &mut PgConnection,
    consumer: &str,
    filter: &Filter,
    after: Option<&Key>,
    limit: i64,
) -> sqlx::Result<Vec<Key>> {
    let (aggregate_type, aggregate_id) = filter.aggregate.clone().unzip();
    let (source, after_type, after_id) = after.map_or(("", "", ""), |after| {
        (after.source.as_str(), after.aggregate_type.as_str(), after.aggregate_id.as_str())
    });
    // A subquery and no join, so that the page is read along the primary key and ends where it is full; a
    // join is hashed as a whole (a million held: 0.1 s a page instead of 6 s).
    sqlx::query_as(
        "SELECT source, aggregate_type, aggregate_id FROM inbox.held h
         WHERE consumer = $1 AND (source, aggregate_type, aggregate_id) > ($2, $3, $4)
           AND ($5::text IS NULL OR (aggregate_type, aggregate_id) = ($5, $6))
           AND ($7::text IS NULL OR reason = $7) AND ($8::text IS NULL OR position($8 IN error) > 0)
           AND (reason IN ('poison', 'trying') OR version - 1 = (
                SELECT a.version FROM inbox.aggregate a
                WHERE (a.consumer, a.source, a.aggregate_type, a.aggregate_id)
                    = (h.consumer, h.source, h.aggregate_type, h.aggregate_id)))
         GROUP BY source, aggregate_type, aggregate_id
         ORDER BY source, aggregate_type, aggregate_id LIMIT $9",
    )
    .bind(consumer)
    .bind(source)
    .bind(after_type)
    .bind(after_id)
    .bind(aggregate_type)
    .bind(aggregate_id)
    .bind(&filter.reason)
    .bind(&filter.error)
    .bind(limit)
    .fetch_all(conn)
    .await
}

impl Ledger<'_> {
    /// How many events of an aggregate are held.
    pub(crate) async fn count(&self, tx: &mut Transaction<'_, Postgres>, key: &Key) -> sqlx::Result<i64> {
        sqlx::query_scalar(
            "SELECT count(*) FROM inbox.held
             WHERE (consumer, source, aggregate_type, aggregate_id) = ($1, $2, $3, $4)",
        )
        .bind(self.consumer)
        .bind(&key.source)
        .bind(&key.aggregate_type)
        .bind(&key.aggregate_id)
        .fetch_one(&mut **tx)
        .await
    }

    /// Remembers that a held event is not applied, on whose word.
    pub(crate) async fn skip(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        key: &Key,
        version: i64,
        by: &str,
        why: &str,
    ) -> sqlx::Result<()> {
        sqlx::query(
            "INSERT INTO inbox.skipped (consumer, source, aggregate_type, aggregate_id, version, event_id, type, error,
                                        skipped_by, why)
             SELECT consumer, source, aggregate_type, aggregate_id, version, event_id, type, error, $6, $7
             FROM inbox.held
             WHERE (consumer, source, aggregate_type, aggregate_id, version) = ($1, $2, $3, $4, $5)",
        )
        .bind(self.consumer)
        .bind(&key.source)
        .bind(&key.aggregate_type)
        .bind(&key.aggregate_id)
        .bind(version)
        .bind(by)
        .bind(why)
        .execute(&mut **tx)
        .await?;
        Ok(())
    }
}

/// A body for people: text, or else hexadecimal.
pub(crate) fn text(body: Vec<u8>) -> String {
    String::from_utf8(body).unwrap_or_else(|error| crate::message::hex(error.as_bytes()))
}
