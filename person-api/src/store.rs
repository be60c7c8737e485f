//! All of the SQL. Each write is one statement, so it is one transaction in one round trip: the rows,
//! the aggregate's next version and the outbox event are committed together or not at all.

use std::{future::Future, time::Duration};

use events::{Cpf, Kind};
use sqlx::{PgPool, Postgres, pool::PoolConnection};
use uuid::Uuid;

use crate::request::{NewItem, NewPerson};

/// How many items of each kind an answer holds at most. The rest: paging, which is a later issue.
pub const ITEMS_MAX: i32 = 1000;

/// How long a statement may take, on the wire and back. The server ends one earlier, by its
/// `statement_timeout`; this is for a server that says nothing any more.
const TIMEOUT: Duration = Duration::from_secs(8);

/// A new person is version 1 of its aggregate. An existing cpf is no error of the database, whose log
/// and message would name it: there is just no row.
const ADD_PERSON: &str = "
WITH person AS (
    INSERT INTO person.person (id, cpf, name, address, date_of_birth)
    VALUES (outbox.uuid7(), $1, $2, $3, $4)
    ON CONFLICT (cpf) DO NOTHING
    RETURNING *
), event AS (
    INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    SELECT 'person', id::text, version, 'person.new',
           (SELECT row_to_json(body)
            FROM (SELECT id, cpf, name, address, date_of_birth, created_at) body)
    FROM person
    RETURNING position
)
SELECT id, id AS person_id, version, 1 / (SELECT count(*) FROM event) AS events FROM person";

/// The single-statement write of an item. Its order is the promise: the person's row is locked, then its
/// version raised, then the event's position taken; so versions and positions rise together.
///
/// `MATERIALIZED` keeps the lock a step of its own: a second writer waits there, and goes on from the
/// version that the first one left. The ids come from the database, under the lock, so that they follow
/// the versions to the millisecond.
///
/// The division is the guard that no write is stored without its event: when something in the database
/// swallows the event, such as a trigger, it fails, and with it the whole statement.
macro_rules! add_item {
    ($table:literal, $type:literal, $type_value:literal) => {
        concat!(
            "
WITH target AS MATERIALIZED (
    SELECT id FROM person.person WHERE cpf = $1 FOR UPDATE
), person AS (
    UPDATE person.person SET version = person.version + 1
    FROM target WHERE person.id = target.id
    RETURNING person.*
), item AS (
    INSERT INTO person.",
            $table,
            " (id, person_id, ",
            $type,
            "value)
    SELECT outbox.uuid7(), person.id, ",
            $type_value,
            "$2 FROM person
    RETURNING *
), event AS (
    INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    SELECT 'person', person.id::text, person.version, '",
            $table,
            ".new',
           (SELECT row_to_json(body)
            FROM (SELECT item.id, item.person_id, ",
            $type,
            "trim_scale(item.value) AS value, item.created_at,
                         (SELECT row_to_json(body)
                          FROM (SELECT person.id, person.cpf, person.name, person.address,
                                       person.date_of_birth, person.created_at) body) AS person) body)
    FROM person, item
    RETURNING position
)
SELECT item.id, item.person_id, person.version, 1 / (SELECT count(*) FROM event) AS events FROM person, item"
        )
    };
}
const ADD_INCOME: &str = add_item!("income", "type, ", "$3, ");
const ADD_ASSET: &str = add_item!("asset", "type, ", "$3, ");
const ADD_DEBT: &str = add_item!("debt", "", "");

/// A person with their items as one snapshot, as JSON in the shape of a baseline. One item more than the
/// limit is read, to know whether there are more; `OFFSET 0` keeps PostgreSQL from reading them again for
/// each use.
const PERSON: &str = "
SELECT person.id, person.version,
       (SELECT row_to_json(body)::text
        FROM (SELECT person.id, person.cpf, person.name, person.address, person.date_of_birth,
                     person.created_at, person.version,
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

/// What a write left behind.
#[derive(Clone, Copy, Debug, sqlx::FromRow)]
pub struct Written {
    /// The new record's id.
    pub id: Uuid,
    /// The id of the person that it is or belongs to.
    pub person_id: Uuid,
    /// The person's version that contains it.
    pub version: i64,
}

/// A person with their items.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct Found {
    /// The person's id.
    pub id: Uuid,
    /// The person's version that this is.
    pub version: i64,
    /// Person and items as compact JSON.
    pub body: String,
}

/// Why there is no answer. Never shows what was sent or stored, which is personal data.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database does not answer, or gave the statement up; nothing was stored.
    #[error("the database is not available: {0}")]
    Unavailable(String),
    /// The connection was lost during a statement: a write may or may not have been stored.
    #[error("the database stopped answering: {0}")]
    Unknown(String),
    /// A defect of ours, or of the schema.
    #[error("the statement failed: {0}")]
    Failed(String),
}

