//! What the operator's statements have cost, by `pg_stat_statements`.

use std::time::Duration;

use serde::Serialize;
use sqlx::PgConnection;

use super::OPERATOR;

/// What the statements have cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, sqlx::FromRow)]
pub(crate) struct Cost {
    pub(crate) statements: i64,
    pub(crate) rows: i64,
    /// Buffers that were found or read.
    pub(crate) buffers: i64,
    /// Blocks of temporary files that were read or written.
    pub(crate) temporary: i64,
}

/// From now on, they count; in all databases.
pub(super) async fn begin(conn: &mut PgConnection) -> anyhow::Result<()> {
    sqlx::query("SELECT pg_stat_statements_reset($1::regrole::oid)").bind(OPERATOR).execute(conn).await?;
    Ok(())
}

/// Of the operator's statements since the last reset.
pub(super) async fn cost(conn: &mut PgConnection) -> anyhow::Result<Cost> {
    let cost = sqlx::query_as(
        "SELECT coalesce(sum(calls), 0)::bigint AS statements, coalesce(sum(rows), 0)::bigint AS rows,
                coalesce(sum(shared_blks_hit + shared_blks_read + local_blks_hit + local_blks_read), 0)::bigint AS buffers,
                coalesce(sum(temp_blks_read + temp_blks_written), 0)::bigint AS temporary
         FROM pg_stat_statements(false) s WHERE s.userid = $1::regrole::oid",
    )
    .bind(OPERATOR)
    .fetch_one(conn)
    .await?;
    Ok(cost)
}

/// How many statements of a command still run although it has ended; they are ended.
pub(super) async fn left_behind(conn: &mut PgConnection, serves: bool) -> anyhow::Result<i64> {
    if serves {
        return Ok(0);
    }
    // The server needs a moment to notice.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let count = sqlx::query_scalar(
        "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid))
         FROM pg_stat_activity WHERE usename = $1 AND state = 'active' AND query_start < now() - interval '0.3 s'",
    )
    .bind(OPERATOR)
    .fetch_one(conn)
    .await?;
    Ok(count)
}
