//! What a transaction reads from the schema `inbox`: the chains that it locks, and their held events.

use std::{collections::BTreeMap, mem};

use serde_json::{Map, Value};
use sqlx::{AssertSqlSafe, Postgres, Transaction};
use uuid::Uuid;

use crate::{
    Event,
    chain::{Chain, Held, Key, Reason},
    message::{is_deletion, previous_id},
};

/// How many held events of an aggregate one transaction reads.
pub(crate) const NEAR: usize = 64;

/// The error of a held event whose stored headers cannot be read.
pub(crate) const UNREADABLE: &str = "its stored headers cannot be read: they are nested too deep";

/// The headers of a held event that names the one before it. The server decodes all texts of a JSON for one of them, and
/// refuses a NUL in any.
const NAMING: &str = r#"CASE WHEN strpos(headers::text, '"previous_id"') > 0
                             THEN replace(headers::text, '\u0000', '\u0020')::json END"#;

/// The chains that a transaction has locked, by aggregate.
pub(crate) struct Ledger<'a> {
    pub(crate) consumer: &'a str,
    pub(crate) chains: BTreeMap<Key, Chain<'a>>,
    /// Held events whose stored headers cannot be read, as they were written before headers had a limit.
    pub(crate) unreadable: Vec<(Key, i64)>,
}

/// Keys as one array a column, for `unnest`.
pub(crate) type Columns<'k> = (Vec<&'k str>, Vec<&'k str>, Vec<&'k str>);

pub(crate) fn columns<'k>(keys: impl Iterator<Item = &'k Key>) -> Columns<'k> {
    let mut columns = Columns::default();
    for key in keys {
        columns.0.push(&key.source);
        columns.1.push(&key.aggregate_type);
        columns.2.push(&key.aggregate_id);
    }
    columns
}

impl<'a> Ledger<'a> {
    /// Reads what is held: of each chain the lowest versions, and those of `events`. Only under the
    /// locks. LATERAL with a limit stops at the first of perhaps very many; with `OFFSET 0` it cannot become a
    /// join that reads all that is held.
    pub(crate) async fn read_held(
        &mut self,
        tx: &mut Transaction<'_, Postgres>,
        events: &[&Event],
    ) -> sqlx::Result<()> {
        if self.chains.is_empty() {
            return Ok(());
        }
        let (sources, types, ids) = columns(self.chains.keys());
        let reached: Vec<i64> = self.chains.values().map(Chain::version).collect();
        let of_events: Vec<Key> = events.iter().map(|event| Key::from(*event)).collect();
        let (event_sources, event_types, event_ids) = columns(of_events.iter());
        let versions: Vec<i64> = events.iter().map(|event| event.version).collect();
        let sql = format!(
            "SELECT k.source, k.aggregate_type, k.aggregate_id, h.version, h.event_id, h.reason, h.attempts, h.type,
                    left((h.headers -> 'previous_id')::text, 100) AS previous_id,
                    coalesce((h.headers -> 'baseline')::text = 'true', false) AS baseline,
                    coalesce((h.headers -> 'erased')::text = 'true', false) AS erased, true AS near
             FROM unnest($2::text[], $3::text[], $4::text[], $5::bigint[])
                  AS k (source, aggregate_type, aggregate_id, version),
                  LATERAL (SELECT version, event_id, reason, attempts, type, {NAMING} AS headers FROM inbox.held
                           WHERE (consumer, source, aggregate_type, aggregate_id)
                               = ($1, k.source, k.aggregate_type, k.aggregate_id) AND version > k.version
                           ORDER BY version LIMIT $6) AS h
             UNION ALL
             SELECT k.source, k.aggregate_type, k.aggregate_id, k.version, h.event_id, h.reason, h.attempts, h.type,
                    left((h.headers -> 'previous_id')::text, 100),
                    coalesce((h.headers -> 'baseline')::text = 'true', false),
                    coalesce((h.headers -> 'erased')::text = 'true', false), false
             FROM unnest($7::text[], $8::text[], $9::text[], $10::bigint[])
                  AS k (source, aggregate_type, aggregate_id, version),
                  LATERAL (SELECT event_id, reason, attempts, type, {NAMING} AS headers FROM inbox.held
                           WHERE (consumer, source, aggregate_type, aggregate_id, version)
                               = ($1, k.source, k.aggregate_type, k.aggregate_id, k.version) OFFSET 0) AS h"
        );
        let rows: Vec<NearRow> = sqlx::query_as(AssertSqlSafe(sql))
            .bind(self.consumer)
            .bind(sources)
            .bind(types)
            .bind(ids)
            .bind(reached)
            .bind(i64::try_from(NEAR).unwrap_or(i64::MAX))
            .bind(event_sources)
            .bind(event_types)
            .bind(event_ids)
            .bind(versions)
            .fetch_all(&mut **tx)
            .await?;
        let mut near: BTreeMap<Key, (usize, i64)> = BTreeMap::new();
        for mut row in rows {
            let key = Key {
                source: mem::take(&mut row.source),
                aggregate_type: mem::take(&mut row.aggregate_type),
                aggregate_id: mem::take(&mut row.aggregate_id),
            };
            let (version, is_near) = (row.version, row.near);
            if let Some(chain) = self.chains.get_mut(&key) {
                chain.held.insert(version, row.held(&key));
            }
            if is_near {
                let (count, highest) = near.entry(key).or_default();
                *count += 1;
                *highest = version.max(*highest);
            }
        }
        for (key, (_, highest)) in near.into_iter().filter(|(_, (count, _))| *count == NEAR) {
            if let Some(chain) = self.chains.get_mut(&key) {
                chain.horizon = highest;
            }
        }
        Ok(())
    }

