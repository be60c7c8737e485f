mod script;

use std::time::Duration;

use anyhow::{Context, anyhow};
use daemon::{command::print, progress::Progress};
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::config::MigrateArgs;
use script::Script;

/// A migration may have to build an index over a large history.
const STATEMENT_TIMEOUT: Duration = Duration::from_hours(1);

/// An index waits for each open transaction for so long.
const LOCK_TIMEOUT: &str = "30s";

/// Installs the outbox in any database and grants the roles their rights. Running it again is safe. Or prints the SQL for
/// it, and connects to nothing.
pub async fn migrate(args: &MigrateArgs) -> anyhow::Result<()> {
    if args.print {
        outbox::check_source_name(&args.source)?;
        let script = Script {
            source: &args.source,
            after: args.after.unwrap_or_default(),
            writers: &args.grant_writer,
            relays: &args.grant_relay,
        };
        return print(&script.text(&outbox::migrator().migrations)).context("the script cannot be written");
    }
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

/// Makes the indexes that are missing. Without them everything works, and some commands take longer.
async fn build_indexes(conn: &mut PgConnection) -> anyhow::Result<()> {
    let missing: Vec<(String, String)> =
        sqlx::query_as("SELECT name, statement FROM outbox.missing_index ORDER BY upper, name, step")
            .fetch_all(&mut *conn)
            .await
            .context("the outbox is current, but its indexes could not be looked at")?;
    let all = missing.len() as u64;
    let said = Progress::new("making indexes", "table");
    let mut left = 0_u64;
    for (n, (index, statement)) in (0..).zip(missing) {
        said.at(n, all);
        if let Err(error) = build_index(conn, statement).await {
            left += 1;
            let why = outbox::database::describe(&error);
            tracing::warn!(index, why, "an index could not be made; run migrate once more");
        }
    }
    drop(said);
    if left > 0 {
        tracing::warn!(indexes = left, "indexes are missing");
    }
    Ok(())
}

/// Stops no writer, and waits for transactions that are open.
async fn build_index(conn: &mut PgConnection, statement: String) -> sqlx::Result<()> {
    sqlx::raw_sql(AssertSqlSafe(format!("SET lock_timeout = '{LOCK_TIMEOUT}'"))).execute(&mut *conn).await?;
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut *conn).await?;
    Ok(())
}
