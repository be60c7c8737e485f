use std::time::Duration;

use anyhow::{Context, anyhow};
use sqlx::Connection;

use crate::config::MigrateArgs;

/// A migration may have to build an index over a large history.
const STATEMENT_TIMEOUT: Duration = Duration::from_hours(1);

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
    conn.close().await?;
    tracing::info!(%source, "the outbox is installed and current");
    Ok(())
}
