//! All SQL that reads and writes the tables of a read model, in bulk. The tables have no schema here: the connection's
//! `search_path` selects the model.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use events::{Cpf, ItemKind};
use inbox::HandlerError;
use rust_decimal::Decimal;
use sqlx::{AssertSqlSafe, FromRow, Postgres, Row, Transaction, postgres::PgRow};
use uuid::Uuid;

use crate::batch::{
    entry::Entry,
    needs::Needs,
    refusal::Refusal,
    slice::{Person, Slice},
};

type Tx<'a, 'tx> = &'a mut Transaction<'tx, Postgres>;

impl FromRow<'_, PgRow> for Person {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        let cpf: i64 = row.try_get("cpf")?;
        Ok(Self {
            id: row.try_get("id")?,
            cpf: Cpf::try_from(cpf).map_err(|e| sqlx::Error::Decode(e.into()))?,
            created_at: row.try_get("created_at")?,
            version: row.try_get("version")?,
            total: row.try_get("total")?,
        })
    }
}

impl FromRow<'_, PgRow> for Entry {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        let kind = match row.try_get("type")? {
            "income" => ItemKind::Income,
            "asset" => ItemKind::Asset,
            "debt" => ItemKind::Debt,
            other => return Err(sqlx::Error::Decode(format!("{other:?} is no kind of entry").into())),
        };
        Ok(Self {
            id: row.try_get("id")?,
            kind,
            // As it was published: 1000, not the column's 1000.0000.
            value: row.try_get::<Decimal, _>("value")?.normalize(),
            score: row.try_get("score")?,
            created_at: row.try_get("created_at")?,
        })
    }
}

/// Locks the persons' rows, in the order of their ids.
pub(crate) async fn load_persons(tx: Tx<'_, '_>, needs: &Needs, slice: &mut Slice) -> sqlx::Result<()> {
    let persons: Vec<Person> = sqlx::query_as(
        "SELECT id, cpf, created_at, version, total FROM person WHERE id = ANY ($1) ORDER BY id FOR UPDATE",
    )
    .bind(ids(&needs.persons))
    .fetch_all(&mut **tx)
    .await?;
    for person in persons {
        slice.load_person(person);
    }
    Ok(())
}

/// Reads entries under their persons' locks: in its own statement, whose snapshot is later than the locks.
pub(crate) async fn load_entries(tx: Tx<'_, '_>, needs: &Needs, slice: &mut Slice) -> sqlx::Result<()> {
    if needs.entries.is_empty() && needs.whole.is_empty() {
        return Ok(());
    }
    let rows = sqlx::query(
        "SELECT id, person_id, type, value, score, created_at FROM entry WHERE id = ANY ($1)
         UNION ALL
         SELECT id, person_id, type, value, score, created_at FROM entry WHERE person_id = ANY ($2)",
    )
    .bind(ids(&needs.entries))
    .bind(ids(&needs.whole))
    .fetch_all(&mut **tx)
    .await?;
    for row in rows {
        slice.load_entry(row.try_get("person_id")?, Entry::from_row(&row)?);
    }
    Ok(())
}

/// Writes the changes of the slice. Deletions come first, so that their ids are free.
pub(crate) async fn save(tx: Tx<'_, '_>, slice: &Slice) -> Result<(), HandlerError> {
    delete(tx, "DELETE FROM person WHERE id = ANY ($1)", slice.persons_gone()).await?;
    delete(tx, "DELETE FROM entry WHERE id = ANY ($1)", slice.entries_gone()).await?;
    write(tx, &slice.persons_written(), &slice.entries_written()).await
}

async fn delete(tx: Tx<'_, '_>, sql: &'static str, ids: Vec<Uuid>) -> sqlx::Result<()> {
    if !ids.is_empty() {
        sqlx::query(sql).bind(ids).execute(&mut **tx).await?;
    }
    Ok(())
}

/// Writes new or changed persons and entries, each found by its id. For a joined UPDATE, the planner reads the whole table
/// while it grows and has no statistics yet. An entry keeps its person: when another person has just taken the id, the
/// row is left as it is, and only then fewer rows are written.
async fn write(tx: Tx<'_, '_>, persons: &[&Person], entries: &[(Uuid, &Entry)]) -> Result<(), HandlerError> {
    if persons.is_empty() && entries.is_empty() {
        return Ok(());
    }
    let written = sqlx::query(
        "WITH persons AS (
             INSERT INTO person (id, cpf, created_at, version, total)
             SELECT * FROM unnest($1::uuid[], $2::bigint[], $3::timestamptz[], $4::bigint[], $5::numeric[])
             ON CONFLICT (id) DO UPDATE
             SET cpf = excluded.cpf, version = excluded.version, total = excluded.total, updated_at = now()
         )
         INSERT INTO entry AS e (id, person_id, type, value, score, created_at)
         SELECT * FROM unnest($6::uuid[], $7::uuid[], $8::text[], $9::numeric[], $10::bigint[],
                              $11::timestamptz[])
         ON CONFLICT (id) DO UPDATE
         SET type = excluded.type, value = excluded.value, score = excluded.score,
             created_at = excluded.created_at
         WHERE e.person_id = excluded.person_id",
    )
    .bind(column(persons, |p| p.id))
    .bind(column(persons, |p| p.cpf.get()))
    .bind(column(persons, |p| p.created_at))
    .bind(column(persons, |p| p.version))
    .bind(column(persons, |p| p.total))
    .bind(column(entries, |(_, e)| e.id))
    .bind(column(entries, |(person, _)| *person))
    .bind(column(entries, |(_, e)| e.kind.as_str()))
    .bind(column(entries, |(_, e)| e.value))
    .bind(column(entries, |(_, e)| e.score))
    .bind(column::<_, DateTime<Utc>>(entries, |(_, e)| e.created_at))
    .execute(&mut **tx)
    .await?
    .rows_affected();
    if written == entries.len() as u64 { Ok(()) } else { Err(Refusal::ItemOfAnother.into()) }
}

fn ids(set: &BTreeSet<Uuid>) -> Vec<Uuid> {
    set.iter().copied().collect()
}

fn column<T, C>(rows: &[T], value: impl Fn(&T) -> C) -> Vec<C> {
    rows.iter().map(value).collect()
}

/// A person and their entries in one of the models.
pub(crate) type Score = (Person, BTreeMap<Uuid, Entry>);

/// Reads the whole scores of persons from the model in `schema`.
pub(crate) async fn scores(
    tx: &mut Transaction<'_, Postgres>,
    schema: &str,
    ids: &[Uuid],
) -> sqlx::Result<BTreeMap<Uuid, Score>> {
    let persons =
        format!("SELECT id, cpf, created_at, version, total FROM {schema}.person WHERE id = ANY ($1)");
    let persons: Vec<Person> = sqlx::query_as(AssertSqlSafe(persons)).bind(ids).fetch_all(&mut **tx).await?;
    let entries = format!(
        "SELECT id, person_id, type, value, score, created_at FROM {schema}.entry WHERE person_id = ANY ($1)"
    );
    let mut scores: BTreeMap<Uuid, Score> =
        persons.into_iter().map(|person| (person.id, (person, BTreeMap::new()))).collect();
    for row in sqlx::query(AssertSqlSafe(entries)).bind(ids).fetch_all(&mut **tx).await? {
        let (person, entry): (Uuid, Entry) = (row.try_get("person_id")?, Entry::from_row(&row)?);
        if let Some((_, entries)) = scores.get_mut(&person) {
            entries.insert(entry.id, entry);
        }
    }
    Ok(scores)
}
