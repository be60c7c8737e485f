//! What a transaction writes to the schema `inbox`: one statement for each table and action, for any number of rows.

use serde_json::{Map, Value};
use sqlx::{Postgres, Transaction};
use uuid::Uuid;

use crate::{
    chain::{Chain, Key},
    ledger::{Ledger, columns},
};

impl Ledger<'_> {
    /// Stores the chains' versions, ends the chains of earlier incarnations that they replace, deletes held events that
    /// were applied or replaced, erases the content of aggregates that ended, holds the events that wait, and updates the
    /// reasons of the others.
    pub(crate) async fn save(&self, tx: &mut Transaction<'_, Postgres>) -> sqlx::Result<()> {
        self.save_versions(tx).await?;
        let replaced = self.replaced();
        self.end_replaced(tx, &replaced).await?;
        self.drop_done(tx, &replaced).await?;
        self.erase_ended(tx).await?;
        self.hold(tx).await?;
        self.save_reasons(tx).await
    }

    /// Erases the content of held events and rejected messages of ended aggregates, for all consumers.
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
        let moved = || self.chains.iter().filter(|(_, chain)| chain.version() > chain.stored);
        if moved().next().is_none() {
            return Ok(());
        }
        let (sources, types, ids) = columns(moved().map(|(key, _)| key));
        let versions: Vec<i64> = moved().map(|(_, chain)| chain.version()).collect();
        let recent: Vec<Vec<u8>> = moved().map(|(_, chain)| chain.reached.recent.bytes()).collect();
        let ended: Vec<bool> = moved().map(|(_, chain)| chain.over).collect();
        let last: Vec<Option<Uuid>> = moved().map(|(_, chain)| chain.reached.last_event_id).collect();
        // Every one of them is there and locked, so each is an update, found by the primary key. A joined UPDATE
        // would be planned by what the server believes to be in the table.
        sqlx::query(
            "INSERT INTO inbox.aggregate (consumer, source, aggregate_type, aggregate_id, version, last_event_id, recent,
                                          ended)
             SELECT $1, k.source, k.aggregate_type, k.aggregate_id, k.version, k.last_event_id, k.recent, k.ended
             FROM unnest($2::text[], $3::text[], $4::text[], $5::bigint[], $6::uuid[], $7::bytea[], $8::boolean[])
                  AS k (source, aggregate_type, aggregate_id, version, last_event_id, recent, ended)
             ON CONFLICT (consumer, source, aggregate_type, aggregate_id) DO UPDATE
             SET version = excluded.version, last_event_id = excluded.last_event_id, recent = excluded.recent,
                 ended = excluded.ended, updated_at = now()",
        )
        .bind(self.consumer)
        .bind(sources)
        .bind(types)
        .bind(ids)
        .bind(versions)
        .bind(last)
        .bind(recent)
        .bind(ended)
        .execute(&mut **tx)
        .await?;
        Ok(())
    }

    /// The chains of earlier incarnations whose aggregates begin anew.
    fn replaced(&self) -> Vec<Key> {
        let all =
            self.chains.iter().flat_map(|(key, chain)| chain.replaces().iter().map(move |by| (key, by)));
        all.map(|(key, source)| Key { source: source.clone(), ..key.clone() }).collect()
    }

    /// Ends the chains that are replaced. The handler has ended their state.
    async fn end_replaced(&self, tx: &mut Transaction<'_, Postgres>, replaced: &[Key]) -> sqlx::Result<()> {
        if replaced.is_empty() {
            return Ok(());
        }
        let (sources, types, ids) = columns(replaced.iter());
        sqlx::query(
            "UPDATE inbox.aggregate SET ended = true WHERE ctid = ANY (ARRAY(
                 SELECT a.ctid
                 FROM unnest($2::text[], $3::text[], $4::text[]) AS k (source, aggregate_type, aggregate_id),
                      LATERAL (SELECT ctid FROM inbox.aggregate
                               WHERE (consumer, source, aggregate_type, aggregate_id)
                                   = ($1, k.source, k.aggregate_type, k.aggregate_id) AND NOT ended OFFSET 0) AS a))",
        )
        .bind(self.consumer)
        .bind(sources)
        .bind(types)
        .bind(ids)
        .execute(&mut **tx)
        .await?;
        Ok(())
    }

    async fn drop_done(&self, tx: &mut Transaction<'_, Postgres>, replaced: &[Key]) -> sqlx::Result<()> {
        let applied = self.chains.iter().filter(|(_, c)| c.version() > c.stored && c.has_stored());
        let applied = applied.map(|(key, chain)| (key, chain.version()));
        let replaced = replaced.iter().map(|key| (key, i64::MAX));
        let (keys, versions): (Vec<&Key>, Vec<i64>) = applied.chain(replaced).unzip();
        if keys.is_empty() {
            return Ok(());
        }
        let (sources, types, ids) = columns(keys.into_iter());
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
                if event.version > chain.version() {
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

    /// The held events of a chain share one reason, so a few of them tell the reason of all.
    async fn save_reasons(&self, tx: &mut Transaction<'_, Postgres>) -> sqlx::Result<()> {
        let differs = |chain: &Chain<'_>| {
            let waits = chain.waits();
            chain
                .held
                .range(chain.next_version()..)
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
}

/// As text: sqlx sends JSON as jsonb, which refuses the "\u0000" that a header may hold.
pub(crate) fn json_text(headers: &Map<String, Value>) -> String {
    // Keys are texts, so this cannot fail.
    serde_json::to_string(headers).unwrap_or_default()
}
