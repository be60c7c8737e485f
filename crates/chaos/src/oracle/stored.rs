//! Everything that the two databases store.

use std::collections::{BTreeMap, HashMap};

use anyhow::Context;
use sqlx::{Connection, Executor, PgConnection};
use uuid::Uuid;

use crate::{
    addresses::Addresses,
    event::{AggregateKey, EventSummary, Incarnation},
    model::{Amount, Item, ItemKind, Person},
};

/// A stored event.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub(crate) position: i64,
    pub(crate) summary: EventSummary,
}

/// An outbox.
#[derive(Debug)]
pub(crate) struct Outbox {
    pub(crate) events: BTreeMap<(AggregateKey, i64), Event>,
    /// Versions that are stored twice.
    pub(crate) duplicates: Vec<(AggregateKey, i64)>,
    /// The last version of each aggregate, and how many it has.
    pub(crate) chains: HashMap<AggregateKey, (i64, usize)>,
    /// The last position, whether or not its transaction was committed.
    pub(crate) last_position: i64,
    /// The present incarnation of its source.
    pub(crate) incarnation: Incarnation,
    pub(crate) low_water: i64,
    pub(crate) parked: Vec<String>,
    pub(crate) dead_rows: i64,
}

/// A person's row of the read model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ScoreRow {
    pub(crate) cpf: i64,
    pub(crate) version: i64,
    pub(crate) total: String,
    pub(crate) entries: BTreeMap<Uuid, (ItemKind, Amount, i64)>,
}

/// The last version of an aggregate that the inbox has applied.
#[derive(Clone, Debug)]
pub(crate) struct InboxRow {
    pub(crate) source: String,
    pub(crate) incarnation: Incarnation,
    pub(crate) ended: bool,
    pub(crate) key: AggregateKey,
    pub(crate) version: i64,
    pub(crate) last_event: Option<Uuid>,
}

/// Both databases.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) person: Outbox,
    pub(crate) persons: BTreeMap<Uuid, Person>,
    /// The version of each note and memo.
    pub(crate) notes: BTreeMap<AggregateKey, i64>,
    pub(crate) score: Outbox,
    pub(crate) scores: BTreeMap<Uuid, ScoreRow>,
    pub(crate) chains: BTreeMap<Uuid, i64>,
    pub(crate) applied: Vec<InboxRow>,
    /// Held and rejected events, in words.
    pub(crate) held_or_rejected: Vec<String>,
}

impl Stored {
    /// Reads all of it.
    pub(crate) async fn load(addresses: &Addresses) -> anyhow::Result<Self> {
        let mut conn = addresses.connect("person").await?;
        conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
        let person = Outbox::load(&mut conn).await.context("the outbox of persons")?;
        let persons = persons(&mut conn).await.context("the persons")?;
        let notes: Vec<(String, String, i64)> =
            sqlx::query_as("SELECT kind, id, version FROM public.note").fetch_all(&mut conn).await?;
        conn.close().await?;
        let mut conn = addresses.connect("score").await?;
        conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
        let score = Outbox::load(&mut conn).await.context("the outbox of scores")?;
        let scores = scores(&mut conn).await.context("the read model")?;
        let chains: Vec<(Uuid, i64)> = sqlx::query_as(
            "SELECT aggregate_id::uuid, version FROM outbox.aggregate WHERE aggregate_type = 'score'",
        )
        .fetch_all(&mut conn)
        .await?;
        let applied = applied(&mut conn).await.context("the inbox")?;
        let held_or_rejected = sqlx::query_scalar(
            "SELECT 'held (' || reason || '): ' || aggregate_type || '/' || aggregate_id || ' version '
                    || version || coalesce(': ' || error, '') FROM inbox.held
             UNION ALL
             SELECT 'rejected (' || reason || ') ' || times || ' times: ' || detail FROM inbox.rejected
             -- Fault a stranger sent may come again after an operator has dropped it. It names no user; the relays
             -- always name theirs.
             WHERE reason NOT IN ('foreign', 'wrong-user') OR properties::jsonb ->> 'user_id' IS NOT NULL",
        )
        .fetch_all(&mut conn)
        .await?;
        conn.close().await?;
        let notes = notes.into_iter().map(|(kind, id, version)| ((kind, id), version)).collect();
        let chains = chains.into_iter().collect();
        Ok(Self { person, persons, notes, score, scores, chains, applied, held_or_rejected })
    }
}

type EventRow = (i64, Uuid, String, String, i64, String, String, bool);

