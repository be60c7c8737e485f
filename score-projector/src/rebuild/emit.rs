//! Publishes the differences of a swap, so that subscribers to `score.*` follow it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context;
use rust_decimal::Decimal;
use sqlx::{Postgres, Transaction};
use uuid::Uuid;

use crate::{
    batch::entry::{Change, ScoreEvent, changes},
    publish,
    store::{self, Score},
};

type Tx<'a, 'tx> = &'a mut Transaction<'tx, Postgres>;

/// Persons whose scores are compared in memory at a time.
const PAGE: i64 = 500;

/// Appends the events that lead from the live model to the shadow for the persons that the comparison has remembered, under
/// locks that keep both models as they are. Returns how many there are.
pub(super) async fn differences(tx: Tx<'_, '_>) -> anyhow::Result<u64> {
    let (mut last, mut appended) = (Uuid::nil(), 0);
    loop {
        let page: Vec<Uuid> =
            sqlx::query_scalar("SELECT id FROM pg_temp.differing WHERE id > $1 ORDER BY id LIMIT $2")
                .bind(last)
                .bind(PAGE)
                .fetch_all(&mut **tx)
                .await?;
        let Some(end) = page.last() else { return Ok(appended) };
        last = *end;
        let mut live = store::scores(tx, "score", &page).await?;
        let mut shadow = store::scores(tx, "score_shadow", &page).await?;
        let published = publish::published(tx, &page.iter().copied().collect::<BTreeSet<_>>()).await?;
        let mut events = Vec::new();
        for id in page {
            events.extend(between(id, live.remove(&id), shadow.remove(&id), published.contains(&id))?);
        }
        appended += events.len() as u64;
        publish::append(tx, events).await.context("what differs could not be published")?;
    }
}

/// The events that lead from `live` to `shadow` for one person, of whom something was `published` before
/// or not.
fn between(
    id: Uuid,
    live: Option<Score>,
    shadow: Option<Score>,
    published: bool,
) -> anyhow::Result<Vec<ScoreEvent>> {
    let Some((person, after)) = shadow else {
        let gone = live.filter(|_| published).map(|_| ScoreEvent::deleted(id, None));
        return Ok(gone.transpose()?.into_iter().collect());
    };
    let (cpf, before) = live.map_or((person.cpf, BTreeMap::new()), |(live, before)| (live.cpf, before));
    let mut changes = changes(&before, &after, cpf != person.cpf);
    if changes.is_empty() {
        // The total alone was wrong: the newest entry says the right one. Without an entry there is
        // nothing that a subscriber could have heard.
        let newest = after.into_values().next_back();
        changes.extend(newest.map(|entry| Change::Changed { before: entry.clone(), after: entry }));
    }
    let mut total = person.total - changes.iter().map(Change::difference).sum::<Decimal>();
    let mut events = Vec::with_capacity(changes.len());
    for change in changes {
        total += change.difference();
        let (type_, entry) = change.published();
        events.push(ScoreEvent::entry(type_, id, person.cpf, &entry, total, None)?);
    }
    Ok(events)
}
