//! Transactions that stay open.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

use super::retry::until_done;
use crate::{
    addresses::Addresses, event::NOTE, fault::OpenTransaction, testbed::Testbed, workload::sql_writers,
};

/// A transaction of another client that is open for so long. A crash of PostgreSQL ends it early, unless it is prepared.
pub(crate) async fn transaction(
    testbed: &Testbed,
    open: OpenTransaction,
    commits: bool,
    lasts: Duration,
    number: usize,
) -> anyhow::Result<()> {
    let elsewhere = matches!(open, OpenTransaction::ReadingElsewhere | OpenTransaction::PreparedElsewhere);
    let name = format!("chaos-{number}");
    let begun = until_done(async || {
        let mut conn = reach(testbed, elsewhere).await?;
        conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
        Ok(conn)
    })
    .await?;
    let end = if commits { "COMMIT" } else { "ROLLBACK" };
    match open {
        OpenTransaction::Reading | OpenTransaction::ReadingElsewhere => {
            let _crashed = hold(begun, "SELECT txid_current()", lasts, end).await;
            Ok(())
        }
        OpenTransaction::Appending => {
            let _crashed = append(begun, &name, lasts, end).await;
            Ok(())
        }
        OpenTransaction::Prepared | OpenTransaction::PreparedElsewhere => {
            // Whether it is prepared is checked at the end.
            let _crashed = prepare(begun, &name, elsewhere).await;
            tokio::time::sleep(lasts).await;
            until_done(async || {
                let mut conn = reach(testbed, elsewhere).await?;
                let prepared: bool =
                    sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_prepared_xacts WHERE gid = $1)")
                        .bind(&name)
                        .fetch_one(&mut conn)
                        .await?;
                if prepared {
                    conn.execute(AssertSqlSafe(format!("{end} PREPARED '{name}'"))).await?;
                }
                Ok(conn.close().await?)
            })
            .await
        }
    }
}

async fn reach(testbed: &Testbed, elsewhere: bool) -> anyhow::Result<PgConnection> {
    if elsewhere {
        testbed.addresses.connect(Addresses::OTHER).await
    } else {
        testbed.addresses.connect("person").await
    }
}

async fn hold(
    mut conn: PgConnection,
    sql: &'static str,
    lasts: Duration,
    end: &'static str,
) -> sqlx::Result<()> {
    conn.execute(sql).await?;
    tokio::time::sleep(lasts).await;
    conn.execute(end).await?;
    conn.close().await
}

async fn append(mut conn: PgConnection, name: &str, lasts: Duration, end: &'static str) -> sqlx::Result<()> {
    sql_writers::write(&mut conn, NOTE, name).await?;
    tokio::time::sleep(lasts).await;
    conn.execute(end).await?;
    conn.close().await
}

async fn prepare(mut conn: PgConnection, name: &str, elsewhere: bool) -> sqlx::Result<()> {
    if elsewhere {
        conn.execute("SELECT txid_current()").await?;
    } else {
        sql_writers::write(&mut conn, NOTE, name).await?;
    }
    conn.execute(AssertSqlSafe(format!("PREPARE TRANSACTION '{name}'"))).await?;
    conn.close().await
}
