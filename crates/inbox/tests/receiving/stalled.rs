//! A consumer that receives and applies nothing is not at work, however healthy each of its servers is.

use std::time::Duration;

use sqlx::{Connection, PgConnection};

use crate::{
    consumer::World,
    support::{DEADLINE, Recorder, event},
};

/// The status says it for as long as it is so, without a moment of health between two attempts: it is followed by
/// every change, not by looks.
#[tokio::test]
async fn a_table_that_stays_locked_is_a_reason_not_to_be_ready() {
    let world = World::new("stalled").await;
    // Each attempt gives up by itself, as in a program that has limits.
    let options = world.pool.connect_options();
    let database = options.get_database().unwrap();
    // The consumer's sessions all begin after that.
    let mut locker = PgConnection::connect_with(&options).await.unwrap();
    let sql = format!("ALTER DATABASE {database} SET lock_timeout = '500ms'");
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut locker).await.unwrap();
    sqlx::raw_sql(
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
         WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    .execute(&mut locker)
    .await
    .unwrap();
    let mut running = world.start_with(Recorder::new("things"), |config| config);
    running.until_consuming().await;

    sqlx::raw_sql("BEGIN; LOCK TABLE inbox.aggregate IN ACCESS EXCLUSIVE MODE")
        .execute(&mut locker)
        .await
        .unwrap();
    world.publish(event("a", 1, "")).await;
    let stalled = running.status.wait_for(|status| status.applying.is_err());
    let stalled = tokio::time::timeout(DEADLINE, stalled).await.unwrap().unwrap().applying.clone();
    let reason = stalled.unwrap_err();
    assert!(
        reason.starts_with("messages wait, and none was applied for 10s or more; the last attempt: "),
        "{reason}"
    );
    assert!(reason.contains("55P03"), "{reason}");
    // Over several more attempts, and as many new subscriptions.
    let healthy = running.status.wait_for(|status| status.applying.is_ok());
    tokio::time::timeout(Duration::from_secs(8), healthy).await.unwrap_err();

    sqlx::raw_sql("ROLLBACK").execute(&mut locker).await.unwrap();
    let healthy = running.status.wait_for(|status| status.waiting().is_empty());
    tokio::time::timeout(DEADLINE, healthy).await.unwrap().unwrap();
    world.until_version("a", 1).await;
    running.stop().await;
}
