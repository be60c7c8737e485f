//! Locks the chains of a transaction.

use std::collections::{BTreeMap, BTreeSet};

use sqlx::{Postgres, Transaction};
use uuid::Uuid;

use crate::{
    chain::{Chain, Earlier, Key},
    ledger::{Ledger, columns},
    recent::Recent,
};

impl<'a> Ledger<'a> {
    /// Locks the chains of `keys`, new ones included. Two statements, both in the order of the key: one
    /// alone would miss a row that another transaction has just committed, and to lock first and make what is
    /// missing then would be out of order.
    ///
    /// Each row is found by the primary key. For a join, the planner reads all of the consumer's rows while a growing
    /// table has no statistics yet. Of a chain that has not begun, the chains of earlier incarnations are read too.
    /// They need no lock: only a transaction with the lock of the new chain changes them, because the row of the source
    /// is locked.
    pub(crate) async fn lock(
        tx: &mut Transaction<'_, Postgres>,
        consumer: &'a str,
        keys: &BTreeSet<Key>,
    ) -> sqlx::Result<Self> {
        if keys.is_empty() {
            return Ok(Self { consumer, chains: BTreeMap::new(), unreadable: Vec::new() });
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
        let locked: Vec<ChainRow> = sqlx::query_as(
            "SELECT k.source, k.aggregate_type, k.aggregate_id, a.version, a.last_event_id, a.recent, a.ended,
                    coalesce(e.sources, '{}') AS earlier, coalesce(e.version, 0) AS earlier_version
             FROM (SELECT * FROM unnest($2::text[], $3::text[], $4::text[])
                                 AS k (source, aggregate_type, aggregate_id)
                   ORDER BY source, aggregate_type, aggregate_id) k
             CROSS JOIN LATERAL (
                 SELECT version, last_event_id, recent, ended FROM inbox.aggregate
                 WHERE (consumer, source, aggregate_type, aggregate_id)
                     = ($1, k.source, k.aggregate_type, k.aggregate_id)
                 FOR UPDATE) a
             LEFT JOIN LATERAL (
                 SELECT array_agg(chain.source) AS sources, max(chain.version) FILTER (WHERE NOT chain.ended) AS version
                 FROM inbox.source s
                 CROSS JOIN LATERAL unnest(s.earlier) AS earlier (incarnation)
                 CROSS JOIN LATERAL (
                     SELECT source, version, ended FROM inbox.aggregate
                     WHERE (consumer, source, aggregate_type, aggregate_id)
                         = ($1, inbox.spell(s.name, earlier.incarnation), k.aggregate_type, k.aggregate_id)
                     OFFSET 0) chain
                 WHERE (s.consumer, s.name) = ($1, split_part(k.source, '~', 1)) AND a.version = 0
                   AND earlier.incarnation < inbox.incarnation(k.source)) e ON true",
        )
        .bind(consumer)
        .bind(&sources)
        .bind(&types)
        .bind(&ids)
        .fetch_all(&mut **tx)
        .await?;
        let chains = locked.into_iter().map(ChainRow::chain).collect();
        Ok(Self { consumer, chains, unreadable: Vec::new() })
    }

    /// Which of `keys` have a row.
    pub(crate) async fn known(
        tx: &mut Transaction<'_, Postgres>,
        consumer: &str,
        keys: &BTreeSet<Key>,
    ) -> sqlx::Result<BTreeSet<Key>> {
        let (sources, types, ids) = columns(keys.iter());
        let known: Vec<Key> = sqlx::query_as(
            "SELECT k.source, k.aggregate_type, k.aggregate_id
             FROM unnest($2::text[], $3::text[], $4::text[]) AS k (source, aggregate_type, aggregate_id)
             WHERE EXISTS (SELECT FROM inbox.aggregate
                           WHERE (consumer, source, aggregate_type, aggregate_id)
                               = ($1, k.source, k.aggregate_type, k.aggregate_id))",
        )
        .bind(consumer)
        .bind(sources)
        .bind(types)
        .bind(ids)
        .fetch_all(&mut **tx)
        .await?;
        Ok(known.into_iter().collect())
    }
}

#[derive(sqlx::FromRow)]
struct ChainRow {
    #[sqlx(flatten)]
    key: Key,
    version: i64,
    last_event_id: Option<Uuid>,
    recent: Option<Vec<u8>>,
    ended: bool,
    earlier: Vec<String>,
    earlier_version: i64,
}

impl ChainRow {
    fn chain<'a>(self) -> (Key, Chain<'a>) {
        let recent = Recent::load(self.recent.as_deref(), self.last_event_id);
        let earlier = Earlier { sources: self.earlier, has_state: self.earlier_version > 0 };
        (self.key, Chain::new(self.version, self.last_event_id, recent, self.ended, earlier))
    }
}
