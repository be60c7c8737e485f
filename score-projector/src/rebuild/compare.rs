//! Compares the two models and the two consumers page by page, beside everybody who writes to them.
//!
//! Each page is a statement of its own, so no snapshot lasts. What a page finds is remembered in temporary tables: the
//! persons whose rows differ, and the chains that the shadow has not reached. With [`watch`], what changes afterwards is
//! noted, and [`again`](Comparison::again) looks at that alone. So what is remembered becomes exact once nobody writes.

use anyhow::{Context, bail};
use daemon::progress::Progress;
use outbox::database::again;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use uuid::Uuid;

use super::{LOCK_ATTEMPTS, is_lock, limit_locks, pause};

/// Rows of one page.
const PAGE: i64 = 10_000;
/// Changes that one look takes at most, before the lock.
const CHANGES: i64 = 5_000;

/// What to remember, for the rest of the session.
const TABLES: &str = "
CREATE TEMPORARY TABLE IF NOT EXISTS differing (id uuid PRIMARY KEY);
CREATE TEMPORARY TABLE IF NOT EXISTS lagging (
    source text, aggregate_type text, aggregate_id text, PRIMARY KEY (source, aggregate_type, aggregate_id));
CREATE TEMPORARY TABLE IF NOT EXISTS changed_person (id uuid PRIMARY KEY);
CREATE TEMPORARY TABLE IF NOT EXISTS changed_chain (
    source text, aggregate_type text, aggregate_id text, PRIMARY KEY (source, aggregate_type, aggregate_id));
TRUNCATE pg_temp.differing, pg_temp.lagging;
-- Ranges of a key are read by its index: the planner knows little of a table that has just grown.
SET enable_seqscan = off; SET enable_hashjoin = off; SET jit = off";

/// The end of the next page: the first of both tables' rows that has a page of rows before it.
const EDGE: &str = "
SELECT least((SELECT id FROM score.{table} WHERE id > $1 ORDER BY id OFFSET $2 LIMIT 1),
             (SELECT id FROM score_shadow.{table} WHERE id > $1 ORDER BY id OFFSET $2 LIMIT 1))";

/// The persons that differ in their own rows.
const PERSONS: &str = "
WITH compared AS (
    SELECT coalesce(l.id, s.id) AS id,
           (l.id, l.cpf, l.total, l.created_at) IS DISTINCT FROM (s.id, s.cpf, s.total, s.created_at) AS differs
    FROM (SELECT * FROM score.person WHERE id > $1 AND id <= $2) l
         FULL JOIN (SELECT * FROM score_shadow.person WHERE id > $1 AND id <= $2) s ON l.id = s.id),
remembered AS (
    INSERT INTO pg_temp.differing SELECT id FROM compared WHERE differs ON CONFLICT DO NOTHING)
SELECT count(*) FROM compared";

/// The persons that differ in their entries. An entry may be of one person here and of another one there.
const ENTRIES: &str = "
WITH compared AS (
    SELECT l.person_id AS live, s.person_id AS shadow,
           (l.id, l.person_id, l.type, l.value, l.score, l.created_at)
               IS DISTINCT FROM (s.id, s.person_id, s.type, s.value, s.score, s.created_at) AS differs
    FROM (SELECT * FROM score.entry WHERE id > $1 AND id <= $2) l
         FULL JOIN (SELECT * FROM score_shadow.entry WHERE id > $1 AND id <= $2) s ON l.id = s.id),
remembered AS (
    INSERT INTO pg_temp.differing
    SELECT DISTINCT person FROM compared, unnest(ARRAY[live, shadow]) AS p (person) WHERE differs AND person IS NOT NULL
    ON CONFLICT DO NOTHING)
SELECT count(*) FROM compared";

/// The chains of the live consumer that the shadow has not reached. Returns the last one of the page.
const CHAINS: &str = "
WITH page AS MATERIALIZED (
    SELECT source, aggregate_type, aggregate_id, version FROM inbox.aggregate
    WHERE consumer = $1 AND (source, aggregate_type, aggregate_id) > ($3, $4, $5)
    ORDER BY source, aggregate_type, aggregate_id LIMIT $6),
