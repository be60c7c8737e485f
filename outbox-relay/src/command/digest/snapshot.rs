//! The two databases, and what they have of the aggregates. All the SQL of `digest`. Each statement is a snapshot of its
//! own, so none lasts.

use std::collections::BTreeMap;

use anyhow::{Context, anyhow, bail};
use sqlx::{AssertSqlSafe, PgConnection};

/// Aggregates that one statement reads.
pub(super) const PAGE: usize = 10_000;

/// What a bucket adds up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sums {
    pub(super) aggregates: i64,
    /// The sum of their last versions, modulo 2^63.
    pub(super) versions: i64,
    hash: i64,
}

impl Sums {
    pub(super) fn hash(self) -> String {
        format!("{:016x}", self.hash.cast_unsigned())
    }
}

/// By aggregate type and bucket. A bucket that is not there is empty.
pub(super) type Digest = BTreeMap<(String, i32), Sums>;

/// The last versions of aggregates of a type, by their ids.
pub(super) type Versions = BTreeMap<String, i64>;

/// Whose inbox, and of which source.
#[derive(Clone, Debug, sqlx::FromRow)]
pub(super) struct Inbox {
    pub(super) consumer: String,
    pub(super) source: String,
}

/// Pages of a key are read by its index, whatever the server believes to be in the table.
async fn by_index(mut conn: PgConnection) -> anyhow::Result<PgConnection> {
    sqlx::raw_sql(
        "SET enable_seqscan = off; SET enable_bitmapscan = off; SET enable_hashagg = off; SET enable_hashjoin = off;
         SET max_parallel_workers_per_gather = 0; SET jit = off",
    )
    .execute(&mut conn)
    .await
    .context("the connection could not be set up")?;
    Ok(conn)
}

/// The outbox.
#[derive(Debug)]
pub(super) struct OutboxSide {
    conn: PgConnection,
    /// What lies at or below this position belongs to earlier incarnations; none in the first one.
    from: Option<i64>,
}

impl OutboxSide {
    pub(super) async fn new(conn: PgConnection) -> anyhow::Result<Self> {
        let mut side = Self { conn: by_index(conn).await?, from: None };
        let from: i64 = sqlx::query_scalar("SELECT from_position FROM outbox.source")
            .fetch_optional(&mut side.conn)
            .await?
            .unwrap_or(0);
        side.from = (from > 0).then_some(from);
        Ok(side)
    }

    /// Who publishes from here. A standby is behind its primary, and would make subscribers seem ahead.
    pub(super) async fn source(&mut self) -> anyhow::Result<String> {
        source(&mut self.conn).await
    }

    /// The source with its incarnation.
    pub(super) async fn incarnation(&mut self) -> anyhow::Result<outbox::Source> {
        Ok(outbox::source(&mut self.conn).await?)
    }

    /// The session.
    pub(super) fn conn(&mut self) -> &mut PgConnection {
        &mut self.conn
    }

    /// Whether there is any event of this incarnation.
    pub(super) async fn has_events(&mut self) -> anyhow::Result<bool> {
        sqlx::query_scalar(
            "SELECT EXISTS (SELECT FROM outbox.aggregate WHERE version > 0 AND last_position > $1)",
        )
        .bind(self.from.unwrap_or(0))
        .fetch_one(&mut self.conn)
        .await
        .map_err(unreadable)
    }

    /// The next page of a type after an id, in the order of the ids' bytes.
    pub(super) async fn page(
        &mut self,
        type_: &str,
        after: Option<&str>,
    ) -> anyhow::Result<Vec<(String, i64)>> {
        let compares = if after.is_none() { ">=" } else { ">" };
        let sql = self.versions(&format!("aggregate_id {compares} $2"), &format!("LIMIT {PAGE}"));
        let page = sqlx::query_as(AssertSqlSafe(sql)).bind(type_).bind(after.unwrap_or_default());
        page.fetch_all(&mut self.conn).await.map_err(unreadable)
    }

