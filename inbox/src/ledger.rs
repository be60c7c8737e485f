//! All SQL of the sequencer: what stands in the schema `inbox`, locked for one transaction.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};
use sqlx::{Postgres, Transaction, types::Json};
use uuid::Uuid;

use crate::{Envelope, Event};

/// Which aggregate of which source: what a chain of versions belongs to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) source: String,
    pub(crate) aggregate_type: String,
    pub(crate) aggregate_id: String,
}

impl From<&Event> for Key {
    fn from(event: &Event) -> Self {
        Self {
            source: event.source.clone(),
            aggregate_type: event.aggregate_type.clone(),
            aggregate_id: event.aggregate_id.clone(),
        }
    }
}

/// How far an aggregate is, as of this transaction.
#[derive(Debug)]
pub(crate) struct Chain {
    /// The last version applied; 0 when there is none.
    pub(crate) version: i64,
    /// The event that brought it there.
    pub(crate) last_event_id: Option<Uuid>,
    /// Whether anything of it is held.
    pub(crate) held: bool,
    /// Whether it differs from what is stored.
    changed: bool,
}

/// Why a message is kept in `inbox.rejected`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rejection {
    Malformed,
    Fork,
}

impl Rejection {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Fork => "fork",
        }
    }
}

/// What became of an event that was to be held.
pub(crate) enum Hold {
    Held,
    /// The same event is held already.
    Known,
    /// Another event of this version is held already.
    Contradicted,
}

/// The chains that a transaction has locked, by aggregate.
pub(crate) struct Ledger<'a> {
    consumer: &'a str,
    chains: BTreeMap<Key, Chain>,
}

type Columns<'a> = (Vec<&'a str>, Vec<&'a str>, Vec<&'a str>);

fn columns<'a>(keys: impl Iterator<Item = &'a Key>) -> Columns<'a> {
    let mut columns = Columns::default();
    for key in keys {
        columns.0.push(&key.source);
        columns.1.push(&key.aggregate_type);
        columns.2.push(&key.aggregate_id);
    }
    columns
}

impl<'a> Ledger<'a> {
    /// Locks the chains of `keys`, new ones included. Two statements, both in the order of the key: one
    /// alone would miss a row that another transaction has just committed.
    pub(crate) async fn lock(
        tx: &mut Transaction<'_, Postgres>,
        consumer: &'a str,
        keys: BTreeSet<Key>,
    ) -> sqlx::Result<Self> {
        if keys.is_empty() {
            return Ok(Self { consumer, chains: BTreeMap::new() });
        }
        let (sources, types, ids) = columns(keys.iter());
        sqlx::query(
            "INSERT INTO inbox.aggregate (consumer, source, aggregate_type, aggregate_id)
             SELECT $1, k.source, k.aggregate_type, k.aggregate_id
             FROM unnest($2::text[], $3::text[], $4::text[]) AS k (source, aggregate_type, aggregate_id)
             ORDER BY k.source, k.aggregate_type, k.aggregate_id
             ON CONFLICT DO NOTHING",
        )
        .bind(consumer)
        .bind(&sources)
        .bind(&types)
        .bind(&ids)
        .execute(&mut **tx)
        .await?;
        let locked: Vec<(String, String, String, i64, Option<Uuid>)> = sqlx::query_as(
            "SELECT a.source, a.aggregate_type, a.aggregate_id, a.version, a.last_event_id
             FROM inbox.aggregate a
             JOIN unnest($2::text[], $3::text[], $4::text[]) AS k (source, aggregate_type, aggregate_id)
               USING (source, aggregate_type, aggregate_id)
             WHERE a.consumer = $1
             ORDER BY a.source, a.aggregate_type, a.aggregate_id
             FOR UPDATE OF a",
        )
        .bind(consumer)
        .bind(&sources)
        .bind(&types)
        .bind(&ids)
        .fetch_all(&mut **tx)
        .await?;
        // Only now, under the locks. LATERAL with a limit stops at the first of perhaps very many.
        let held: Vec<(String, String, String)> = sqlx::query_as(
            "SELECT k.source, k.aggregate_type, k.aggregate_id
             FROM unnest($2::text[], $3::text[], $4::text[]) AS k (source, aggregate_type, aggregate_id),
                  LATERAL (SELECT FROM inbox.held h
                           WHERE (h.consumer, h.source, h.aggregate_type, h.aggregate_id)
                               = ($1, k.source, k.aggregate_type, k.aggregate_id) LIMIT 1) AS any_held",
        )
        .bind(consumer)
        .bind(sources)
        .bind(types)
        .bind(ids)
        .fetch_all(&mut **tx)
        .await?;
        let mut chains: BTreeMap<Key, Chain> = locked
            .into_iter()
            .map(|(source, aggregate_type, aggregate_id, version, last_event_id)| {
                let chain = Chain { version, last_event_id, held: false, changed: false };
                (Key { source, aggregate_type, aggregate_id }, chain)
            })
            .collect();
        for (source, aggregate_type, aggregate_id) in held {
            if let Some(chain) = chains.get_mut(&Key { source, aggregate_type, aggregate_id }) {
                chain.held = true;
            }
        }
        Ok(Self { consumer, chains })
    }

