//! Deleting a person, and erasing what was stored of them.
//!
//! What readers see goes at once. A person with very much is emptied first, and the rest removed step by step
//! ([`clean`]); of a long history of events the outbox does the same.

use std::time::Duration;

use daemon::{backoff, health::Part};
use events::Cpf;
use outbox::Ended;
use sqlx::{Connection, PgConnection, PgPool};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    Refused, States, Store, StoreError, Written, bounded, describe, idempotency::spent, state_matches,
};

/// A person with so many items and kept answers is emptied first.
const MANY: i64 = 1_000;
/// A step removes so many rows of each kind at most, of each of so many persons.
const STEP: i64 = 1_000;
const SIDE_BY_SIDE: i64 = 16;
/// How often persons are looked for of whom something is left; the first time soon.
const INTERVAL: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_secs(1);
/// After failures, up to so long.
const LONGEST: Duration = Duration::from_mins(1);

/// Everything that is written about a person waits for this lock.
pub(super) const LOCK: &str = concat!(
    "SELECT target.id, target.version, ",
    state_matches!("$2", "$3"),
    " AS matches
FROM person.person target WHERE cpf = $1 FOR UPDATE"
);

/// The person; and the event, which is the last of the aggregate. With them go their items, by the foreign keys, and of
/// their kept answers all but that the keys were used. Where that is `$2` rows or more, the person is emptied instead.
/// The division is the same guard as of every write.
pub(super) const DELETE: &str = concat!(
    "
WITH size AS MATERIALIZED (
    SELECT count(*) >= $2 AS many FROM (
        (SELECT FROM person.income WHERE person_id = $1 LIMIT $2) UNION ALL
        (SELECT FROM person.asset WHERE person_id = $1 LIMIT $2) UNION ALL
        (SELECT FROM person.debt WHERE person_id = $1 LIMIT $2) UNION ALL
        (SELECT FROM person.idempotency WHERE person_id = $1 LIMIT $2)) counted
), spent AS (
    UPDATE person.idempotency SET ",
    spent!(),
    "
    WHERE person_id = $1 AND NOT (SELECT many FROM size)
), gone AS (
    DELETE FROM person.person WHERE id = $1 AND NOT (SELECT many FROM size) RETURNING id, version + 1 AS version
), emptied AS (
    UPDATE person.person
    SET cpf = NULL, name = '', address = NULL, date_of_birth = 'epoch', version = version + 1
    WHERE id = $1 AND (SELECT many FROM size) RETURNING id, version
), person AS (
    SELECT id, version FROM gone UNION ALL SELECT id, version FROM emptied
), event AS (
    INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    SELECT 'person', id::text, version, 'person.deleted', (SELECT row_to_json(body) FROM (SELECT id) body)
    FROM person
    RETURNING position
)
SELECT version, 1 / (SELECT count(*) FROM event) AS whole FROM person"
);

/// Whether something is left of anybody.
const LEFT: &str = "SELECT EXISTS (SELECT FROM person.person WHERE cpf IS NULL)";

/// Persons of whom something is left. Whoever is at one of them has it.
pub(super) const EMPTIED: &str = "
SELECT id FROM person.person WHERE cpf IS NULL ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED";

/// Some of what is left of a person, and how much that was.
pub(super) const REMOVE: &str = concat!(
    "
WITH income AS (
    DELETE FROM person.income
    WHERE ctid = ANY (ARRAY(SELECT ctid FROM person.income WHERE person_id = $1 LIMIT $2)) RETURNING 1
), asset AS (
    DELETE FROM person.asset
    WHERE ctid = ANY (ARRAY(SELECT ctid FROM person.asset WHERE person_id = $1 LIMIT $2)) RETURNING 1
), debt AS (
    DELETE FROM person.debt
    WHERE ctid = ANY (ARRAY(SELECT ctid FROM person.debt WHERE person_id = $1 LIMIT $2)) RETURNING 1
), kept AS (
    UPDATE person.idempotency SET ",
    spent!(),
    "
    WHERE ctid = ANY (ARRAY(SELECT ctid FROM person.idempotency WHERE person_id = $1 LIMIT $2 FOR UPDATE)) RETURNING 1
)
SELECT (SELECT count(*) FROM income) + (SELECT count(*) FROM asset) + (SELECT count(*) FROM debt)
       + (SELECT count(*) FROM kept)"
);

