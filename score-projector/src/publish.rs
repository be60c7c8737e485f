//! Publishes the score service's events: they take their versions and go into the outbox. The end of a score erases the
//! content of its earlier events.

use std::collections::{BTreeMap, BTreeSet};

use outbox::{AppendError, Ended, NewEvent};
use sqlx::{Postgres, Transaction};
use uuid::Uuid;

use crate::batch::entry::ScoreEvent;

type Tx<'a, 'tx> = &'a mut Transaction<'tx, Postgres>;

/// Reads of which of `persons` an event was ever published.
pub(crate) async fn published(tx: Tx<'_, '_>, persons: &BTreeSet<Uuid>) -> sqlx::Result<BTreeSet<Uuid>> {
    if persons.is_empty() {
        return Ok(BTreeSet::new());
    }
    let published: Vec<Uuid> =
        sqlx::query_scalar("SELECT person_id FROM score.chain WHERE person_id = ANY ($1)")
            .bind(persons.iter().copied().collect::<Vec<_>>())
            .fetch_all(&mut **tx)
            .await?;
    Ok(published.into_iter().collect())
}

/// Appends events in their order. Raising a chain's version locks its row, so no other transaction gets the same versions,
/// and positions come after them. When a score ends, its earlier events are erased under the same lock, in a later
/// statement.
pub(crate) async fn append(tx: Tx<'_, '_>, events: Vec<ScoreEvent>) -> Result<(), AppendError> {
    if events.is_empty() {
        return Ok(());
    }
    let mut counts: BTreeMap<Uuid, i64> = BTreeMap::new();
    for event in &events {
        *counts.entry(event.person).or_default() += 1;
    }
    let raised: Vec<(Uuid, i64)> = sqlx::query_as(
        "INSERT INTO score.chain AS c (person_id, version)
         SELECT person_id, events FROM unnest($1::uuid[], $2::bigint[]) AS new (person_id, events)
         ORDER BY person_id
         ON CONFLICT (person_id) DO UPDATE SET version = c.version + excluded.version
         RETURNING person_id, version",
    )
    .bind(counts.keys().copied().collect::<Vec<_>>())
    .bind(counts.values().copied().collect::<Vec<_>>())
    .fetch_all(&mut **tx)
    .await?;
    // From where each chain stood before.
    let mut versions: BTreeMap<Uuid, i64> = raised
        .into_iter()
        .map(|(person, version)| (person, version - counts.get(&person).copied().unwrap_or_default()))
        .collect();
    let events: Vec<NewEvent> = events
        .into_iter()
        .map(|event| {
            let version = versions.entry(event.person).or_default();
            *version += 1;
            NewEvent {
                id: Uuid::now_v7(),
                aggregate_type: events::AGGREGATE_SCORE,
                aggregate_id: event.person.to_string(),
                version: *version,
                type_: event.type_,
                payload: event.payload,
                headers: event.headers,
            }
        })
        .collect();
    outbox::append(tx, &events).await?;
    let ended: Vec<Ended> = events.into_iter().filter_map(ended).collect();
    outbox::erase(tx, &ended).await?;
    Ok(())
}

fn ended(event: NewEvent) -> Option<Ended> {
    let NewEvent { aggregate_type, aggregate_id, version, .. } = event;
    (event.type_ == events::SCORE_DELETED).then_some(Ended { aggregate_type, aggregate_id, version })
}