    /// The chain of one of the keys that were locked. Every key was inserted before it was locked, so a
    /// missing row was deleted in between by somebody's hand; that is an error of its own.
    pub(crate) fn chain(&self, key: &Key) -> sqlx::Result<&Chain> {
        self.chains.get(key).ok_or(sqlx::Error::RowNotFound)
    }

    /// `event` was applied: it is where its chain stands now.
    pub(crate) fn advance(&mut self, key: &Key, event: &Event) {
        if let Some(chain) = self.chains.get_mut(key) {
            chain.version = event.version;
            chain.last_event_id = Some(event.id);
            chain.changed = true;
        }
    }

    /// Which event is held at `version`, and whether it is poison.
    pub(crate) async fn held_at(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        key: &Key,
        version: i64,
    ) -> sqlx::Result<Option<(Uuid, bool)>> {
        sqlx::query_as(
            "SELECT event_id, reason = 'poison' FROM inbox.held
             WHERE (consumer, source, aggregate_type, aggregate_id, version) = ($1, $2, $3, $4, $5)",
        )
        .bind(self.consumer)
        .bind(&key.source)
        .bind(&key.aggregate_type)
        .bind(&key.aggregate_id)
        .bind(version)
        .fetch_optional(&mut **tx)
        .await
    }

    /// The held event whose turn it is, unless it is poison.
    pub(crate) async fn next_held(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        key: &Key,
    ) -> sqlx::Result<Option<Event>> {
        let chain = self.chain(key)?;
        if !chain.held {
            return Ok(None);
        }
        let version = chain.version + 1;
        let row: Option<HeldRow> = sqlx::query_as(
            "SELECT event_id, type, occurred_at, headers, payload FROM inbox.held
             WHERE (consumer, source, aggregate_type, aggregate_id, version) = ($1, $2, $3, $4, $5)
               AND reason <> 'poison'",
        )
        .bind(self.consumer)
        .bind(&key.source)
        .bind(&key.aggregate_type)
        .bind(&key.aggregate_id)
        .bind(version)
        .fetch_optional(&mut **tx)
        .await?;
        Ok(row.map(|row| Event {
            id: row.event_id,
            source: key.source.clone(),
            aggregate_type: key.aggregate_type.clone(),
            aggregate_id: key.aggregate_id.clone(),
            version,
            type_: row.type_,
            occurred_at: row.occurred_at,
            headers: row.headers.0,
            payload: row.payload,
        }))
    }