impl Outbox {
    /// Reads it.
    pub(crate) async fn load(conn: &mut PgConnection) -> anyhow::Result<Self> {
        let rows: Vec<EventRow> = sqlx::query_as(
            "SELECT position, id, aggregate_type, aggregate_id, version, type, payload::text,
                    coalesce(headers @> '{\"erased\": true}', false)
             FROM outbox.event ORDER BY position",
        )
        .fetch_all(&mut *conn)
        .await?;
        let (mut events, mut duplicates) = (BTreeMap::new(), Vec::new());
        let mut chains: HashMap<AggregateKey, (i64, usize)> = HashMap::new();
        for (position, id, aggregate_type, aggregate_id, version, type_, payload, erased) in rows {
            let summary = EventSummary::new(id, type_, &aggregate_type, payload.as_bytes(), erased)
                .context("a body is not JSON")?;
            let key = (aggregate_type, aggregate_id);
            let (last, count) = chains.entry(key.clone()).or_default();
            (*last, *count) = (version.max(*last), *count + 1);
            if events.insert((key.clone(), version), Event { position, summary }).is_some() {
                duplicates.push((key, version));
            }
        }
        let (last_position, low_water, incarnation): (i64, i64, i64) = sqlx::query_as(
            "SELECT (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM outbox.position),
                    coalesce((SELECT min(low_water) FROM outbox.relay), 0),
                    (SELECT incarnation FROM outbox.source)",
        )
        .fetch_one(&mut *conn)
        .await?;
        let parked = sqlx::query_scalar(
            "SELECT 'parked (' || reason || '): position ' || position || ', ' || type || ': ' || detail
             FROM outbox.parked ORDER BY position",
        )
        .fetch_all(&mut *conn)
        .await?;
        let dead_rows: i64 = sqlx::query_scalar(
            "SELECT coalesce(sum((public.pgstattuple(inhrelid)).dead_tuple_count), 0)::bigint
             FROM pg_inherits WHERE inhparent = 'outbox.event'::regclass",
        )
        .fetch_one(&mut *conn)
        .await?;
        Ok(Self { events, duplicates, chains, last_position, incarnation, low_water, parked, dead_rows })
    }

    /// The last position that is stored.
    pub(crate) fn last_stored(&self) -> i64 {
        self.events.values().map(|event| event.position).max().unwrap_or(0)
    }
}

/// Reads the persons.
pub(crate) async fn persons(conn: &mut PgConnection) -> anyhow::Result<BTreeMap<Uuid, Person>> {
    type Row = (Uuid, i64, i64, String, Option<String>, bool);
    let rows: Vec<Row> =
        sqlx::query_as("SELECT id, cpf, version, name, address, status = 'active' FROM person.person")
            .fetch_all(&mut *conn)
            .await?;
    let mut persons: BTreeMap<Uuid, Person> = rows
        .into_iter()
        .map(|(id, cpf, version, name, address, active)| {
            (id, Person { cpf, id, version, name, address, active, items: BTreeMap::new() })
        })
        .collect();
    let rows: Vec<(Uuid, Uuid, String, Option<String>, String)> = sqlx::query_as(
        "SELECT id, person_id, 'income', type, value::text FROM person.income
         UNION ALL SELECT id, person_id, 'asset', type, value::text FROM person.asset
         UNION ALL SELECT id, person_id, 'debt', NULL, value::text FROM person.debt",
    )
    .fetch_all(conn)
    .await?;
    for (id, person, kind, type_, value) in rows {
        let (kind, value) = (
            ItemKind::of(&kind).context("an unknown kind of item")?,
            Amount::parse(&value).context("a value that is no amount")?,
        );
        let person = persons.get_mut(&person).context("an item without a person")?;
        person.items.insert(id, Item { kind, type_, value });
    }
    Ok(persons)
}

async fn scores(conn: &mut PgConnection) -> anyhow::Result<BTreeMap<Uuid, ScoreRow>> {
    let rows: Vec<(Uuid, i64, i64, String)> =
        sqlx::query_as("SELECT id, cpf, version, total::text FROM score.person")
            .fetch_all(&mut *conn)
            .await?;
    let mut scores: BTreeMap<Uuid, ScoreRow> = rows
        .into_iter()
        .map(|(id, cpf, version, total)| (id, ScoreRow { cpf, version, total, entries: BTreeMap::new() }))
        .collect();
    let rows: Vec<(Uuid, Uuid, String, String, i64)> =
        sqlx::query_as("SELECT id, person_id, type, value::text, score FROM score.entry")
            .fetch_all(conn)
            .await?;
    for (id, person, kind, value, score) in rows {
        let (kind, value) = (
            ItemKind::of(&kind).context("an unknown kind of item")?,
            Amount::parse(&value).context("a value that is no amount")?,
        );
        let person = scores.get_mut(&person).context("an entry without a person")?;
        person.entries.insert(id, (kind, value, score));
    }
    Ok(scores)
}

async fn applied(conn: &mut PgConnection) -> anyhow::Result<Vec<InboxRow>> {
    type Row = (String, i64, bool, String, String, i64, Option<Uuid>);
    let rows: Vec<Row> = sqlx::query_as(
        "SELECT split_part(source, '~', 1), inbox.incarnation(source), ended, aggregate_type, aggregate_id, version, last_event_id
         FROM inbox.aggregate WHERE consumer = 'score'",
    )
    .fetch_all(conn)
    .await?;
    let applied = rows.into_iter().map(
        |(source, incarnation, ended, aggregate_type, aggregate_id, version, last_event)| InboxRow {
            source,
            incarnation,
            ended,
            key: (aggregate_type, aggregate_id),
            version,
            last_event,
        },
    );
    Ok(applied.collect())
}