/// The database, as the API sees it.
#[derive(Clone, Debug)]
pub struct Store {
    pool: PgPool,
}

impl Store {
    /// The pool's connections limit their statements themselves (`statement_timeout`).
    pub fn new(pool: PgPool) -> Self {
        Self { pool }
    }

    /// Stores a person; `None` when the cpf exists.
    pub async fn add_person(&self, new: NewPerson) -> Result<Option<Written>, StoreError> {
        let mut conn = self.acquire().await?;
        let insert = sqlx::query_as(ADD_PERSON)
            .bind(new.cpf.get())
            .bind(new.name)
            .bind(new.address)
            .bind(new.date_of_birth);
        bounded(insert.fetch_optional(&mut *conn)).await
    }

    /// Stores an item of a person; `None` when there is no such person.
    pub async fn add_item(&self, cpf: Cpf, new: NewItem) -> Result<Option<Written>, StoreError> {
        let mut conn = self.acquire().await?;
        let sql = match new.kind {
            Kind::Income => ADD_INCOME,
            Kind::Asset => ADD_ASSET,
            Kind::Debt => ADD_DEBT,
        };
        let mut insert = sqlx::query_as(sql).bind(cpf.get()).bind(new.value);
        if let Some(type_) = new.type_ {
            insert = insert.bind(type_);
        }
        bounded(insert.fetch_optional(&mut *conn)).await
    }

    /// Reads a person with their items; `None` when there is no such person.
    pub async fn person(&self, cpf: Cpf) -> Result<Option<Found>, StoreError> {
        let mut conn = self.acquire().await?;
        let select = sqlx::query_as(PERSON).bind(cpf.get()).bind(ITEMS_MAX);
        bounded(select.fetch_optional(&mut *conn)).await.map_err(|error| match error {
            // Of a read there is no outcome to be unsure of.
            StoreError::Unknown(why) => StoreError::Unavailable(why),
            other => other,
        })
    }

    /// Whatever goes wrong here, no statement was sent yet.
    async fn acquire(&self) -> Result<PoolConnection<Postgres>, StoreError> {
        self.pool.acquire().await.map_err(|error| StoreError::Unavailable(describe(&error)))
    }
}

/// Waits for a statement, but not for ever, and tells the ways apart in which it can fail.
async fn bounded<T>(statement: impl Future<Output = sqlx::Result<T>>) -> Result<T, StoreError> {
    let error = match tokio::time::timeout(TIMEOUT, statement).await {
        Ok(Ok(answer)) => return Ok(answer),
        Ok(Err(error)) => error,
        Err(_) => return Err(StoreError::Unknown("no answer in time".to_owned())),
    };
    let described = describe(&error);
    Err(match &error {
        sqlx::Error::Database(database) => match database.code().as_deref().unwrap_or_default() {
            // The server says that it rolled the statement back, and that another try may do better:
            // connection, transaction (deadlock), resources, lock timeout, operator; a standby.
            code if ["08", "40", "53", "57"].contains(&code.get(..2).unwrap_or_default())
                || ["55P03", "25006"].contains(&code) =>
            {
                StoreError::Unavailable(described)
            }
            _ => StoreError::Failed(described),
        },
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::WorkerCrashed => {
            StoreError::Unknown(described)
        }
        _ => StoreError::Failed(described),
    })
}

/// What happened, for logs and for the readiness. PostgreSQL's messages may quote a row, and decoding
/// errors a value, so only codes and names are taken from them.
pub fn describe(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(database) => {
            let code = database.code().unwrap_or_default();
            match database.constraint() {
                Some(constraint) => format!("SQLSTATE {code}, constraint {constraint}"),
                None => format!("SQLSTATE {code}"),
            }
        }
        sqlx::Error::Io(error) => error.to_string(),
        sqlx::Error::Tls(error) => format!("TLS: {error}"),
        sqlx::Error::PoolTimedOut => "no connection in time".to_owned(),
        sqlx::Error::PoolClosed => "the pool is closed".to_owned(),
        sqlx::Error::Protocol(_) => "it does not speak the protocol".to_owned(),
        _ => "its answer was not understood".to_owned(),
    }
}

#[cfg(test)]
mod plan;
