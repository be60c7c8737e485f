//! Persons.

use chrono::{DateTime, Utc};
use events::{Cpf, Status};
use uuid::Uuid;

use super::{
    Change, Found, ITEMS_MAX, Refused, States, Store, StoreError, Written, bounded,
    idempotency::{Added, Keyed},
    person_body, state_matches,
};
use crate::request::NewPerson;

/// A new person is version 1 of its aggregate. An existing cpf is no error of the database, whose log
/// and message would name it: there is just no row.
///
/// The division is the guard that no write is stored without its event, and none with a key that somebody else
/// took meanwhile (for another cpf, or the cpf would have been there): it fails, and with it the whole statement.
pub(super) const ADD: &str = concat!(
    "
WITH person AS (
    INSERT INTO person.person (id, cpf, name, address, date_of_birth)
    VALUES (outbox.uuid7(), $1, $2, $3, $4)
    ON CONFLICT (cpf) DO NOTHING
    RETURNING *
), claim AS (
    INSERT INTO person.idempotency (caller, route, key, request, person_id, location, etag, body)
    SELECT $5, $6, $7, $8, id, $9, '\"' || id || '.' || version || '\"',
           replace(replace($10, '{id}', id::text), '{version}', version::text)
    FROM person WHERE $7 IS NOT NULL
    ON CONFLICT DO NOTHING
    RETURNING person_id
), event AS (
    INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    SELECT 'person', id::text, version, 'person.new', ",
    person_body!(),
    "
    FROM person
    RETURNING position
)
SELECT id, version,
       1 / ((SELECT count(*) FROM event) = 1 AND ($7 IS NULL OR EXISTS (SELECT FROM claim)))::int AS whole
FROM person"
);

/// The merge patch of a person. Its order is that of every write: the row locked, the version raised, the
/// position taken. What is compared is what is locked, so `unchanged` is true of the version that it names.
pub(super) const CHANGE: &str = concat!(
    "
WITH target AS MATERIALIZED (
    SELECT * FROM person.person WHERE cpf = $1 FOR UPDATE
), wanted AS MATERIALIZED (
    SELECT coalesce($4, name) AS name, CASE WHEN $5 THEN $6 ELSE address END AS address,
           coalesce($7, date_of_birth) AS date_of_birth, coalesce($8, status) AS status
    FROM target WHERE ",
    state_matches!("$2", "$3"),
    "
), person AS (
    UPDATE person.person
    SET name = wanted.name, address = wanted.address, date_of_birth = wanted.date_of_birth,
        status = wanted.status, version = target.version + 1
    FROM target, wanted
    WHERE person.id = target.id
      AND (target.name, target.address, target.date_of_birth, target.status)
          IS DISTINCT FROM (wanted.name, wanted.address, wanted.date_of_birth, wanted.status)
    RETURNING person.*
), event AS (
    INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    SELECT 'person', id::text, version, 'person.changed', ",
    person_body!(),
    "
    FROM person
    RETURNING position
)
SELECT target.id, target.version, EXISTS (SELECT FROM wanted) AS matches, person.version AS changed,
       1 / ((SELECT count(*) FROM event) = (SELECT count(*) FROM person))::int AS whole
FROM target LEFT JOIN person ON true"
);

/// A person with their items as one snapshot, as JSON in the shape of a baseline. One item more than the
/// limit is read, to know whether there are more; `OFFSET 0` keeps PostgreSQL from reading them again for
/// each use.
pub(super) const READ: &str = "
SELECT person.id, person.version,
       (SELECT row_to_json(body)::text
        FROM (SELECT person.id, person.cpf, person.name, person.address, person.date_of_birth,
                     person.created_at, person.status, person.version,
                     incomes.items[:$2] AS incomes, assets.items[:$2] AS assets, debts.items[:$2] AS debts,
                     array_remove(ARRAY[
                         CASE WHEN cardinality(incomes.items) > $2 THEN 'incomes' END,
                         CASE WHEN cardinality(assets.items) > $2 THEN 'assets' END,
                         CASE WHEN cardinality(debts.items) > $2 THEN 'debts' END], NULL) AS truncated
             ) body) AS body