remembered AS (
    INSERT INTO pg_temp.lagging
    SELECT p.source, p.aggregate_type, p.aggregate_id
    FROM page p
         LEFT JOIN LATERAL (SELECT version FROM inbox.aggregate
                            WHERE (consumer, source, aggregate_type, aggregate_id)
                                = ($2, p.source, p.aggregate_type, p.aggregate_id) OFFSET 0) s ON true
    WHERE p.version > coalesce(s.version, 0)
    ON CONFLICT DO NOTHING)
SELECT source, aggregate_type, aggregate_id, (SELECT count(*) FROM page)
FROM page ORDER BY source DESC, aggregate_type DESC, aggregate_id DESC LIMIT 1";

/// Removes what is noted.
const FORGET: &str = "DELETE FROM score.changed_person; DELETE FROM score.changed_chain";

/// Whether a person differs, by all of its rows.
const DIFFERS: &str = "
(EXISTS (SELECT FROM (SELECT 1) AS one
                LEFT JOIN score.person l ON l.id = c.id LEFT JOIN score_shadow.person s ON s.id = c.id
         WHERE (l.id, l.cpf, l.total, l.created_at) IS DISTINCT FROM (s.id, s.cpf, s.total, s.created_at))
 OR EXISTS ((SELECT id, type, value, score, created_at FROM score.entry WHERE person_id = c.id
             EXCEPT SELECT id, type, value, score, created_at FROM score_shadow.entry WHERE person_id = c.id)
            UNION ALL
            (SELECT id, type, value, score, created_at FROM score_shadow.entry WHERE person_id = c.id
             EXCEPT SELECT id, type, value, score, created_at FROM score.entry WHERE person_id = c.id)))";

/// A comparison of the consumer `live` and its model with those of `shadow`.
pub(super) struct Comparison<'a> {
    pub(super) live: &'a str,
    pub(super) shadow: &'a str,
}

