//! Incomes, assets and debts: the same statements for each of the three tables.

use events::Cpf;
use uuid::Uuid;

use super::{
    Change, Found, Refused, States, Store, StoreError, Written, bounded,
    idempotency::{Added, Keyed},
};
use crate::request::{Item, Page};

/// The statements of one kind.
#[derive(Debug)]
pub(crate) struct ItemSql {
    pub(super) add: &'static str,
    pub(super) change: &'static str,
    pub(super) delete: &'static str,
    pub(super) list: &'static str,
    pub(super) read: &'static str,
}

/// An event of an item that the statement has as `item`.
macro_rules! event {
    ($table:literal, $type:literal, $event:literal) => {
        concat!(
            "event AS (
    INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    SELECT 'person', person.id::text, person.version, '",
            $table,
            ".",
            $event,
            "',
           (SELECT row_to_json(body)
            FROM (SELECT item.id, item.person_id, ",
            $type,
            "trim_scale(item.value) AS value, item.created_at, ",
            super::person_body!(),
            " AS person) body)
    FROM person, item
    RETURNING position
)"
        )
    };
}

/// The person, locked, and then the item. What is read of the item is read under the lock, too: else a
/// comparison would be with what was there before a writer for whom the lock waited.
macro_rules! target {
    ($table:literal) => {
        concat!(
            "
WITH target AS MATERIALIZED (
    SELECT * FROM person.person WHERE cpf = $1 FOR UPDATE
), stored AS MATERIALIZED (
    SELECT * FROM person.",
            $table,
            " WHERE id = $2 AND person_id = (SELECT id FROM target) FOR UPDATE
)"
        )
    };
}

/// What became of a change, told apart. The division is the guard that no write is stored without its event:
/// when something in the database swallows the event, such as a trigger, it fails, and with it the statement.
macro_rules! outcome {
    () => {
        concat!(
            "
SELECT target.id, target.version, stored.id AS item, ",
            super::state_matches!("$3", "$4"),
            " AS matches, person.version AS changed,
       1 / ((SELECT count(*) FROM event) = (SELECT count(*) FROM person))::int AS whole
FROM target LEFT JOIN stored ON true LEFT JOIN person ON true"
        )
    };
}

macro_rules! item_sql {
    ($table:literal, $type:literal, $add_type:literal, $change_type:literal, $differs:literal) => {
        ItemSql {
            // The single-statement write of an item. Its order is the promise: the person's row is locked, then
            // its version raised, then the event's position taken; so versions and positions rise together.
            //
            // `MATERIALIZED` keeps the lock a step of its own: a second writer waits there, and goes on from the
            // version that the first one left. The ids come from the database, under the lock, so that they follow
            // the versions to the millisecond. A key that somebody else took meanwhile leaves no claim, and then
            // nothing is written.
            add: concat!(
                "
WITH target AS MATERIALIZED (
    SELECT id, version, status FROM person.person WHERE cpf = $1 FOR UPDATE
), next AS MATERIALIZED (
    SELECT id AS person_id, version + 1 AS version, outbox.uuid7() AS id FROM target
    WHERE status = 'active' AND ",
                super::state_matches!("$9", "$10"),
                "
), claim AS (
    INSERT INTO person.idempotency (caller, route, key, request, person_id, location, etag, body)
    SELECT $3, $4, $5, $6, person_id, replace($7, '{id}', id::text), '\"' || person_id || '.' || version || '\"',
           replace(replace($8, '{id}', id::text), '{version}', version::text)
    FROM next WHERE $5 IS NOT NULL
    ON CONFLICT DO NOTHING
    RETURNING person_id
), person AS (
    UPDATE person.person SET version = next.version
    FROM next WHERE person.id = next.person_id AND ($5 IS NULL OR EXISTS (SELECT FROM claim))
    RETURNING person.*
), item AS (
    INSERT INTO person.",
                $table,
                " (id, person_id, ",
                $type,
                "value)
    SELECT next.id, person.id, ",
                $add_type,
                "$2 FROM person, next
    RETURNING *
), ",
                event!($table, $type, "new"),
                "
SELECT target.status = 'active' AS active, ",
                super::state_matches!("$9", "$10"),
                " AS matches, item.id, target.id AS person_id, person.version,
       1 / ((SELECT count(*) FROM event) = (SELECT count(*) FROM person))::int AS whole
FROM target LEFT JOIN person ON true LEFT JOIN item ON true"
            ),
            change: concat!(
                target!($table),
                ", person AS (
    UPDATE person.person SET version = target.version + 1
    FROM target, stored
    WHERE person.id = target.id AND ",
                super::state_matches!("$3", "$4"),
                " AND ",
                $differs,
                "
    RETURNING person.*
), item AS (
    UPDATE person.",
                $table,
                " SET ",
                $change_type,
                "value = $5
    FROM person WHERE ",
                $table,
                ".id = $2 AND ",
                $table,
                ".person_id = person.id
    RETURNING ",
                $table,
                ".*
), ",
                event!($table, $type, "changed"),
                outcome!()
            ),
            delete: concat!(
                target!($table),
                ", person AS (
    UPDATE person.person SET version = target.version + 1
    FROM target, stored
    WHERE person.id = target.id AND ",
                super::state_matches!("$3", "$4"),
                "
    RETURNING person.*
), item AS (
    DELETE FROM person.",
                $table,
                " USING person WHERE ",
                $table,
                ".id = $2 AND ",
                $table,
                ".person_id = person.id
    RETURNING ",
                $table,
                ".*
), ",
                event!($table, $type, "deleted"),
                outcome!()
            ),
            // A page, by the index that has them in their order. One more is read, to know whether there are more.
            list: concat!(
                "
SELECT person.id, person.version, cardinality(page.items) > $3 AS more, page.items[$3] ->> 'id' AS last,
       to_json(page.items[:$3])::text AS body
FROM person.person,
     LATERAL (SELECT ARRAY(
         SELECT row_to_json(item)
         FROM (SELECT id, ",
                $type,
                "trim_scale(value) AS value, created_at
               FROM person.",
                $table,
                " WHERE person_id = person.id AND id > $2 ORDER BY id LIMIT $3 + 1) item) AS items OFFSET 0) page
WHERE person.cpf = $1"
            ),
            read: concat!(
                "
SELECT person.id, person.version,
       (SELECT row_to_json(body)::text
        FROM (SELECT id, ",
                $type,
                "trim_scale(value) AS value, created_at
              FROM person.",
                $table,
                " WHERE id = $2 AND person_id = person.id) body) AS body
FROM person.person WHERE cpf = $1"
            ),
        }
    };
}

pub(crate) const INCOME: ItemSql = item_sql!(
    "income",
    "type, ",
    "$11, ",
    "type = $6, ",
    "(stored.value, stored.type) IS DISTINCT FROM ($5, $6)"
);
pub(crate) const ASSET: ItemSql = item_sql!(
    "asset",
    "type, ",
    "$11, ",
    "type = $6, ",
    "(stored.value, stored.type) IS DISTINCT FROM ($5, $6)"
);
pub(crate) const DEBT: ItemSql = item_sql!("debt", "", "", "", "stored.value IS DISTINCT FROM $5");

/// A page of items.
#[derive(Clone, Debug, sqlx::FromRow)]
pub(crate) struct Listed {
    /// The person's id.
    pub(crate) id: Uuid,
    /// The person's version that this is.
    pub(crate) version: i64,
    /// Whether there are more behind it.
    pub(crate) more: bool,
    /// The last item's id, when there are more.
    pub(crate) last: Option<String>,
    /// The items as compact JSON.
    pub(crate) body: String,
}

/// Whether the person is active; whether it is a state that was meant; the item, whose, and the version that contains it.
type Inserted = Option<(bool, bool, Option<Uuid>, Uuid, Option<i64>, i32)>;
/// The person and their version; the item; whether it is a state that was meant; the version after.
type Outcome = Option<(Uuid, i64, Option<Uuid>, bool, Option<i64>, i32)>;

impl Store {
    /// Stores an item of a person, or finds the answer that was kept under the key.
    pub(crate) async fn add_item(
        &self,
        sql: &'static ItemSql,
        (cpf, states): (Cpf, States),
        new: Item,
        place: String,
        keyed: Option<Keyed>,
    ) -> Result<Added, StoreError> {
        if let Some(kept) = self.kept(keyed.as_ref()).await? {
            return Ok(kept);
        }
        let mut conn = self.acquire_for(cpf).await?;
        let insert = sqlx::query_as(sql.add).bind(cpf.get()).bind(new.value);
        let (ids, versions) = states.columns();
        let mut insert = Keyed::bind(keyed.as_ref(), insert, place + "/{id}").bind(ids).bind(versions);
        if let Some(type_) = new.type_ {
            insert = insert.bind(type_);
        }
        let row: Inserted = bounded(insert.fetch_optional(&mut *conn)).await?;
        let refused = match row {
            Some((_, _, Some(id), person_id, Some(version), _)) => {
                return Ok(Added::Stored(Written { id, person_id, version }));
            }
            None => Refused::UnknownPerson,
            Some((false, ..)) => Refused::Inactive,
            // Or it is the state that this request itself has left, when it came before.
            Some((_, false, ..)) => Refused::OtherState,
            // Its key was taken meanwhile: the answer is there.
            Some(_) => Refused::KeyReused,
        };
        Keyed::find_or(keyed.as_ref(), &mut conn, Ok(Added::Refused(refused))).await
    }

    /// Replaces an item.
    pub(crate) async fn change_item(
        &self,
        sql: &'static ItemSql,
        (cpf, id): (Cpf, Uuid),
        states: States,
        item: Item,
    ) -> Result<Result<Change, Refused>, StoreError> {
        let mut conn = self.acquire_for(cpf).await?;
        let (ids, versions) = states.columns();
        let mut change =
            sqlx::query_as(sql.change).bind(cpf.get()).bind(id).bind(ids).bind(versions).bind(item.value);
        if let Some(type_) = item.type_ {
            change = change.bind(type_);
        }
        let outcome: Outcome = bounded(change.fetch_optional(&mut *conn)).await?;
        Ok(changed(outcome))
    }

    /// Deletes an item.
    pub(crate) async fn delete_item(
        &self,
        sql: &'static ItemSql,
        (cpf, id): (Cpf, Uuid),
        states: States,
    ) -> Result<Result<Change, Refused>, StoreError> {
        let mut conn = self.acquire_for(cpf).await?;
        let (ids, versions) = states.columns();
        let delete = sqlx::query_as(sql.delete).bind(cpf.get()).bind(id).bind(ids).bind(versions);
        let outcome: Outcome = bounded(delete.fetch_optional(&mut *conn)).await?;
        Ok(changed(outcome))
    }

    /// Reads a page of a person's items; `None` when there is no such person.
    pub(crate) async fn items(
        &self,
        sql: &'static ItemSql,
        cpf: Cpf,
        page: Page,
    ) -> Result<Option<Listed>, StoreError> {
        let mut conn = self.acquire().await?;
        let select =
            sqlx::query_as(sql.list).bind(cpf.get()).bind(page.after.unwrap_or_default()).bind(page.limit);
        bounded(select.fetch_optional(&mut *conn)).await.map_err(StoreError::of_a_read)
    }

    /// Reads an item of a person.
    pub(crate) async fn item(
        &self,
        sql: &'static ItemSql,
        cpf: Cpf,
        id: Uuid,
    ) -> Result<Result<Found, Refused>, StoreError> {
        let mut conn = self.acquire().await?;
        let select = sqlx::query_as(sql.read).bind(cpf.get()).bind(id);
        let row: Option<(Uuid, i64, Option<String>)> =
            bounded(select.fetch_optional(&mut *conn)).await.map_err(StoreError::of_a_read)?;
        Ok(match row {
            None => Err(Refused::UnknownPerson),
            Some((_, _, None)) => Err(Refused::UnknownItem),
            Some((id, version, Some(body))) => Ok(Found { id, version, body }),
        })
    }
}

fn changed(outcome: Outcome) -> Result<Change, Refused> {
    match outcome {
        None => Err(Refused::UnknownPerson),
        Some((_, _, None, _, _, _)) => Err(Refused::UnknownItem),
        Some((_, _, _, false, _, _)) => Err(Refused::OtherState),
        Some((person, version, Some(id), true, changed, _)) => Ok(Change::of(id, person, version, changed)),
    }
}
