//! Faults of the database server, or of one of its databases.

use std::time::Duration;

use devstack::proc;
use rustix::process::{Pid, Signal};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

use super::retry::until_done;
use crate::{
    fault::{Database, Member, What},
    field::Field,
};

pub(crate) async fn database(
    field: &Field,
    what: What,
    disturbed: &[Member],
    lasts: Duration,
) -> anyhow::Result<()> {
    let mut postgres = field.postgres.lock().await;
    match what {
        What::DatabaseCrashed => {
            field.crew.disturb(disturbed);
            postgres.abort().await;
            tokio::time::sleep(lasts).await;
            postgres.start().await
        }
        What::CommitsLost => {
            let mut conn = field.addresses.connect("postgres").await?;
            let writer: i32 =
                sqlx::query_scalar("SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'")
                    .fetch_one(&mut conn)
                    .await?;
            proc::signal(&Pid::from_raw(writer).into_iter().collect::<Vec<_>>(), Signal::STOP);
            tokio::time::sleep(lasts).await;
            field.crew.disturb(disturbed);
            postgres.kill().await;
            postgres.start().await
        }
        _ => {
            let mut conn = field.addresses.connect("postgres").await?;
            field.crew.disturb(disturbed);
            end_sessions(&mut conn).await?;
            Ok(conn.close().await?)
        }
    }
}

/// Ends every session of the programs.
async fn end_sessions(conn: &mut PgConnection) -> anyhow::Result<()> {
    conn.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
         WHERE usename IN ('person_api', 'outbox_relay', 'score_projector', 'score_api')",
    )
    .await?;
    Ok(())
}

/// A database that takes no writes, as a standby that somebody leads the programs to.
pub(crate) async fn read_only(field: &Field, database: Database, lasts: Duration) -> anyhow::Result<()> {
    field.crew.disturb(&Member::ALL);
    set_read_only(field, database, "SET default_transaction_read_only = on").await?;
    tokio::time::sleep(lasts).await;
    set_read_only(field, database, "RESET default_transaction_read_only").await?;
    field.crew.calm(&Member::ALL);
    Ok(())
}

async fn set_read_only(field: &Field, database: Database, change: &str) -> anyhow::Result<()> {
    let name = database.name();
    until_done(async || {
        // Not in that database: there it would be read-only itself.
        let mut conn = field.addresses.connect("postgres").await?;
        conn.execute(AssertSqlSafe(format!("ALTER DATABASE {name} {change}"))).await?;
        end_sessions(&mut conn).await?;
        Ok(conn.close().await?)
    })
    .await
}
