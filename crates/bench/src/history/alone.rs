//! The statements that the programs run by themselves: relay, projector, alarms, `/metrics`, `/ready`. Each has to touch a
//! bounded number of buffers, whatever the history is.

use std::time::Duration;

use serde::Serialize;
use sqlx::{Connection, PgConnection};
use tokio::time::Instant;

use devstack::{program::client, roles, stack::Stack};

/// No statement that runs by itself touches more buffers, whatever the history is: 40 MiB.
const BOUND: f64 = 5_000.0;
/// More than this and twice as many as with the short history is growth. A function's first call in a session reads up to
/// 200 buffers of the catalog.
const SLACK: f64 = 300.0;
/// What counts stops at some number by itself, which the short history does not reach.
const STOPS: &str = ") AS counted";

/// A statement, as `pg_stat_statements` has it.
#[derive(Clone, Debug, PartialEq, Serialize, sqlx::FromRow)]
pub(crate) struct Statement {
    /// Its role is its program.
    pub(crate) role: String,
    pub(crate) database: String,
    pub(crate) query: String,
    pub(crate) calls: i64,
    /// Buffers found or read by a call, on average.
    pub(crate) buffers: f64,
    /// The longest call, in milliseconds.
    pub(crate) longest_ms: f64,
}

impl Statement {
    fn is_same(&self, other: &Self) -> bool {
        (&self.role, &self.database, &self.query) == (&other.role, &other.database, &other.query)
    }

    /// How it breaks the rule, compared with itself beside a short history, where it read most: the first call of a session
    /// reads the catalog, too, and there may be only one call.
    pub(crate) fn broken(&self, short: &[Self]) -> Option<String> {
        let before =
            short.iter().filter(|other| self.is_same(other)).map(|other| other.buffers).reduce(f64::max);
        if self.buffers > BOUND {
            return Some(format!("{:.0} buffers a call, of {BOUND} at most", self.buffers));
        }
        let grows = |before: &f64| self.buffers > 2.0 * before + SLACK && !self.query.contains(STOPS);
        let before = before.filter(grows)?;
        Some(format!("{:.0} buffers a call instead of {before:.0} with the short history", self.buffers))
    }

    /// Its first words, in one line.
    pub(crate) fn short(&self) -> String {
        let line = self.query.split_whitespace().collect::<Vec<_>>().join(" ");
        line.chars().take(100).collect::<String>().replace('|', "\\|")
    }
}

/// From now on, statements count.
pub(crate) async fn begin(stack: &Stack) -> anyhow::Result<()> {
    let mut conn = PgConnection::connect(&format!("{}/person", stack.servers.postgres.url())).await?;
    sqlx::query("SELECT pg_stat_statements_reset()").execute(&mut conn).await?;
    Ok(conn.close().await?)
}

/// Watches running programs that have nothing to do, for some time, while their `/metrics` and `/ready` are read. Returns the
/// statements since [`begin`].
pub(crate) async fn watch(stack: &mut Stack, length: Duration) -> anyhow::Result<Vec<Statement>> {
    let mut conn = PgConnection::connect(&format!("{}/person", stack.servers.postgres.url())).await?;
    let urls = stack.programs().map(|program| program.url());
    let (client, begin) = (client()?, Instant::now());
    while begin.elapsed() < length {
        for url in &urls {
            for path in ["metrics", "ready"] {
                // Not being ready is a response, too.
                client.get(format!("{url}/{path}")).send().await?.text().await?;
            }
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let mut statements: Vec<Statement> = sqlx::query_as(
        "SELECT r.rolname::text AS role, d.datname::text AS database, s.query, sum(s.calls)::bigint AS calls,
                (sum(s.shared_blks_hit + s.shared_blks_read) / sum(s.calls))::double precision AS buffers,
                max(s.max_exec_time) AS longest_ms
         FROM pg_stat_statements s JOIN pg_roles r ON r.oid = s.userid JOIN pg_database d ON d.oid = s.dbid
         WHERE r.rolname = ANY ($1) AND s.calls > 0
         GROUP BY 1, 2, 3",
    )
    .bind(roles::PROGRAMS)
    .fetch_all(&mut conn)
    .await?;
    conn.close().await?;
    statements.sort_by(|one, other| other.buffers.total_cmp(&one.buffers));
    Ok(statements)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_statement_neither_grows_nor_is_large() {
        let of = |query: &str, buffers| Statement {
            role: String::new(),
            database: String::new(),
            query: query.to_owned(),
            calls: 1,
            buffers,
            longest_ms: 0.0,
        };
        let short = [of("a", 10.0), of("b", 900.0)];
        assert_eq!(of("a", 320.0).broken(&short), None);
        assert_eq!(
            of("a", 321.0).broken(&short).as_deref(),
            Some("321 buffers a call instead of 10 with the short history")
        );
        assert_eq!(of("b", 5_001.0).broken(&short).as_deref(), Some("5001 buffers a call, of 5000 at most"));
        assert_eq!(
            of("SELECT count(*) FROM (…) AS counted", 999.0)
                .broken(&[of("SELECT count(*) FROM (…) AS counted", 1.0)]),
            None
        );
        assert_eq!(of("new", 4_999.0).broken(&short), None);
    }
}
