//! Faults of the database server, or of one of its databases.

use std::time::Duration;

use devstack::proc;
use rustix::process::{Pid, Signal};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

use super::retry::until_done;
use crate::{
    fault::{Database, Fault, Instance},
    testbed::Testbed,
};

pub(crate) async fn database(
    testbed: &Testbed,
    what: Fault,
    affected: &[Instance],
    lasts: Duration,
) -> anyhow::Result<()> {
    let mut postgres = testbed.postgres.lock().await;
    match what {
        Fault::DatabaseCrashed => {
            testbed.supervisor.fault_begins(affected);
            postgres.abort().await;
            tokio::time::sleep(lasts).await;
            postgres.start().await
        }
        Fault::CommitsLost => {
            let mut conn = testbed.addresses.connect("postgres").await?;
            let writer: i32 =
                sqlx::query_scalar("SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'")
                    .fetch_one(&mut conn)
                    .await?;
            proc::signal(&Pid::from_raw(writer).into_iter().collect::<Vec<_>>(), Signal::STOP);
            tokio::time::sleep(lasts).await;
            testbed.supervisor.fault_begins(affected);
            postgres.kill().await;
            postgres.start().await
        }
        _ => {
            let mut conn = testbed.addresses.connect("postgres").await?;
            testbed.supervisor.fault_begins(affected);
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

/// Makes a database read-only, as a standby is.
pub(crate) async fn read_only(testbed: &Testbed, database: Database, lasts: Duration) -> anyhow::Result<()> {
    testbed.supervisor.fault_begins(&Instance::ALL);
    set_read_only(testbed, database, "SET default_transaction_read_only = on").await?;
    tokio::time::sleep(lasts).await;
    set_read_only(testbed, database, "RESET default_transaction_read_only").await?;
    testbed.supervisor.fault_ends(&Instance::ALL);
    Ok(())
}

async fn set_read_only(testbed: &Testbed, database: Database, change: &str) -> anyhow::Result<()> {
    let name = database.name();
    until_done(async || {
        // In another database: in that one this session would be read-only itself.
        let mut conn = testbed.addresses.connect("postgres").await?;
        conn.execute(AssertSqlSafe(format!("ALTER DATABASE {name} {change}"))).await?;
        end_sessions(&mut conn).await?;
        Ok(conn.close().await?)
    })
    .await
}
