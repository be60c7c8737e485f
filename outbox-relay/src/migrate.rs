use std::time::Duration;

use anyhow::{Context, anyhow};
use daemon::progress::Progress;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::config::MigrateArgs;

/// A migration may have to build an index over a large history.
const STATEMENT_TIMEOUT: Duration = Duration::from_hours(1);

/// An index waits for each open transaction for so long.
const LOCK_TIMEOUT: &str = "30s";

/// Installs the outbox in any database and grants the roles their rights. Running it again is safe.
pub async fn migrate(args: &MigrateArgs) -> anyhow::Result<()> {
    let database = args.database.options("outbox-relay migrate", STATEMENT_TIMEOUT)?;
    let mut conn = database.connect().await.context("the database cannot be reached")?;
    let source = outbox::install(&mut conn, &args.source).await?;
    for (sql, roles) in [
        ("SELECT outbox.grant_writer($1::regrole)", &args.grant_writer),
        ("SELECT outbox.grant_relay($1::regrole)", &args.grant_relay),
    ] {
        for role in roles {
            let granted = sqlx::query(sql).bind(role).execute(&mut conn).await;
            granted.map_err(|error| {
                // Without the line of the server's own source that the driver adds.
                let said = error.as_database_error().map(|e| e.message().to_owned());
                anyhow!("{role:?} did not get its rights: {}", said.unwrap_or_else(|| error.to_string()))
            })?;
        }
    }
    build_indexes(&mut conn).await?;
    conn.close().await?;
    tracing::info!(%source, "the outbox is installed and current");
    Ok(())
}

/// Makes the indexes that a migration makes for small partitions alone, because it would lock out writers. Without them
/// everything works; looking for what keeps a partition takes longer.
async fn build_indexes(conn: &mut PgConnection) -> anyhow::Result<()> {
    let partitions: Vec<String> =
        sqlx::query_scalar("SELECT name FROM outbox.partition_without_index ORDER BY upper")
            .fetch_all(&mut *conn)
            .await
            .context("the outbox is current, but its indexes could not be looked at")?;
    let all = partitions.len() as u64;
    let said = Progress::new("making indexes", "partition");
    let mut left = 0_u64;
    for (n, partition) in (0..).zip(&partitions) {
        said.at(n, all);
        if let Err(error) = build_index(conn, partition).await {
            left += 1;
            let why = outbox::database::describe(&error);
            tracing::warn!(partition, why, "the partition did not get its index of baselines and deletions");
        }
    }
    drop(said);
    if left > 0 {
        tracing::warn!(partitions = left, "partitions are left without that index");
    }
    Ok(())
}

/// Stops no writer, and waits for transactions that are open.
async fn build_index(conn: &mut PgConnection, partition: &str) -> sqlx::Result<()> {
    sqlx::raw_sql(AssertSqlSafe(format!("SET lock_timeout = '{LOCK_TIMEOUT}'"))).execute(&mut *conn).await?;
    // One that was interrupted has left an index that is not valid.
    let (drop, create): (String, String) = sqlx::query_as(
        "SELECT format('DROP INDEX CONCURRENTLY IF EXISTS outbox.%I', $1 || '_whole_state'),
                outbox.whole_state_index($1, true)",
    )
    .bind(partition)
    .fetch_one(&mut *conn)
    .await?;
    sqlx::raw_sql(AssertSqlSafe(drop)).execute(&mut *conn).await?;
    sqlx::raw_sql(AssertSqlSafe(create)).execute(&mut *conn).await?;
    Ok(())
}