    /// Keeps an event that came too early. It waits behind poison when that is what stands next.
    pub(crate) async fn hold(
        &mut self,
        tx: &mut Transaction<'_, Postgres>,
        key: &Key,
        event: &Event,
    ) -> sqlx::Result<Hold> {
        let next = self.chain(key)?.version + 1;
        let inserted = sqlx::query(
            "INSERT INTO inbox.held (consumer, source, aggregate_type, aggregate_id, version, event_id, type,
                                     occurred_at, headers, payload, reason)
             SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9::text::json, $10,
                    CASE WHEN EXISTS (
                        SELECT FROM inbox.held
                        WHERE (consumer, source, aggregate_type, aggregate_id, version) = ($1, $2, $3, $4, $11)
                          AND reason = 'poison') THEN 'behind' ELSE 'gap' END
             ON CONFLICT DO NOTHING",
        )
        .bind(self.consumer)
        .bind(&key.source)
        .bind(&key.aggregate_type)
        .bind(&key.aggregate_id)
        .bind(event.version)
        .bind(event.id)
        .bind(&event.type_)
        .bind(event.occurred_at)
        .bind(json_text(&event.headers))
        .bind(&event.payload)
        .bind(next)
        .execute(&mut **tx)
        .await?
        .rows_affected();
        if let Some(chain) = self.chains.get_mut(key) {
            chain.held = true;
        }
        if inserted == 1 {
            return Ok(Hold::Held);
        }
        match self.held_at(tx, key, event.version).await? {
            Some((id, _)) if id != event.id => Ok(Hold::Contradicted),
            _ => Ok(Hold::Known),
        }
    }

    /// Keeps an event that its handler refused, or counts one more attempt of it.
    pub(crate) async fn poison(
        &mut self,
        tx: &mut Transaction<'_, Postgres>,
        key: &Key,
        event: &Event,
        error: &str,
    ) -> sqlx::Result<()> {
        // A text of PostgreSQL's cannot hold NUL, and a list of errors no novels.
        let error: String = error.chars().filter(|c| *c != '\0').take(1_000).collect();
        sqlx::query(
            "INSERT INTO inbox.held (consumer, source, aggregate_type, aggregate_id, version, event_id, type,
                                     occurred_at, headers, payload, reason, error, attempts)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9::text::json, $10, 'poison', $11, 1)
             ON CONFLICT (consumer, source, aggregate_type, aggregate_id, version) DO UPDATE
             SET reason = 'poison', error = excluded.error, attempts = held.attempts + 1, last_at = now()",
        )
        .bind(self.consumer)
        .bind(&key.source)
        .bind(&key.aggregate_type)
        .bind(&key.aggregate_id)
        .bind(event.version)
        .bind(event.id)
        .bind(&event.type_)
        .bind(event.occurred_at)
        .bind(json_text(&event.headers))
        .bind(&event.payload)
        .bind(error)
        .execute(&mut **tx)
        .await?;
        if let Some(chain) = self.chains.get_mut(key) {
            chain.held = true;
            chain.changed = true;
        }
        Ok(())
    }

    /// Keeps a message that cannot be applied, as it came. A redelivery is counted, not stored again.
    pub(crate) async fn reject(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        envelope: &Envelope,
        reason: Rejection,
        detail: &str,
    ) -> sqlx::Result<()> {
        // Each part with its length before it, so that no two messages run together to the same bytes.
        let message_id = envelope.properties.message_id().as_ref().map_or("", |id| id.as_str());
        let mut identity = Vec::new();
        for part in [reason.as_str(), message_id, &envelope.routing_key] {
            identity.extend_from_slice(&part.len().to_be_bytes());
            identity.extend_from_slice(part.as_bytes());
        }
        sqlx::query(
            "INSERT INTO inbox.rejected AS r (consumer, digest, reason, detail, routing_key, properties, body)
             VALUES ($1, sha256($2 || $7), $3, $4, $5, $6::text::json, $7)
             ON CONFLICT (consumer, digest) DO UPDATE SET times = r.times + 1, last_at = now()",
        )
        .bind(self.consumer)
        .bind(identity)
        .bind(reason.as_str())
        .bind(detail)
        .bind(envelope.routing_key.replace('\0', "\u{fffd}"))
        .bind(envelope.properties_json().to_string())
        .bind(&envelope.body)
        .execute(&mut **tx)
        .await?;
        Ok(())
    }

    /// Writes how far the chains have come, drops what they hold at or below that, and says of the rest
    /// what it waits for now.
    pub(crate) async fn save(&self, tx: &mut Transaction<'_, Postgres>) -> sqlx::Result<()> {
        let changed = || self.chains.iter().filter(|(_, chain)| chain.changed);
        // A chain whose first event is poison has changed, but has no version yet.
        let applied = || changed().filter(|(_, chain)| chain.version > 0);
        if applied().next().is_some() {
            let (sources, types, ids) = columns(applied().map(|(key, _)| key));
            let versions: Vec<i64> = applied().map(|(_, chain)| chain.version).collect();
            let last: Vec<Option<Uuid>> = applied().map(|(_, chain)| chain.last_event_id).collect();
            sqlx::query(
                "UPDATE inbox.aggregate a
                 SET version = k.version, last_event_id = k.last_event_id, updated_at = now()
                 FROM unnest($2::text[], $3::text[], $4::text[], $5::bigint[], $6::uuid[])
                      AS k (source, aggregate_type, aggregate_id, version, last_event_id)
                 WHERE (a.consumer, a.source, a.aggregate_type, a.aggregate_id)
                     = ($1, k.source, k.aggregate_type, k.aggregate_id)",
            )
            .bind(self.consumer)
            .bind(sources)
            .bind(types)
            .bind(ids)
            .bind(versions)
            .bind(last)
            .execute(&mut **tx)
            .await?;
        }
        for (key, chain) in changed().filter(|(_, chain)| chain.held) {
            sqlx::query(
                "DELETE FROM inbox.held
                 WHERE (consumer, source, aggregate_type, aggregate_id) = ($1, $2, $3, $4) AND version <= $5",
            )
            .bind(self.consumer)
            .bind(&key.source)
            .bind(&key.aggregate_type)
            .bind(&key.aggregate_id)
            .bind(chain.version)
            .execute(&mut **tx)
            .await?;
            sqlx::query(
                "UPDATE inbox.held h SET reason = now_waits.for_
                 FROM (SELECT CASE WHEN EXISTS (
                           SELECT FROM inbox.held
                           WHERE (consumer, source, aggregate_type, aggregate_id, version)
                               = ($1, $2, $3, $4, $5 + 1)
                             AND reason = 'poison') THEN 'behind' ELSE 'gap' END AS for_) AS now_waits
                 WHERE (h.consumer, h.source, h.aggregate_type, h.aggregate_id) = ($1, $2, $3, $4)
                   AND h.reason NOT IN ('poison', now_waits.for_)",
            )
            .bind(self.consumer)
            .bind(&key.source)
            .bind(&key.aggregate_type)
            .bind(&key.aggregate_id)
            .bind(chain.version)
            .execute(&mut **tx)
            .await?;
        }
        Ok(())
    }
}

/// As text: sqlx sends JSON as jsonb, which refuses the "\u0000" that a header may hold.
fn json_text(headers: &Map<String, Value>) -> String {
    // Keys are texts, so this cannot fail.
    serde_json::to_string(headers).unwrap_or_default()
}

#[derive(sqlx::FromRow)]
struct HeldRow {
    event_id: Uuid,
    #[sqlx(rename = "type")]
    type_: String,
    occurred_at: Option<chrono::DateTime<chrono::Utc>>,
    headers: Json<Map<String, Value>>,
    payload: Vec<u8>,
}
