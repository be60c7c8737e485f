//! Deleting a person, and erasing what was stored of them.

use std::time::Duration;

use events::Cpf;
use outbox::Ended;
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use super::{Refused, States, Store, StoreError, Written, bounded_by, state_matches};

/// A long history is erased event by event, and must not be what keeps a person from being erased.
const TIMEOUT: Duration = Duration::from_mins(1);
const STATEMENT_TIMEOUT: &str = "SET LOCAL statement_timeout = '50s'";

/// Everything that is written about a person waits for this lock.
pub(super) const LOCK: &str = concat!(
    "SELECT target.id, target.version, ",
    state_matches!("$2", "$3"),
    " AS matches
FROM person.person target WHERE cpf = $1 FOR UPDATE"
);

/// The person, and with them their items and kept answers, by the foreign keys; and the event, which is the
/// last of the aggregate. The division is the same guard as of every write.
pub(super) const DELETE: &str = "
WITH person AS (
    DELETE FROM person.person WHERE id = $1 RETURNING id, version + 1 AS version
), event AS (
    INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    SELECT 'person', id::text, version, 'person.deleted', (SELECT row_to_json(body) FROM (SELECT id) body)
    FROM person
    RETURNING position
)
SELECT version, 1 / (SELECT count(*) FROM event) AS whole FROM person";

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
        let mut conn = self.acquire().await?;
        bounded_by(TIMEOUT, delete(&mut conn, cpf, &states)).await
    }
}

async fn delete(
    conn: &mut PgConnection,
    cpf: Cpf,
    states: &States,
) -> sqlx::Result<Result<Written, Refused>> {
    let mut tx = conn.begin().await?;
    sqlx::query(STATEMENT_TIMEOUT).execute(&mut *tx).await?;
    let (ids, versions) = states.columns();
    let locked: Option<(Uuid, i64, bool)> =
        sqlx::query_as(LOCK).bind(cpf.get()).bind(ids).bind(versions).fetch_optional(&mut *tx).await?;
    let id = match locked {
        None => return Ok(Err(Refused::UnknownPerson)),
        Some((_, _, false)) => return Ok(Err(Refused::OtherState)),
        Some((id, _, true)) => id,
    };
    let (version, _): (i64, i64) = sqlx::query_as(DELETE).bind(id).fetch_one(&mut *tx).await?;
    let ended = Ended { aggregate_type: events::AGGREGATE_PERSON, aggregate_id: id.to_string(), version };
    outbox::erase(&mut tx, &[ended]).await?;
    tx.commit().await?;
    Ok(Ok(Written { id, person_id: id, version }))
}