    /// Reads held events whole. One that is `unreadable` comes without its headers.
    pub(crate) async fn events(
        &mut self,
        tx: &mut Transaction<'_, Postgres>,
        wanted: &[(&Key, i64)],
    ) -> sqlx::Result<BTreeMap<(Key, i64), Event>> {
        if wanted.is_empty() {
            return Ok(BTreeMap::new());
        }
        let (sources, types, ids) = columns(wanted.iter().map(|(key, _)| *key));
        let versions: Vec<i64> = wanted.iter().map(|(_, version)| *version).collect();
        let rows: Vec<HeldRow> = sqlx::query_as(
            "SELECT k.source, k.aggregate_type, k.aggregate_id, k.version, h.event_id, h.type, h.occurred_at,
                    h.headers::text AS headers, h.payload
             FROM unnest($2::text[], $3::text[], $4::text[], $5::bigint[])
                  AS k (source, aggregate_type, aggregate_id, version),
                  LATERAL (SELECT event_id, type, occurred_at, headers, payload FROM inbox.held
                           WHERE (consumer, source, aggregate_type, aggregate_id, version)
                               = ($1, k.source, k.aggregate_type, k.aggregate_id, k.version) OFFSET 0) AS h",
        )
        .bind(self.consumer)
        .bind(sources)
        .bind(types)
        .bind(ids)
        .bind(versions)
        .fetch_all(&mut **tx)
        .await?;
        let mut events = BTreeMap::new();
        for row in rows {
            let (event, readable) = row.event();
            let version = (Key::from(&event), event.version);
            if !readable {
                self.unreadable.push(version.clone());
            }
            events.insert(version, event);
        }
        Ok(events)
    }

    /// Writes that a held event cannot be read.
    pub(crate) async fn unread(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        key: &Key,
        version: i64,
    ) -> sqlx::Result<()> {
        sqlx::query(
            "UPDATE inbox.held SET reason = 'poison', error = $6, attempts = attempts + 1, last_at = now()
             WHERE (consumer, source, aggregate_type, aggregate_id, version) = ($1, $2, $3, $4, $5)",
        )
        .bind(self.consumer)
        .bind(&key.source)
        .bind(&key.aggregate_type)
        .bind(&key.aggregate_id)
        .bind(version)
        .bind(UNREADABLE)
        .execute(&mut **tx)
        .await?;
        Ok(())
    }

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

    /// Records that an operator skipped a held event.
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

    /// Records an applied event.
    pub(crate) fn applied(&mut self, event: &Event) -> sqlx::Result<()> {
        self.chain(&Key::from(event))?.applied(event);
        Ok(())
    }

    /// The chain of one of the keys that were locked. Every key was inserted before it was locked, so a
    /// missing row was deleted by hand in between, which is an error.
    pub(crate) fn chain(&mut self, key: &Key) -> sqlx::Result<&mut Chain<'a>> {
        self.chains.get_mut(key).ok_or(sqlx::Error::RowNotFound)
    }
}

#[derive(sqlx::FromRow)]
struct NearRow {
    source: String,
    aggregate_type: String,
    aggregate_id: String,
    version: i64,
    event_id: Uuid,
    reason: String,
    attempts: i32,
    #[sqlx(rename = "type")]
    type_: String,
    /// As JSON, when there is one.
    previous_id: Option<String>,
    baseline: bool,
    erased: bool,
    near: bool,
}

impl NearRow {
    fn held(self, key: &Key) -> Held<'static> {
        let jumps = !self.erased && (self.baseline || is_deletion(&self.type_, &key.aggregate_type));
        let previous: Option<Value> = self.previous_id.and_then(|json| serde_json::from_str(&json).ok());
        let follows = previous.as_ref().and_then(previous_id).filter(|_| !jumps);
        let (id, reason) = (self.event_id, Reason::parse(&self.reason));
        Held { id, reason, attempts: self.attempts, follows, received: None }
    }
}

/// A row of `inbox.held`, for who wants the event in it.
#[derive(sqlx::FromRow)]
struct HeldRow {
    source: String,
    aggregate_type: String,
    aggregate_id: String,
    version: i64,
    event_id: Uuid,
    #[sqlx(rename = "type")]
    type_: String,
    occurred_at: Option<chrono::DateTime<chrono::Utc>>,
    headers: String,
    payload: Vec<u8>,
}

impl HeldRow {
    /// The event, and whether its headers can be read.
    fn event(self) -> (Event, bool) {
        let headers: Option<Map<String, Value>> = serde_json::from_str(&self.headers).ok();
        let readable = headers.is_some();
        let event = Event {
            id: self.event_id,
            source: self.source,
            aggregate_type: self.aggregate_type,
            aggregate_id: self.aggregate_id,
            version: self.version,
            type_: self.type_,
            occurred_at: self.occurred_at,
            headers: headers.unwrap_or_default(),
            payload: self.payload,
            begins_anew: false,
        };
        (event, readable)
    }
}