    /// The aggregates of a type with these ids.
    pub(super) async fn of(&mut self, type_: &str, ids: &[&str]) -> anyhow::Result<Versions> {
        let sql = self.versions("aggregate_id = ANY ($2)", "");
        let rows: Vec<(String, i64)> = sqlx::query_as(AssertSqlSafe(sql))
            .bind(type_)
            .bind(ids)
            .fetch_all(&mut self.conn)
            .await
            .map_err(unreadable)?;
        Ok(rows.into_iter().collect())
    }

    fn versions(&self, which: &str, limit: &str) -> String {
        let from = self.from.unwrap_or(0);
        format!(
            "SELECT aggregate_id, version FROM outbox.aggregate
             WHERE aggregate_type = $1 AND {which} AND version > 0 AND last_position > {from}
             ORDER BY aggregate_id {limit}"
        )
    }

    /// Whether history was retired before the outbox kept its chains: an aggregate of that time may have none.
    pub(super) async fn is_retired(&mut self) -> anyhow::Result<bool> {
        let adopts = "SELECT EXISTS (SELECT FROM outbox.source WHERE adopts_chains)";
        sqlx::query_scalar(adopts).fetch_one(&mut self.conn).await.map_err(unreadable)
    }
}

/// Who publishes from this database.
pub(super) async fn source(conn: &mut PgConnection) -> anyhow::Result<String> {
    let standby: bool = sqlx::query_scalar("SELECT pg_is_in_recovery()").fetch_one(&mut *conn).await?;
    if standby {
        bail!("the server is in recovery and may be behind its primary: connect to the primary");
    }
    Ok(outbox::source(conn).await?.to_string())
}

/// The outbox's digest.
pub(super) async fn digest(conn: &mut PgConnection, buckets: i32) -> anyhow::Result<Digest> {
    let rows: Vec<(String, i32, i64, i64, i64)> = sqlx::query_as("SELECT * FROM outbox.digest($1)")
        .bind(buckets)
        .fetch_all(conn)
        .await
        .map_err(unreadable)?;
    let sums =
        |(type_, bucket, aggregates, versions, hash)| ((type_, bucket), Sums { aggregates, versions, hash });
    Ok(rows.into_iter().map(sums).collect())
}

/// A subscriber's inbox.
#[derive(Debug)]
pub(super) struct InboxSide {
    conn: PgConnection,
}

impl InboxSide {
    pub(super) async fn new(conn: PgConnection) -> anyhow::Result<Self> {
        Ok(Self { conn: by_index(conn).await? })
    }

    /// The session.
    pub(super) fn conn(&mut self) -> &mut PgConnection {
        &mut self.conn
    }

