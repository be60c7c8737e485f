//! The primary is lost, and its synchronous standby takes over behind the same address.

use devstack::ports;
use sqlx::{Connection, Executor, PgConnection};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::{
    field::{Field, UNSTORED, WHILE},
    stack::eventually,
};

/// Nothing that was committed is lost, nothing was published that is, and positions go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: make test-faults"]
async fn a_synchronous_standby_is_promoted() {
    let mut field = Field::new("faults_standby").await;
    let mut standby = field.servers.postgres.standby(&field.folder, ports::free()).await.unwrap();
    standby.start().await.unwrap();
    let admin = &field.stack.admin;
    eventually("the standby follows", async || {
        let sql = "SELECT EXISTS (SELECT FROM pg_stat_replication WHERE state = 'streaming')";
        sqlx::query_scalar::<_, bool>(sql).fetch_one(admin).await.unwrap().then_some(())
    })
    .await;
    admin.execute("ALTER SYSTEM SET synchronous_standby_names = '*'").await.unwrap();
    admin.execute("SELECT pg_reload_conf()").await.unwrap();
    eventually("the standby is synchronous", async || {
        let sql = "SELECT EXISTS (SELECT FROM pg_stat_replication WHERE sync_state = 'sync')";
        sqlx::query_scalar::<_, bool>(sql).fetch_one(admin).await.unwrap().then_some(())
    })
    .await;
    for _ in 0..2 {
        field.add(&mut field.run()).await;
    }

    let fault = "the standby promoted";
    let load = field.load();
    sleep(3 * WHILE).await;
    field.servers.postgres.kill().await;
    field.says(fault, "the database does not answer").await;
    // As when an address moves before the standby knows that it is the primary.
    field.database.switch(&standby.url());
    field.says(fault, "in recovery").await;
    let mut conn = PgConnection::connect(&format!("{}/postgres", standby.url())).await.unwrap();
    conn.execute("SELECT pg_promote()").await.unwrap();
    conn.close().await.unwrap();
    sleep(3 * WHILE).await;
    load.stop().await;
    field.whole(fault, UNSTORED).await;
    standby.process().unwrap().check().unwrap();

    for relay in &mut field.relays {
        assert!(relay.terminate().await.success());
    }
    field.relays.clear();
    standby.stop(&CancellationToken::new()).await;
    field.end().await;
}
