//! What a transaction writes to the schema `inbox`: each kind of thing in one statement, however many.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
};

use serde_json::{Map, Value, json};
use sqlx::{Postgres, Transaction};
use uuid::Uuid;

use crate::{
    Event,
    chain::{Chain, Key},
    kept::Kept,
    ledger::{Ledger, columns},
};

/// Why a message is kept in `inbox.rejected`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rejection {
    Malformed,
    Fork,
    /// Its source is not followed.
    Foreign,
    /// Its source is followed, and published by another user.
    WrongUser,
}

impl Rejection {
    pub(crate) const ALL: [Self; 4] = [Self::Malformed, Self::Fork, Self::Foreign, Self::WrongUser];

    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Fork => "fork",
            Self::Foreign => "foreign",
            Self::WrongUser => "wrong-user",
        }
    }
}

/// What stands for all that are rejected beyond those that are kept.
pub(crate) const NOT_KEPT: &str =
    "not kept, only counted: as many messages were rejected for this reason as are kept";

/// A message that cannot be applied.
pub(crate) struct Rejected<'a> {
    pub(crate) kept: Cow<'a, Kept<'a>>,
    /// The event in it, when it is one.
    pub(crate) event: Option<&'a Event>,
    pub(crate) reason: Rejection,
    pub(crate) detail: String,
}

