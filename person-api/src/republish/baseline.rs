//! The SQL of `republish`: baselines, and the progress.

use events::Cpf;
use sqlx::{PgConnection, Postgres, Transaction};
use uuid::Uuid;

/// Locks the next persons, in the order of their ids, by the primary key. This statement waits for a person while it
/// holds those before; the API's writes hold one person each and wait for no other. So there is no deadlock. A person
/// without a cpf is deleted, and their items are being removed.
pub(crate) const LOCK: &str = "
SELECT id FROM person.person WHERE id > $1 AND id <= $2 AND cpf IS NOT NULL ORDER BY id LIMIT $3 FOR UPDATE";

/// The next persons, unlocked: those that [`READ_AHEAD`] reads.
pub(crate) const NEXT: &str = "
SELECT id FROM person.person WHERE id > $1 AND id <= $2 AND cpf IS NOT NULL ORDER BY id LIMIT $3";

/// Brings the items of the persons `$1` into the server's memory, before anything is locked. A column that no index has
/// makes it read the rows; all persons at once make it ask the disk for many of them at a time.
pub(crate) const READ_AHEAD: &str = "
SELECT (SELECT count(type) FROM person.income WHERE person_id = ANY ($1))
     + (SELECT count(type) FROM person.asset WHERE person_id = ANY ($1))
     + (SELECT count(value) FROM person.debt WHERE person_id = ANY ($1))";

pub(crate) const WRITE: &str = include_str!("baseline.sql");

/// An item takes at least 90 bytes, so this number of items of a kind exceeds the largest event.
const ITEMS_MAX: i32 = 200_000;

/// The result of a batch.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// The last person of the batch; none when no person was left.
    pub(super) last: Option<Uuid>,
    /// How many have a new baseline.
    pub(super) persons: i64,
    /// The persons who do not fit an event.
    pub(super) too_large: Vec<Uuid>,
}

/// Locks the next persons above `after` and up to `to`, at most `limit`.
pub(super) async fn lock(
    tx: &mut Transaction<'_, Postgres>,
    (after, to): (Uuid, Uuid),
    limit: i64,
) -> sqlx::Result<Vec<Uuid>> {
    sqlx::query_scalar(LOCK).bind(after).bind(to).bind(limit).fetch_all(&mut **tx).await
}

/// Reads what the next batch needs into the server's memory, so that its locks do not wait for the disk.
pub(super) async fn read_ahead(
    conn: &mut PgConnection,
    (after, to): (Uuid, Uuid),
    limit: i64,
) -> sqlx::Result<()> {
    let next: Vec<Uuid> =
        sqlx::query_scalar(NEXT).bind(after).bind(to).bind(limit).fetch_all(&mut *conn).await?;
    sqlx::query(READ_AHEAD).bind(next).execute(conn).await?;
    Ok(())
}

/// Locks one person, by id or cpf, unless there is none.
pub(super) async fn lock_one(
    tx: &mut Transaction<'_, Postgres>,
    id: Option<Uuid>,
    cpf: Option<Cpf>,
) -> sqlx::Result<Option<Uuid>> {
    let lock = match id {
        Some(id) => {
            sqlx::query_scalar("SELECT id FROM person.person WHERE id = $1 AND cpf IS NOT NULL FOR UPDATE")
                .bind(id)
        }
        None => sqlx::query_scalar("SELECT id FROM person.person WHERE cpf = $1 FOR UPDATE")
            .bind(cpf.map(Cpf::get)),
    };
    lock.fetch_optional(&mut **tx).await
}

/// Appends the baselines of persons who are locked in this transaction.
pub(super) async fn append(tx: &mut Transaction<'_, Postgres>, ids: &[Uuid]) -> sqlx::Result<Batch> {
    if ids.is_empty() {
        return Ok(Batch::default());
    }
    let max = i32::try_from(outbox::MAX_PAYLOAD).unwrap_or(i32::MAX);
    let (too_large, persons, _): (Vec<Uuid>, i64, i32) =
        sqlx::query_as(WRITE).bind(ids).bind(max).bind(ITEMS_MAX).fetch_one(&mut **tx).await?;
    Ok(Batch { last: ids.last().copied(), persons, too_large })
}

/// How far a `republish --all` is.
#[derive(Clone, Debug, sqlx::FromRow)]
pub(super) struct Progress {
    pub(super) source: String,
    pub(super) after_id: Uuid,
    pub(super) to_id: Uuid,
    pub(super) total: i64,
    pub(super) persons: i64,
    pub(super) too_large: i64,
    pub(super) started_by: String,
    pub(super) finished: bool,
}

const PROGRESS: &str = "
SELECT source, after_id, to_id, total, persons, too_large, started_by, finished_at IS NOT NULL AS finished
FROM person.republish";

/// Counts the persons once. Without any, the range is empty.
const BEGIN: &str = "
INSERT INTO person.republish (source, after_id, to_id, total, started_by)
SELECT $1, $2, coalesce((SELECT id FROM person.person ORDER BY id DESC LIMIT 1), $2),
       (SELECT count(cpf) FROM person.person), $3
ON CONFLICT (singleton) DO UPDATE
SET source = excluded.source, after_id = excluded.after_id, to_id = excluded.to_id, total = excluded.total,
    persons = 0, too_large = 0, started_at = now(), started_by = excluded.started_by, finished_at = NULL
RETURNING source, after_id, to_id, total, persons, too_large, started_by, false AS finished";

/// The progress of the last `republish --all`, if there was one.
pub(super) async fn progress(conn: &mut PgConnection) -> sqlx::Result<Option<Progress>> {
    sqlx::query_as(PROGRESS).fetch_optional(conn).await
}

/// Begins with the first person.
pub(super) async fn begin(conn: &mut PgConnection, source: &str, by: &str) -> sqlx::Result<Progress> {
    sqlx::query_as(BEGIN).bind(source).bind(Uuid::nil()).bind(by).fetch_one(conn).await
}

/// Stores that all persons up to `batch.last` are published; or, without one, that all are.
pub(super) async fn store(tx: &mut Transaction<'_, Postgres>, batch: &Batch) -> sqlx::Result<()> {
    let store = sqlx::query(
        "UPDATE person.republish
         SET after_id = coalesce($1, after_id), persons = persons + $2, too_large = too_large + $3,
             finished_at = CASE WHEN $1 IS NULL THEN now() END",
    );
    let too_large = i64::try_from(batch.too_large.len()).unwrap_or(i64::MAX);
    store.bind(batch.last).bind(batch.persons).bind(too_large).execute(&mut **tx).await?;
    Ok(())
}

/// How many persons there are above `after`, and up to `to` if there is an end.
pub(super) async fn count(conn: &mut PgConnection, after: Uuid, to: Option<Uuid>) -> sqlx::Result<i64> {
    sqlx::query_scalar(
        "SELECT count(cpf) FROM person.person WHERE id > $1 AND ($2::uuid IS NULL OR id <= $2)",
    )
    .bind(after)
    .bind(to)
    .fetch_one(conn)
    .await
}
