//! One of the two databases, as one snapshot, and what its digest functions say. All the SQL of `digest`.

use std::collections::BTreeMap;

use anyhow::{Context, anyhow, bail};
use futures_util::{StreamExt, TryStreamExt, stream::BoxStream};
use sqlx::PgConnection;

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

/// Whose inbox, and of which source.
#[derive(Clone, Debug, sqlx::FromRow)]
pub(super) struct Inbox {
    pub(super) consumer: String,
    pub(super) source: String,
}

/// Aggregates with their last versions, in the order of their ids' bytes.
pub(super) type List<'a> = BoxStream<'a, anyhow::Result<(String, i64)>>;

/// A part of what is there: a type, the number of buckets, and some of these.
pub(super) type Buckets<'a> = (&'a str, i32, &'a [i32]);

/// A database that is looked at.
#[derive(Debug)]
pub(super) struct Snapshot {
    conn: PgConnection,
    looking: bool,
}

impl Snapshot {
    pub(super) async fn new(mut conn: PgConnection) -> anyhow::Result<Self> {
        // A look stays while the other databases are read. What is sorted and hashed is worth some memory.
        sqlx::raw_sql("SET idle_in_transaction_session_timeout = '30min'; SET work_mem = '64MB'")
            .execute(&mut conn)
            .await
            .context("the connection could not be set up")?;
        Ok(Self { conn, looking: false })
    }

    /// Takes a snapshot, in the place of the last one.
    pub(super) async fn look(&mut self) -> anyhow::Result<()> {
        let end = if self.looking { "COMMIT;" } else { "" };
        // The snapshot is taken by the first statement that reads.
        let begin =
            format!("{end} BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SELECT pg_is_in_recovery()");
        let looked = sqlx::raw_sql(sqlx::AssertSqlSafe(begin)).execute(&mut self.conn).await;
        looked.context("the database could not be read")?;
        self.looking = true;
        Ok(())
    }

    /// Who publishes from here. A standby is behind its primary, and would make subscribers seem ahead.
    pub(super) async fn source(&mut self) -> anyhow::Result<String> {
        let standby: bool =
            sqlx::query_scalar("SELECT pg_is_in_recovery()").fetch_one(&mut self.conn).await?;
        if standby {
            bail!("the server is in recovery and may be behind its primary: connect to the primary");
        }
        Ok(self.incarnation().await?.to_string())
    }

    /// The source with its incarnation.
    pub(super) async fn incarnation(&mut self) -> anyhow::Result<outbox::Source> {
        Ok(outbox::source(&mut self.conn).await?)
    }

    /// The session, in the middle of a look.
    pub(super) fn conn(&mut self) -> &mut PgConnection {
        &mut self.conn
    }

    /// Of the outbox, or of an inbox.
    pub(super) async fn digest(&mut self, of: Option<&Inbox>, buckets: i32) -> anyhow::Result<Digest> {
        let digest = match of {
            None => sqlx::query_as("SELECT * FROM outbox.digest($1)"),
            Some(_) => sqlx::query_as("SELECT * FROM inbox.digest($2, $3, $1)"),
        };
        let digest = digest.bind(buckets);
        let digest = match of {
            None => digest,
            Some(of) => digest.bind(&of.consumer).bind(&of.source),
        };
        let rows: Vec<(String, i32, i64, i64, i64)> =
            digest.fetch_all(&mut self.conn).await.map_err(unreadable)?;
        let sums = |(type_, bucket, aggregates, versions, hash)| {
            ((type_, bucket), Sums { aggregates, versions, hash })
        };
        Ok(rows.into_iter().map(sums).collect())
    }

    pub(super) fn list<'a>(
        &'a mut self,
        of: Option<&'a Inbox>,
        (type_, buckets, chosen): Buckets<'a>,
    ) -> List<'a> {
        let list = match of {
            None => sqlx::query_as("SELECT * FROM outbox.digest_list($1, $2, $3)"),
            Some(_) => sqlx::query_as("SELECT * FROM inbox.digest_list($4, $5, $1, $2, $3)"),
        };
        let list = list.bind(type_).bind(buckets).bind(chosen);
        let list = match of {
            None => list,
            Some(of) => list.bind(&of.consumer).bind(&of.source),
        };
        list.fetch(&mut self.conn).map_err(unreadable).boxed()
    }

    /// Whether some of the outbox's history is gone.
    pub(super) async fn is_retired(&mut self) -> anyhow::Result<bool> {
        sqlx::query_scalar("SELECT outbox.is_retired()").fetch_one(&mut self.conn).await.map_err(unreadable)
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
        // undefined_function, invalid_schema_name
        Some("42883" | "3F000") => anyhow!(
            "this database has no inbox that can be compared; bring its schema inbox up to date \
             (run what migrates the subscriber)"
        ),
        // numeric_value_out_of_range
        Some("22003") => anyhow!(
            "the sum of the versions is too large for this database's digest function, which is an old one; bring its \
             schema up to date (outbox-relay migrate for an outbox; for an inbox, run what migrates the subscriber)"
        ),
        // insufficient_privilege
        Some("42501") => anyhow!("this role may not read the inbox; inbox.grant_reader grants it"),
        _ => anyhow!(error).context("the digest could not be read"),
    }
}