impl Ledger<'_> {
    /// Writes how far the chains have come, drops what they hold at or below that, erases what others hold of those that
    /// ended, keeps what has to wait, and says of the rest what it waits for now.
    pub(crate) async fn save(&self, tx: &mut Transaction<'_, Postgres>) -> sqlx::Result<()> {
        self.save_versions(tx).await?;
        self.drop_applied(tx).await?;
        self.erase_ended(tx).await?;
        self.hold(tx).await?;
        self.save_reasons(tx).await
    }

    /// Of aggregates that have ended, what anybody here holds or has rejected loses its content.
    async fn erase_ended(&self, tx: &mut Transaction<'_, Postgres>) -> sqlx::Result<()> {
        let (keys, versions): (Vec<&Key>, Vec<i64>) =
            self.chains.iter().filter_map(|(key, chain)| Some((key, chain.ended?))).unzip();
        if keys.is_empty() {
            return Ok(());
        }
        let (sources, types, ids) = columns(keys.into_iter());
        sqlx::query("SELECT inbox.erase($1, $2, $3, $4)")
            .bind(sources)
            .bind(types)
            .bind(ids)
            .bind(versions)
            .execute(&mut **tx)
            .await?;
        Ok(())
    }

    async fn save_versions(&self, tx: &mut Transaction<'_, Postgres>) -> sqlx::Result<()> {
        let moved = || self.chains.iter().filter(|(_, chain)| chain.version > chain.stored);
        if moved().next().is_none() {
            return Ok(());
        }
        let (sources, types, ids) = columns(moved().map(|(key, _)| key));
        let versions: Vec<i64> = moved().map(|(_, chain)| chain.version).collect();
        let last: Vec<Option<Uuid>> = moved().map(|(_, chain)| chain.last_event_id).collect();
        // Every one of them is there and locked, so each is an update, found by the primary key. A joined UPDATE
        // would be planned by what the server believes to be in the table.
        sqlx::query(
            "INSERT INTO inbox.aggregate (consumer, source, aggregate_type, aggregate_id, version, last_event_id)
             SELECT $1, k.source, k.aggregate_type, k.aggregate_id, k.version, k.last_event_id
             FROM unnest($2::text[], $3::text[], $4::text[], $5::bigint[], $6::uuid[])
                  AS k (source, aggregate_type, aggregate_id, version, last_event_id)
             ON CONFLICT (consumer, source, aggregate_type, aggregate_id) DO UPDATE
             SET version = excluded.version, last_event_id = excluded.last_event_id, updated_at = now()",
        )
        .bind(self.consumer)
        .bind(sources)
        .bind(types)
        .bind(ids)
        .bind(versions)
        .bind(last)
        .execute(&mut **tx)
        .await?;
        Ok(())
    }

    async fn drop_applied(&self, tx: &mut Transaction<'_, Postgres>) -> sqlx::Result<()> {
        let freed = || self.chains.iter().filter(|(_, c)| c.version > c.stored && c.has_stored());
        if freed().next().is_none() {
            return Ok(());
        }
        let (sources, types, ids) = columns(freed().map(|(key, _)| key));
        let versions: Vec<i64> = freed().map(|(_, chain)| chain.version).collect();
        sqlx::query(
            "DELETE FROM inbox.held WHERE ctid = ANY (ARRAY(
                 SELECT h.ctid
                 FROM unnest($2::text[], $3::text[], $4::text[], $5::bigint[])
                      AS k (source, aggregate_type, aggregate_id, version),
                      LATERAL (SELECT ctid FROM inbox.held
                               WHERE (consumer, source, aggregate_type, aggregate_id)
                                   = ($1, k.source, k.aggregate_type, k.aggregate_id) AND version <= k.version
                               OFFSET 0) AS h))",
        )
        .bind(self.consumer)
        .bind(sources)
        .bind(types)
        .bind(ids)
        .bind(versions)
        .execute(&mut **tx)
        .await?;
        Ok(())
    }

    async fn hold(&self, tx: &mut Transaction<'_, Postgres>) -> sqlx::Result<()> {
        let mut keys = Vec::new();
        let mut reasons = Vec::new();
        let mut events = Vec::new();
        for (key, chain) in &self.chains {
            let waits = chain.waits().as_str();
            for event in chain.held.values().filter_map(|held| held.received) {
                // What was received too early may have had its turn since.
                if event.version > chain.version {
                    keys.push(key);
                    reasons.push(waits);
                    events.push(event);
                }
            }
        }
        if events.is_empty() {
            return Ok(());
        }
        let (sources, types, ids) = columns(keys.into_iter());
        sqlx::query(
            "INSERT INTO inbox.held (consumer, source, aggregate_type, aggregate_id, version, event_id, type,
                                     occurred_at, headers, payload, reason)
             SELECT $1, k.source, k.aggregate_type, k.aggregate_id, k.version, k.event_id, k.type,
                    k.occurred_at, k.headers::json, k.payload, k.reason
             FROM unnest($2::text[], $3::text[], $4::text[], $5::bigint[], $6::uuid[], $7::text[],
                         $8::timestamptz[], $9::text[], $10::bytea[], $11::text[])
                  AS k (source, aggregate_type, aggregate_id, version, event_id, type, occurred_at, headers,
                        payload, reason)",
        )
        .bind(self.consumer)
        .bind(sources)
        .bind(types)
        .bind(ids)
        .bind(events.iter().map(|event| event.version).collect::<Vec<_>>())
        .bind(events.iter().map(|event| event.id).collect::<Vec<_>>())
        .bind(events.iter().map(|event| event.type_.as_str()).collect::<Vec<_>>())
        .bind(events.iter().map(|event| event.occurred_at).collect::<Vec<_>>())
        .bind(events.iter().map(|event| json_text(&event.headers)).collect::<Vec<_>>())
        .bind(events.iter().map(|event| event.payload.as_slice()).collect::<Vec<_>>())
        .bind(reasons)
        .execute(&mut **tx)
        .await?;
        Ok(())
    }

    /// Those that wait for the same chain wait for the same thing, so a look at a few tells of all.
    async fn save_reasons(&self, tx: &mut Transaction<'_, Postgres>) -> sqlx::Result<()> {
        let differs = |chain: &Chain<'_>| {
            let waits = chain.waits();
            chain
                .held
                .range(chain.version.saturating_add(1)..)
                .any(|(_, held)| held.received.is_none() && !held.reason.blocks() && held.reason != waits)
        };
        let other = || self.chains.iter().filter(|(_, chain)| differs(chain));
        if other().next().is_none() {
            return Ok(());
        }
        let (sources, types, ids) = columns(other().map(|(key, _)| key));
        let reasons: Vec<&str> = other().map(|(_, chain)| chain.waits().as_str()).collect();
        sqlx::query(
            "UPDATE inbox.held h SET reason = k.reason
             FROM unnest($2::text[], $3::text[], $4::text[], $5::text[])
                  AS k (source, aggregate_type, aggregate_id, reason),
                  LATERAL (SELECT ctid FROM inbox.held
                           WHERE (consumer, source, aggregate_type, aggregate_id)
                               = ($1, k.source, k.aggregate_type, k.aggregate_id)
                             AND reason IN ('gap', 'behind') AND reason <> k.reason OFFSET 0) AS other
             WHERE h.ctid = other.ctid",
        )
        .bind(self.consumer)
        .bind(sources)
        .bind(types)
        .bind(ids)
        .bind(reasons)
        .execute(&mut **tx)
        .await?;
        Ok(())
    }

    /// Keeps messages that cannot be applied. A redelivery is counted, not stored again; where `most` are kept for
    /// a reason, further ones are only counted, on a row for all of them.
    pub(crate) async fn reject(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        rejected: &[Rejected<'_>],
        most: u32,
    ) -> sqlx::Result<()> {
        if rejected.is_empty() {
            return Ok(());
        }
        let mut room = self.room(tx, rejected, most).await?;
        let uncounted: Vec<Kept<'static>> = rejected.iter().map(|r| Kept::uncounted(r.reason)).collect();
        let rows: Vec<(&Kept<'_>, &str, &str)> = rejected
            .iter()
            .zip(&uncounted)
            .map(|(r, uncounted)| {
                let detail = if room.take(r) { r.detail.as_str() } else { NOT_KEPT };
                let kept = if detail == NOT_KEPT { uncounted } else { &*r.kept };
                (kept, r.reason.as_str(), detail)
            })
            .collect();
        // In the order of the digest, like every lock; grouped, because one statement may not meet a
        // row of its own.
        sqlx::query(
            "INSERT INTO inbox.rejected AS r
                    (consumer, digest, reason, detail, routing_key, properties, body, bytes, about, times)
             SELECT DISTINCT ON (digest) $1, digest, k.reason, k.detail, k.routing_key, k.properties::json,
                    k.body, k.bytes, ARRAY(SELECT json_array_elements_text(k.about::json)),
                    count(*) OVER (PARTITION BY digest)
             FROM unnest($2::bytea[], $3::text[], $4::text[], $5::text[], $6::text[], $7::bytea[], $8::bigint[],
                         $9::text[])
                  WITH ORDINALITY AS k (digest, reason, detail, routing_key, properties, body, bytes, about, n)
             ORDER BY digest, k.n
             ON CONFLICT (consumer, digest) DO UPDATE SET times = r.times + excluded.times, last_at = now()",
        )
        .bind(self.consumer)
        .bind(rows.iter().map(|(kept, ..)| kept.digest.as_slice()).collect::<Vec<_>>())
        .bind(rows.iter().map(|(_, reason, _)| *reason).collect::<Vec<_>>())
        .bind(rows.iter().map(|(.., detail)| *detail).collect::<Vec<_>>())
        .bind(rows.iter().map(|(kept, ..)| kept.routing_key.as_str()).collect::<Vec<_>>())
        .bind(rows.iter().map(|(kept, ..)| kept.properties.as_str()).collect::<Vec<_>>())
        .bind(rows.iter().map(|(kept, ..)| kept.body).collect::<Vec<_>>())
        .bind(rows.iter().map(|(kept, ..)| kept.bytes).collect::<Vec<_>>())
        .bind(rows.iter().map(|(kept, ..)| json!(kept.about).to_string()).collect::<Vec<_>>())
        .execute(&mut **tx)
        .await?;
        Ok(())
    }

    /// What may still be kept, when `most` of each reason may be; 0 for any number.
    async fn room(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        rejected: &[Rejected<'_>],
        most: u32,
    ) -> sqlx::Result<Room> {
        if most == 0 {
            return Ok(Room { left: None, known: BTreeSet::new() });
        }
        let reasons: BTreeSet<&str> = rejected.iter().map(|r| r.reason.as_str()).collect();
        let kept: Vec<(String, i64)> = sqlx::query_as(
            "SELECT reason, (SELECT count(*) FROM (SELECT FROM inbox.rejected
                                                   WHERE consumer = $1 AND reason = r.reason LIMIT $3) AS counted)
             FROM unnest($2::text[]) AS r (reason)",
        )
        .bind(self.consumer)
        .bind(reasons.into_iter().collect::<Vec<_>>())
        .bind(i64::from(most))
        .fetch_all(&mut **tx)
        .await?;
        let known: Vec<Vec<u8>> =
            sqlx::query_scalar("SELECT digest FROM inbox.rejected WHERE consumer = $1 AND digest = ANY ($2)")
                .bind(self.consumer)
                .bind(rejected.iter().map(|r| r.kept.digest.as_slice()).collect::<Vec<_>>())
                .fetch_all(&mut **tx)
                .await?;
        let left = kept.into_iter().map(|(reason, count)| (reason, i64::from(most) - count)).collect();
        Ok(Room { left: Some(left), known: known.into_iter().collect() })
    }
}

/// Which messages may be stored.
struct Room {
    /// How many of each reason; None for any number.
    left: Option<BTreeMap<String, i64>>,
    /// The digests of those that are stored.
    known: BTreeSet<Vec<u8>>,
}

impl Room {
    fn take(&mut self, rejected: &Rejected<'_>) -> bool {
        let Some(left) = self.left.as_mut().and_then(|left| left.get_mut(rejected.reason.as_str())) else {
            return true;
        };
        if self.known.contains(&rejected.kept.digest) {
            return true;
        }
        let taken = *left > 0;
        if taken {
            *left -= 1;
            self.known.insert(rejected.kept.digest.clone());
        }
        taken
    }
}

/// As text: sqlx sends JSON as jsonb, which refuses the "\u0000" that a header may hold.
pub(crate) fn json_text(headers: &Map<String, Value>) -> String {
    // Keys are texts, so this cannot fail.
    serde_json::to_string(headers).unwrap_or_default()
}
