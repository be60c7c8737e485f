//! Transactions that stay open.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

use super::retry::until_done;
use crate::{event::NOTE, fault::Open, field::Field, notes};

/// Somebody's transaction, open for so long. A crash ends it early, unless it was prepared.
pub(crate) async fn transaction(
    field: &Field,
    open: Open,
    commits: bool,
    lasts: Duration,
    number: usize,
) -> anyhow::Result<()> {
    let elsewhere = matches!(open, Open::ReadingElsewhere | Open::PreparedElsewhere);
    let name = format!("chaos-{number}");
    let begun = until_done(async || {
        let mut conn = reach(field, elsewhere).await?;
        conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
        Ok(conn)
    })
    .await?;
    let end = if commits { "COMMIT" } else { "ROLLBACK" };
    match open {
        Open::Reading | Open::ReadingElsewhere => {
            let _crashed = rest(begun, "SELECT txid_current()", lasts, end).await;
            Ok(())
        }
        Open::Appending => {
            let _crashed = append(begun, &name, lasts, end).await;
            Ok(())
        }
        Open::Prepared | Open::PreparedElsewhere => {
            // Whether it was prepared shows at the end.
            let _crashed = prepare(begun, &name, elsewhere).await;
            tokio::time::sleep(lasts).await;
            until_done(async || {
                let mut conn = reach(field, elsewhere).await?;
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

async fn reach(field: &Field, elsewhere: bool) -> anyhow::Result<PgConnection> {
    if elsewhere {
        field.addresses.connect_elsewhere().await
    } else {
        field.addresses.connect("person").await
    }
}

async fn rest(
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
    notes::write(&mut conn, NOTE, name).await?;
    tokio::time::sleep(lasts).await;
    conn.execute(end).await?;
    conn.close().await
}

async fn prepare(mut conn: PgConnection, name: &str, elsewhere: bool) -> sqlx::Result<()> {
    if elsewhere {
        conn.execute("SELECT txid_current()").await?;
    } else {
        notes::write(&mut conn, NOTE, name).await?;
    }
    conn.execute(AssertSqlSafe(format!("PREPARE TRANSACTION '{name}'"))).await?;
    conn.close().await
}
