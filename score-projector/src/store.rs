//! All of the read model's SQL.

use chrono::{DateTime, Utc};
use events::{Cpf, Kind};
use rust_decimal::Decimal;
use sqlx::{FromRow, Postgres, Row, Transaction, postgres::PgRow};
use uuid::Uuid;

type Tx<'a, 'tx> = &'a mut Transaction<'tx, Postgres>;

/// A person as the read model has them, under their row's lock.
#[derive(Debug)]
pub(crate) struct Person {
    pub(crate) id: Uuid,
    pub(crate) cpf: Cpf,
    pub(crate) total: Decimal,
    /// The last version of the aggregate `score/<id>` that was appended to the outbox.
    pub(crate) score_version: i64,
}

/// What one item adds to its person's score.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub(crate) id: Uuid,
    pub(crate) kind: Kind,
    pub(crate) value: Decimal,
    pub(crate) score: i64,
    pub(crate) created_at: DateTime<Utc>,
}

impl FromRow<'_, PgRow> for Person {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        let cpf: i64 = row.try_get("cpf")?;
        Ok(Self {
            id: row.try_get("id")?,
            cpf: Cpf::try_from(cpf).map_err(|e| sqlx::Error::Decode(e.into()))?,
            total: row.try_get("total")?,
            score_version: row.try_get("score_version")?,
        })
    }
}

impl FromRow<'_, PgRow> for Entry {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        let kind = match row.try_get("type")? {
            "income" => Kind::Income,
            "asset" => Kind::Asset,
            "debt" => Kind::Debt,
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

/// False when the person is there already.
pub(crate) async fn insert_person(
    tx: Tx<'_, '_>,
    person: &events::Person,
    version: i64,
) -> sqlx::Result<bool> {
    let inserted = sqlx::query(
        "INSERT INTO score.person (id, cpf, created_at, version) VALUES ($1, $2, $3, $4)
         ON CONFLICT (id) DO NOTHING",
    )
    .bind(person.id)
    .bind(person.cpf.get())
    .bind(person.created_at)
    .bind(version)
    .execute(&mut **tx)
    .await?;
    Ok(inserted.rows_affected() == 1)
}

/// Locks the person's row: versions of the score aggregate are taken under this lock.
pub(crate) async fn lock_person(tx: Tx<'_, '_>, id: Uuid) -> sqlx::Result<Option<Person>> {
    sqlx::query_as("SELECT id, cpf, total, score_version FROM score.person WHERE id = $1 FOR UPDATE")
        .bind(id)
        .fetch_optional(&mut **tx)
        .await
}

/// Writes the person as they are now, at the person's own `version`.
pub(crate) async fn update_person(tx: Tx<'_, '_>, person: &Person, version: i64) -> sqlx::Result<()> {
    sqlx::query(
        "UPDATE score.person SET cpf = $2, total = $3, score_version = $4, version = $5, updated_at = now()
         WHERE id = $1",
    )
    .bind(person.id)
    .bind(person.cpf.get())
    .bind(person.total)
    .bind(person.score_version)
    .bind(version)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Raises the version alone, of a person who may be unknown.
pub(crate) async fn update_version(tx: Tx<'_, '_>, id: Uuid, version: i64) -> sqlx::Result<()> {
    sqlx::query("UPDATE score.person SET version = $2, updated_at = now() WHERE id = $1")
        .bind(id)
        .bind(version)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// The entries go with the person.
pub(crate) async fn delete_person(tx: Tx<'_, '_>, id: Uuid) -> sqlx::Result<()> {
    sqlx::query("DELETE FROM score.person WHERE id = $1").bind(id).execute(&mut **tx).await?;
    Ok(())
}

/// All entries of a person, in the order of their ids, which is the order of their items.
pub(crate) async fn entries(tx: Tx<'_, '_>, person: Uuid) -> sqlx::Result<Vec<Entry>> {
    sqlx::query_as(
        "SELECT id, type, value, score, created_at FROM score.entry WHERE person_id = $1 ORDER BY id",
    )
    .bind(person)
    .fetch_all(&mut **tx)
    .await
}

/// One entry of a person, or none.
pub(crate) async fn entry(tx: Tx<'_, '_>, person: Uuid, id: Uuid) -> sqlx::Result<Option<Entry>> {
    sqlx::query_as(
        "SELECT id, type, value, score, created_at FROM score.entry WHERE person_id = $1 AND id = $2",
    )
    .bind(person)
    .bind(id)
    .fetch_optional(&mut **tx)
    .await
}

/// Writes entries, new or changed, in one statement. An entry keeps its person: an id that another one
/// has is refused by the database, which only then returns fewer rows than were written.
pub(crate) async fn put_entries(tx: Tx<'_, '_>, person: Uuid, entries: &[&Entry]) -> sqlx::Result<bool> {
    if entries.is_empty() {
        return Ok(true);
    }
    let ids: Vec<Uuid> = entries.iter().map(|e| e.id).collect();
    let kinds: Vec<&str> = entries.iter().map(|e| e.kind.as_str()).collect();
    let values: Vec<Decimal> = entries.iter().map(|e| e.value).collect();
    let scores: Vec<i64> = entries.iter().map(|e| e.score).collect();
    let created: Vec<DateTime<Utc>> = entries.iter().map(|e| e.created_at).collect();
    let written = sqlx::query(
        "INSERT INTO score.entry AS e (id, person_id, type, value, score, created_at)
         SELECT new.id, $1, new.type, new.value, new.score, new.created_at
         FROM unnest($2::uuid[], $3::text[], $4::numeric[], $5::bigint[], $6::timestamptz[])
              AS new (id, type, value, score, created_at)
         ON CONFLICT (id) DO UPDATE
         SET type = excluded.type, value = excluded.value, score = excluded.score,
             created_at = excluded.created_at
         WHERE e.person_id = excluded.person_id",
    )
    .bind(person)
    .bind(ids)
    .bind(kinds)
    .bind(values)
    .bind(scores)
    .bind(created)
    .execute(&mut **tx)
    .await?;
    Ok(written.rows_affected() == entries.len() as u64)
}

/// Removes entries of a person.
pub(crate) async fn delete_entries(tx: Tx<'_, '_>, person: Uuid, ids: &[Uuid]) -> sqlx::Result<()> {
    if ids.is_empty() {
        return Ok(());
    }
    sqlx::query("DELETE FROM score.entry WHERE person_id = $1 AND id = ANY($2)")
        .bind(person)
        .bind(ids)
        .execute(&mut **tx)
        .await?;
    Ok(())
}
