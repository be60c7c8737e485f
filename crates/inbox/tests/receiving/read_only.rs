//! A database that takes no writes is nobody's fault: nothing is rejected, and no delivery is used up.

use sqlx::{AssertSqlSafe, Executor, PgConnection};

use crate::{
    consumer::World,
    support::{DEADLINE, Recorder, event, until},
};

/// Sets whether new transactions may only read, and ends the sessions of before.
async fn set_read_only(world: &World, value: &str) {
    let options = world.pool.connect_options();
    let database = options.get_database().unwrap().to_owned();
    let server = std::env::var(devstack::testing::POSTGRES_URL).unwrap();
    let mut conn = <PgConnection as sqlx::Connection>::connect(&format!("{server}/postgres")).await.unwrap();
    let set = format!("ALTER DATABASE {database} SET default_transaction_read_only = {value}");
    conn.execute(AssertSqlSafe(set)).await.unwrap();
    sqlx::query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1 AND pid <> pg_backend_pid()")
        .bind(database)
        .execute(&mut conn)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_database_that_takes_no_writes_costs_no_message_anything() {
    let world = World::new("read_only").await;
    let mut running = world.start(Recorder::new("things"));
    running.until_consuming().await;
    world.publish(event("a", 1, "1")).await;
    world.until_version("a", 1).await;

    set_read_only(&world, "on").await;
    for version in 2..=5 {
        world.publish(event("a", version, "1")).await;
    }
    // What would be rejected is not, either.
    let mut malformed = event("a", 6, "1");
    malformed.properties = malformed.properties.with_message_id("none".into());
    world.publish(malformed).await;
    let says =
        |status: &inbox::Status| status.database.as_ref().is_err_and(|why| why.contains("takes no writes"));
    let waited = running.status.wait_for(says);
    tokio::time::timeout(DEADLINE, waited).await.unwrap().unwrap();
    // Whoever consumes nothing uses up nothing.
    until("nobody consumes", async || world.consumers("things").await == Some(0)).await;
    assert!(says(&running.status.borrow()), "{:?}", running.status.borrow());

    set_read_only(&world, "off").await;
    // The pool meets the sessions that were ended.
    until("it is applied", async || {
        let applied = sqlx::query_scalar("SELECT count(*) FROM applied").fetch_one(&world.pool).await;
        applied.is_ok_and(|count: i64| count == 5)
    })
    .await;
    until("what is no event is rejected", async || {
        let rejected =
            sqlx::query_as("SELECT reason, times FROM inbox.rejected").fetch_all(&world.pool).await;
        rejected.is_ok_and(|rows: Vec<(String, i64)>| rows == [("malformed".to_owned(), 1)])
    })
    .await;
    assert_eq!(world.messages("things.dead").await, 0);
    running.stop().await;
}
