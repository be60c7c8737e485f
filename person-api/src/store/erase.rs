//! Deleting a person, and erasing what was stored of them.
//!
//! What readers see goes at once. A person with very much is emptied first, and the rest removed step by step
//! ([`clean`]); of a long history of events the outbox does the same.

use std::time::Duration;

use daemon::{backoff, health::Part, traces};
use events::Cpf;
use outbox::{Ended, database::describe};
use serde_json::Value;
use sqlx::PgConnection;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    connection::{Connections, Store},
    creation::Creation,
    error::{StoreError, bounded},
    outcome::{Refusal, Written},
};
use crate::model::Precondition;

/// A person with so many items and stored responses is emptied first.
const MANY: i64 = 1_000;
/// A step removes at most so many rows of each table, of each of [`SIDE_BY_SIDE`] persons.
const STEP: i64 = 1_000;
const SIDE_BY_SIDE: i64 = 16;
/// How often the program looks for persons whose rows are not all removed; the first time after [`SOON`].
const INTERVAL: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_secs(1);
/// The longest pause after failures.
const LONGEST: Duration = Duration::from_mins(1);

pub(super) const LOCK: &str = include_str!("sql/person/lock.sql");
pub(super) const DELETE: &str = include_str!("sql/person/delete.sql");
pub(super) const REMOVE: &str = include_str!("sql/person/remove.sql");

/// Persons who were emptied. Those that another process is removing are skipped.
pub(super) const EMPTIED: &str = "
SELECT id FROM person.person WHERE cpf IS NULL ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED";

impl Store {
    /// Deletes a person and erases what the database has of them: items, stored responses, and the content of every
    /// event that was ever put into the outbox, published or not.
    ///
    /// Not in one statement: a statement sees what was committed when it began, so the deletion must begin under the
    /// lock. With the lock inside it, it would leave the rows of a writer for whom it waited (tried).
    pub async fn delete_person(
        &self,
        cpf: Cpf,
        precondition: Precondition,
    ) -> Result<Result<Written, Refusal>, StoreError> {
        let mut conn = self.acquire_for(cpf).await?;
        let (connections, conn) = conn.parts();
        let event = Creation::begin("person.deleted");
        let delete = bounded(delete(connections, conn, cpf, &precondition, event.headers()));
        let deleted = event.within(traces::statement("DELETE", "person", delete, StoreError::class)).await;
        event.end(matches!(deleted, Ok(Ok(_))));
        deleted
    }
}

async fn delete(
    connections: &Connections,
    conn: &mut PgConnection,
    cpf: Cpf,
    precondition: &Precondition,
    headers: Option<Value>,
) -> sqlx::Result<Result<Written, Refusal>> {
    let (mut tx, prepare) = (connections.begin(conn).await?, connections.prepare());
    let (ids, versions) = precondition.columns();
    let lock = sqlx::query_as(LOCK).bind(cpf.get()).bind(ids).bind(versions).persistent(prepare);
    let locked: Option<(Uuid, i64, bool)> = lock.fetch_optional(&mut *tx).await?;
    let id = match locked {
        None => return Ok(Err(Refusal::UnknownPerson)),
        Some((_, _, false)) => return Ok(Err(Refusal::OtherState)),
        Some((id, _, true)) => id,
    };
    let delete = sqlx::query_as(DELETE).bind(id).bind(MANY).bind(headers).persistent(prepare);
    let (version, _): (i64, i64) = delete.fetch_one(&mut *tx).await?;
    let ended =
        Ended { aggregate_type: events::AGGREGATE_PERSON.into(), aggregate_id: id.to_string(), version };
    outbox::erase(&mut tx, &[ended]).await?;
    tx.commit().await?;
    Ok(Ok(Written { id, person_id: id, version }))
}

/// Removes the rows of persons who were emptied, until `stop`. A failure is shown as an attention, and tried again.
pub async fn clean(connections: Connections, health: Part, stop: CancellationToken) {
    let (mut pause, mut rows, mut pauses) = (SOON, STEP, backoff(INTERVAL, LONGEST));
    while stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_some() {
        // A database that does not respond must not keep the process from ending; the server rolls the step back.
        let Some(removed) = stop.run_until_cancelled(remove(&connections, rows)).await else { return };
        match removed {
            Ok(0) => {
                health.ready();
                (pause, rows, pauses) = (INTERVAL, STEP, backoff(INTERVAL, LONGEST));
            }
            // There may be more. The pause leaves the disk to other statements.
            Ok(_) => pause = Duration::from_millis(20),
            Err(error) => {
                health.attention(format!(
                    "Rows of deleted persons cannot be removed: {}. No client can read them. The program tries again, in \
                     smaller steps.",
                    describe(&error)
                ));
                pause = pauses.next().unwrap_or(LONGEST);
                rows = (rows / 4).max(1);
            }
        }
    }
}

/// One step of each of some persons, so that a person with few rows does not wait for one with many. Returns how many
/// rows it removed; the last step of a person removes their own row.
pub async fn remove(connections: &Connections, step: i64) -> sqlx::Result<u64> {
    let mut conn = connections.acquire().await?;
    let (mut tx, prepare) = (connections.begin(&mut conn).await?, connections.prepare());
    let emptied = sqlx::query_scalar(EMPTIED).bind(SIDE_BY_SIDE).persistent(prepare);
    let emptied: Vec<Uuid> = emptied.fetch_all(&mut *tx).await?;
    let mut removed = 0;
    for person in emptied {
        let rows = sqlx::query_scalar(REMOVE).bind(person).bind(step).persistent(prepare);
        let rows: i64 = rows.fetch_one(&mut *tx).await?;
        if rows == 0 {
            let delete = sqlx::query("DELETE FROM person.person WHERE id = $1 AND cpf IS NULL").bind(person);
            removed += delete.persistent(prepare).execute(&mut *tx).await?.rows_affected();
        } else {
            removed += rows.unsigned_abs();
        }
    }
    tx.commit().await?;
    Ok(removed)
}