impl Store {
    /// Deletes a person and erases what the database has of them: items, kept answers, and the content of
    /// everything that was ever put into the outbox, published or not.
    ///
    /// Not in one statement: it sees what was committed when it began, so it must begin under the lock. With
    /// the lock inside it, it would leave what a writer, for whom it waited, has just stored (tried).
    pub async fn delete_person(
        &self,
        cpf: Cpf,
        states: States,
    ) -> Result<Result<Written, Refused>, StoreError> {
        let mut conn = self.acquire_for(cpf).await?;
        bounded(delete(&mut conn, cpf, &states)).await
    }
}

async fn delete(
    conn: &mut PgConnection,
    cpf: Cpf,
    states: &States,
) -> sqlx::Result<Result<Written, Refused>> {
    let mut tx = conn.begin().await?;
    let (ids, versions) = states.columns();
    let locked: Option<(Uuid, i64, bool)> =
        sqlx::query_as(LOCK).bind(cpf.get()).bind(ids).bind(versions).fetch_optional(&mut *tx).await?;
    let id = match locked {
        None => return Ok(Err(Refused::UnknownPerson)),
        Some((_, _, false)) => return Ok(Err(Refused::OtherState)),
        Some((id, _, true)) => id,
    };
    let (version, _): (i64, i64) = sqlx::query_as(DELETE).bind(id).bind(MANY).fetch_one(&mut *tx).await?;
    let ended = Ended { aggregate_type: events::AGGREGATE_PERSON, aggregate_id: id.to_string(), version };
    outbox::erase(&mut tx, &[ended]).await?;
    tx.commit().await?;
    Ok(Ok(Written { id, person_id: id, version }))
}

/// Removes what is left of persons who were emptied, until `stop`. What goes wrong is shown, and tried again.
pub async fn clean(pool: PgPool, health: Part, stop: CancellationToken) {
    let (mut pause, mut rows, mut pauses) = (SOON, STEP, backoff(INTERVAL, LONGEST));
    while stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_some() {
        // A database that does not answer must not keep the process from ending; it rolls back what it was at.
        let Some(removed) = stop.run_until_cancelled(remove(&pool, rows)).await else { return };
        match removed {
            Ok(0) => {
                health.ready();
                (pause, rows, pauses) = (INTERVAL, STEP, backoff(INTERVAL, LONGEST));
            }
            // There may be more; others get the disk in between.
            Ok(_) => pause = Duration::from_millis(20),
            Err(error) => {
                health.attention(format!(
                    "What is left of deleted persons with very many items cannot be removed: {}. Nobody can read it. It \
                     is tried again, in smaller steps.",
                    describe(&error)
                ));
                pause = pauses.next().unwrap_or(LONGEST);
                rows = (rows / 4).max(1);
            }
        }
    }
}

/// One step of each of some persons, so that one with little is not behind one with much. Returns how many rows it
/// were; the last step of a person is their own row.
pub async fn remove(pool: &PgPool, step: i64) -> sqlx::Result<u64> {
    if !sqlx::query_scalar::<_, bool>(LEFT).fetch_one(pool).await? {
        return Ok(0);
    }
    let mut tx = pool.begin().await?;
    let emptied: Vec<Uuid> = sqlx::query_scalar(EMPTIED).bind(SIDE_BY_SIDE).fetch_all(&mut *tx).await?;
    let mut removed = 0;
    for person in emptied {
        let rows: i64 = sqlx::query_scalar(REMOVE).bind(person).bind(step).fetch_one(&mut *tx).await?;
        if rows == 0 {
            let delete = sqlx::query("DELETE FROM person.person WHERE id = $1 AND cpf IS NULL").bind(person);
            removed += delete.execute(&mut *tx).await?.rows_affected();
        } else {
            removed += rows.unsigned_abs();
        }
    }
    tx.commit().await?;
    Ok(removed)
}