impl Comparison<'_> {
    /// Compares the rows of both models.
    pub(super) async fn models(&self, conn: &mut PgConnection, progress: &Progress) -> anyhow::Result<()> {
        for (table, what, noun, sql) in [
            ("person", "comparing the persons", "person", PERSONS),
            ("entry", "comparing the entries", "row", ENTRIES),
        ] {
            let all =
                rows_of(conn, &["score", "score_shadow"].map(|schema| format!("{schema}.{table}"))).await?;
            progress.step(what, noun);
            let edge = EDGE.replace("{table}", table);
            let (mut last, mut compared) = (Uuid::nil(), 0);
            loop {
                let end: Option<Uuid> = sqlx::query_scalar(AssertSqlSafe(&*edge))
                    .bind(last)
                    .bind(PAGE - 1)
                    .fetch_one(&mut *conn)
                    .await?;
                let rows: i64 = sqlx::query_scalar(sql)
                    .bind(last)
                    .bind(end.unwrap_or(Uuid::max()))
                    .fetch_one(&mut *conn)
                    .await
                    .context("the two models could not be compared")?;
                compared += rows.unsigned_abs();
                progress.at(compared, all.max(compared));
                match end {
                    Some(end) => last = end,
                    None => break,
                }
            }
        }
        Ok(())
    }

    /// Compares how far both consumers are.
    pub(super) async fn chains(&self, conn: &mut PgConnection, progress: &Progress) -> anyhow::Result<()> {
        progress.step("comparing the versions", "aggregate");
        let all = rows_of(conn, &["score.person".to_owned()]).await?;
        let (mut last, mut compared) = ((String::new(), String::new(), String::new()), 0);
        loop {
            let page: Option<(String, String, String, i64)> = sqlx::query_as(CHAINS)
                .bind(self.live)
                .bind(self.shadow)
                .bind(&last.0)
                .bind(&last.1)
                .bind(&last.2)
                .bind(PAGE)
                .fetch_optional(&mut *conn)
                .await
                .context("the inbox could not be compared")?;
            let Some((source, aggregate_type, aggregate_id, rows)) = page else { return Ok(()) };
            compared += rows.unsigned_abs();
            progress.at(compared, all.max(compared));
            last = (source, aggregate_type, aggregate_id);
        }
    }

    /// Looks again at what has changed since, at most `most` changes of each kind. Returns how many there were.
    pub(super) async fn again(&self, conn: &mut PgConnection, most: Option<i64>) -> sqlx::Result<u64> {
        let take = |table: &str, columns: &str| {
            format!(
                "WITH taken AS (
                     DELETE FROM score.{table}
                     WHERE ctid = ANY (ARRAY(SELECT ctid FROM score.{table} LIMIT {most}))
                     RETURNING {columns})
                 INSERT INTO pg_temp.{table} SELECT DISTINCT {columns} FROM taken",
                most = most.map_or("ALL".to_owned(), |most| most.to_string())
            )
        };
        let key = "source, aggregate_type, aggregate_id";
        let (mut tx, mut changes) = (conn.begin().await?, 0);
        sqlx::query("TRUNCATE pg_temp.changed_person, pg_temp.changed_chain").execute(&mut *tx).await?;
        for sql in [take("changed_person", "id"), take("changed_chain", key)] {
            changes += sqlx::query(AssertSqlSafe(sql)).execute(&mut *tx).await?.rows_affected();
        }
        if changes > 0 {
            let differing = format!(
                "INSERT INTO pg_temp.differing SELECT c.id FROM pg_temp.changed_person c WHERE {DIFFERS}"
            );
            sqlx::raw_sql(
                "DELETE FROM pg_temp.differing d USING pg_temp.changed_person c WHERE d.id = c.id;
                 DELETE FROM pg_temp.lagging l USING pg_temp.changed_chain c
                 WHERE (l.source, l.aggregate_type, l.aggregate_id) = (c.source, c.aggregate_type, c.aggregate_id)",
            )
            .execute(&mut *tx)
            .await?;
            sqlx::query(AssertSqlSafe(differing)).execute(&mut *tx).await?;
            sqlx::query(
                "INSERT INTO pg_temp.lagging
                 SELECT c.source, c.aggregate_type, c.aggregate_id
                 FROM pg_temp.changed_chain c
                      CROSS JOIN LATERAL (SELECT version FROM inbox.aggregate
                                          WHERE (consumer, source, aggregate_type, aggregate_id)
                                              = ($1, c.source, c.aggregate_type, c.aggregate_id) OFFSET 0) l
                      LEFT JOIN LATERAL (SELECT version FROM inbox.aggregate
                                         WHERE (consumer, source, aggregate_type, aggregate_id)
                                             = ($2, c.source, c.aggregate_type, c.aggregate_id) OFFSET 0) s ON true
                 WHERE l.version > coalesce(s.version, 0)",
            )
            .bind(self.live)
            .bind(self.shadow)
            .execute(&mut *tx)
            .await?;
        }
        tx.commit().await?;
        Ok(changes)
    }

    /// Looks again at what has changed, until few changes are left.
    pub(super) async fn catch_up(&self, conn: &mut PgConnection, progress: &Progress) -> sqlx::Result<()> {
        progress.step("looking again at what has changed", "change");
        let mut looked = 0;
        // More writes than this command can look at leave the rest to the look under the lock.
        for _ in 0..1_000 {
            let changes = self.again(conn, Some(CHANGES)).await?;
            looked += changes;
            progress.count(looked);
            if changes < 500 {
                break;
            }
        }
        Ok(())
    }
}

/// Makes the tables to remember in, which are empty then.
pub(super) async fn remember(conn: &mut PgConnection) -> anyhow::Result<()> {
    sqlx::raw_sql("SET client_min_messages = warning").execute(&mut *conn).await?;
    sqlx::raw_sql(TABLES).execute(conn).await.map(drop).context("the temporary tables could not be made")
}