    /// The aggregate types that it has: from each straight to the next. One of which nothing was applied yet counts.
    pub(super) async fn types(&mut self, of: &Inbox) -> anyhow::Result<Vec<String>> {
        sqlx::query_scalar(
            "WITH RECURSIVE known AS (
                 (SELECT aggregate_type FROM inbox.aggregate WHERE (consumer, source) = ($1, $2)
                  ORDER BY aggregate_type LIMIT 1)
                 UNION ALL
                 SELECT next.aggregate_type
                 FROM known k
                      CROSS JOIN LATERAL (SELECT a.aggregate_type FROM inbox.aggregate a
                                          WHERE (a.consumer, a.source) = ($1, $2) AND a.aggregate_type > k.aggregate_type
                                          ORDER BY a.aggregate_type LIMIT 1) next)
             SELECT aggregate_type FROM known",
        )
        .bind(&of.consumer)
        .bind(&of.source)
        .fetch_all(&mut self.conn)
        .await
        .map_err(unreadable)
    }

    /// How many aggregates of a type it has.
    pub(super) async fn count(&mut self, of: &Inbox, type_: &str) -> anyhow::Result<i64> {
        sqlx::query_scalar(
            "SELECT count(*) FROM inbox.aggregate WHERE (consumer, source, aggregate_type) = ($1, $2, $3)",
        )
        .bind(&of.consumer)
        .bind(&of.source)
        .bind(type_)
        .fetch_one(&mut self.conn)
        .await
        .map_err(unreadable)
    }

    /// The next page of a type after one id and up to another one, in the order of this database.
    pub(super) async fn page(
        &mut self,
        of: &Inbox,
        type_: &str,
        (after, end): (Option<&str>, Option<&str>),
    ) -> anyhow::Result<Vec<(String, i64)>> {
        let compares = if after.is_none() { ">=" } else { ">" };
        let until = if end.is_none() { "" } else { "AND aggregate_id <= $5" };
        let sql = format!(
            "SELECT aggregate_id, version FROM inbox.aggregate
             WHERE (consumer, source, aggregate_type) = ($1, $2, $3) AND aggregate_id {compares} $4 {until}
               AND version > 0
             ORDER BY aggregate_id LIMIT {PAGE}"
        );
        let page = sqlx::query_as(AssertSqlSafe(sql))
            .bind(&of.consumer)
            .bind(&of.source)
            .bind(type_)
            .bind(after.unwrap_or_default());
        let page = if let Some(end) = end { page.bind(end) } else { page };
        page.fetch_all(&mut self.conn).await.map_err(unreadable)
    }

    /// The one of two ids that is later in the order of this database, which may not be the outbox's.
    pub(super) async fn later(&mut self, one: Option<String>, other: &str) -> anyhow::Result<String> {
        let Some(one) = one else { return Ok(other.to_owned()) };
        let later = sqlx::query_scalar("SELECT greatest($1::text, $2::text)").bind(one).bind(other);
        later.fetch_one(&mut self.conn).await.map_err(unreadable)
    }

    /// The aggregates of a type with these ids.
    pub(super) async fn of(&mut self, of: &Inbox, type_: &str, ids: &[&str]) -> anyhow::Result<Versions> {
        let rows: Vec<(String, i64)> = sqlx::query_as(
            "SELECT aggregate_id, version FROM inbox.aggregate
             WHERE (consumer, source, aggregate_type) = ($1, $2, $3) AND aggregate_id = ANY ($4) AND version > 0",
        )
        .bind(&of.consumer)
        .bind(&of.source)
        .bind(type_)
        .bind(ids)
        .fetch_all(&mut self.conn)
        .await
        .map_err(unreadable)?;
        Ok(rows.into_iter().collect())
    }

    /// The consumer that goes by this name now: another one, once it was replaced.
    pub(super) async fn current(&mut self, name: &str) -> anyhow::Result<String> {
        let current = sqlx::query_scalar("SELECT inbox.current_consumer($1)").bind(name);
        match current.fetch_one(&mut self.conn).await {
            Ok(current) => Ok(current),
            // undefined_function: an inbox of before consumers could be replaced.
            Err(error)
                if error.as_database_error().and_then(sqlx::error::DatabaseError::code).as_deref()
                    == Some("42883") =>
            {
                Ok(name.to_owned())
            }
            Err(error) => Err(unreadable(error)),
        }
    }

    /// Who has an inbox here, of which source.
    pub(super) async fn sources(&mut self) -> anyhow::Result<Vec<Inbox>> {
        sqlx::query_as("SELECT * FROM inbox.sources()").fetch_all(&mut self.conn).await.map_err(unreadable)
    }
}

fn unreadable(error: sqlx::Error) -> anyhow::Error {
    match error.as_database_error().and_then(sqlx::error::DatabaseError::code).as_deref() {
        // undefined_function, undefined_table, invalid_schema_name
        Some("42883" | "42P01" | "3F000") => anyhow!(
            "this database has no inbox that can be compared; bring its schema inbox up to date \
             (run what migrates the subscriber)"
        ),
        // numeric_value_out_of_range
        Some("22003") => anyhow!(
            "the sum of the versions is too large for this database's digest function, which is an old one; bring its \
             schema up to date (outbox-relay migrate)"
        ),
        // insufficient_privilege
        Some("42501") => anyhow!("this role may not read the inbox; inbox.grant_reader grants it"),
        _ => anyhow!(error).context("the digest could not be read"),
    }
}