FROM person.person,
     LATERAL (SELECT ARRAY(
         SELECT row_to_json(item)
         FROM (SELECT id, type, trim_scale(value) AS value, created_at
               FROM person.income WHERE person_id = person.id ORDER BY id LIMIT $2 + 1) item) AS items OFFSET 0) incomes,
     LATERAL (SELECT ARRAY(
         SELECT row_to_json(item)
         FROM (SELECT id, type, trim_scale(value) AS value, created_at
               FROM person.asset WHERE person_id = person.id ORDER BY id LIMIT $2 + 1) item) AS items OFFSET 0) assets,
     LATERAL (SELECT ARRAY(
         SELECT row_to_json(item)
         FROM (SELECT id, trim_scale(value) AS value, created_at
               FROM person.debt WHERE person_id = person.id ORDER BY id LIMIT $2 + 1) item) AS items OFFSET 0) debts
WHERE person.cpf = $1";

/// Which state a person is in.
pub(super) const STATE: &str = "SELECT id, version FROM person.person WHERE cpf = $1";

/// What a merge patch changes: what is none stays.
#[derive(Clone, Debug, Default)]
pub struct PersonPatch {
    /// As in [`NewPerson`].
    pub name: Option<String>,
    /// As in [`NewPerson`]; `Some(None)` clears it.
    pub address: Option<Option<String>>,
    /// As in [`NewPerson`].
    pub date_of_birth: Option<DateTime<Utc>>,
    /// Whether new items are taken.
    pub status: Option<Status>,
}

impl Store {
    /// Stores a person, unless the cpf exists; or finds the answer that was kept under the key.
    pub async fn add_person(&self, new: NewPerson, keyed: Option<Keyed>) -> Result<Added, StoreError> {
        if let Some(kept) = self.kept(keyed.as_ref()).await? {
            return Ok(kept);
        }
        let mut conn = self.acquire_for(new.cpf).await?;
        let insert =
            sqlx::query_as(ADD).bind(new.cpf.get()).bind(new.name).bind(new.address).bind(new.date_of_birth);
        let insert = Keyed::bind(keyed.as_ref(), insert, format!("/person/{}", new.cpf.get()));
        let added: Result<Option<(Uuid, i64, i32)>, _> = bounded(insert.fetch_optional(&mut *conn)).await;
        match added {
            Ok(Some((id, version, _))) => Ok(Added::Stored(Written { id, person_id: id, version })),
            Ok(None) => {
                Keyed::find_or(keyed.as_ref(), &mut conn, Ok(Added::Refused(Refused::CpfExists))).await
            }
            // Perhaps somebody took the key meanwhile.
            Err(failed @ StoreError::Failed(_)) => {
                Keyed::find_or(keyed.as_ref(), &mut conn, Err(failed)).await
            }
            Err(error) => Err(error),
        }
    }

    /// Changes a person.
    pub async fn change_person(
        &self,
        cpf: Cpf,
        states: States,
        patch: PersonPatch,
    ) -> Result<Result<Change, Refused>, StoreError> {
        let mut conn = self.acquire_for(cpf).await?;
        let (ids, versions) = states.columns();
        let change = sqlx::query_as(CHANGE)
            .bind(cpf.get())
            .bind(ids)
            .bind(versions)
            .bind(patch.name)
            .bind(patch.address.is_some())
            .bind(patch.address.flatten())
            .bind(patch.date_of_birth)
            .bind(patch.status.map(Status::as_str));
        let row: Option<(Uuid, i64, bool, Option<i64>, i32)> =
            bounded(change.fetch_optional(&mut *conn)).await?;
        Ok(match row {
            None => Err(Refused::UnknownPerson),
            Some((_, _, false, _, _)) => Err(Refused::OtherState),
            Some((id, version, true, changed, _)) => Ok(Change::of(id, id, version, changed)),
        })
    }

    /// The person's id and version; `None` when there is no such person.
    pub async fn state(&self, cpf: Cpf) -> Result<Option<(Uuid, i64)>, StoreError> {
        let mut conn = self.acquire().await?;
        let select = sqlx::query_as(STATE).bind(cpf.get());
        bounded(select.fetch_optional(&mut *conn)).await.map_err(StoreError::of_a_read)
    }

    /// Reads a person with their items; `None` when there is no such person.
    pub async fn person(&self, cpf: Cpf) -> Result<Option<Found>, StoreError> {
        let mut conn = self.acquire().await?;
        let select = sqlx::query_as(READ).bind(cpf.get()).bind(ITEMS_MAX);
        bounded(select.fetch_optional(&mut *conn)).await.map_err(StoreError::of_a_read)
    }
}

impl Change {
    pub(super) fn of(id: Uuid, person_id: Uuid, version: i64, changed: Option<i64>) -> Self {
        match changed {
            Some(version) => Self::Changed(Written { id, person_id, version }),
            None => Self::Unchanged(Written { id, person_id, version }),
        }
    }
}