/// About how many rows the larger one of these tables has.
async fn rows_of(conn: &mut PgConnection, tables: &[String]) -> sqlx::Result<u64> {
    let rows: i64 = sqlx::query_scalar(
        "SELECT coalesce(max(reltuples), 0)::bigint FROM pg_class WHERE oid = ANY (SELECT to_regclass(name)
         FROM unnest($1::text[]) AS name)",
    )
    .bind(tables)
    .fetch_one(conn)
    .await?;
    Ok(rows.unsigned_abs())
}

/// From now on, changes of both models and of their chains are noted, until the session ends or [`unwatch`]. Fails when
/// another session does that.
pub(super) async fn watch(conn: &mut PgConnection) -> anyhow::Result<()> {
    let mut attempts = 0;
    while !sqlx::query_scalar::<_, bool>("SELECT score.try_swap()").fetch_one(&mut *conn).await? {
        // A writer shares the lock until its commit, where triggers are left over.
        attempts += 1;
        if attempts > 20 {
            bail!(
                "another score-projector rebuild swap is under way; wait until it ends, then run this again"
            );
        }
        pause(attempts).await;
    }
    let noted: Vec<String> =
        sqlx::query_scalar("SELECT relation::text FROM score.noted_tables()").fetch_all(&mut *conn).await?;
    for table in noted {
        try_lock(conn, &table, "SELECT score.note_changes_of($1::regclass)").await?;
    }
    // What is noted and committed so far is visible to every page.
    again(async || sqlx::raw_sql(FORGET).execute(&mut *conn).await)
        .await
        .map(drop)
        .context("the notes of an earlier swap could not be removed")
}

/// Removes the triggers. One that is left over costs a writer little, and the next swap makes it anew.
pub(super) async fn unwatch(conn: &mut PgConnection) {
    let removed = async {
        let left: Vec<String> = sqlx::query_scalar(
            "SELECT n.relation::text FROM score.noted_tables() n
             WHERE EXISTS (SELECT FROM pg_trigger t
                           WHERE t.tgrelid = n.relation AND t.tgfoid = 'score.note_change()'::regprocedure)",
        )
        .fetch_all(&mut *conn)
        .await?;
        for table in left {
            try_lock(conn, &table, "SELECT score.forget_changes_of($1::regclass)").await?;
        }
        sqlx::raw_sql(FORGET).execute(&mut *conn).await?;
        anyhow::Ok(())
    };
    if let Err(error) = removed.await {
        tracing::debug!(%error, "the triggers of the swap were not removed");
    }
}

/// Runs `sql` for a table whose lock it needs for a moment. A vacuum of the table is waited for without one: the server
/// ends it after a second, when it is its own.
async fn try_lock(conn: &mut PgConnection, table: &str, sql: &'static str) -> anyhow::Result<()> {
    for attempt in 1.. {
        let done = async {
            let mut tx = conn.begin().await?;
            without_vacuum(&mut tx, &[table]).await?;
            limit_locks(&mut tx).await?;
            sqlx::query(sql).bind(table).execute(&mut *tx).await?;
            tx.commit().await
        };
        match done.await {
            Err(error) if is_lock(&error) && attempt < LOCK_ATTEMPTS => pause(attempt).await,
            done => return done.with_context(|| format!("changes of {table} cannot be noted")),
        }
    }
    Ok(())
}

/// Keeps vacuum away from tables until the end of the transaction. Neither readers nor writers wait for this lock.
pub(super) async fn without_vacuum(
    tx: &mut sqlx::Transaction<'_, sqlx::Postgres>,
    tables: &[&str],
) -> sqlx::Result<()> {
    let lock = format!(
        "SET LOCAL lock_timeout = '10s'; LOCK TABLE {} IN SHARE UPDATE EXCLUSIVE MODE",
        tables.join(", ")
    );
    sqlx::raw_sql(AssertSqlSafe(lock)).execute(&mut **tx).await.map(drop)
}
