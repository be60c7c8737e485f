//! The database is stopped, killed, full, locked, or forgets what it had committed.

use sqlx::Executor;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::field::{Field, UNSTORED, WHILE};

const APPEND: &str = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                      VALUES ('thing', 'idle', $1, 'thing.changed', '{}')";

/// Two relays; whatever is done to the database, one after the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: make test-faults"]
async fn the_database() {
    let mut field = Field::new("faults_database").await;
    for _ in 0..2 {
        field.add(&mut field.run()).await;
    }

    // Beginning with those that no restart of the server would end: a transaction that has appended and
    // does nothing more, and one that is prepared. Both are there all the time.
    let fault = "an idle appender and a prepared one";
    let mut prepared = field.stack.admin.acquire().await.unwrap();
    prepared.execute("BEGIN").await.unwrap();
    sqlx::query(APPEND).bind(1_i64).execute(&mut *prepared).await.unwrap();
    prepared.execute("PREPARE TRANSACTION 'forgotten'").await.unwrap();
    let mut idle = field.stack.writer.acquire().await.unwrap();
    idle.execute("SET idle_in_transaction_session_timeout = 0; BEGIN").await.unwrap();
    let other = APPEND.replace("'idle'", "'idler'");
    sqlx::query(sqlx::AssertSqlSafe(other)).bind(1_i64).execute(&mut *idle).await.unwrap();
    let load = field.load();
    sleep(10 * WHILE).await;
    load.stop().await;
    field.whole(fault, 0).await;
    idle.execute("COMMIT").await.unwrap();
    drop(idle);
    field.whole(fault, 0).await;

    let fault = "PostgreSQL stopped (fast) and started";
    let load = field.load();
    sleep(WHILE).await;
    field.servers.postgres.stop(&CancellationToken::new()).await;
    field.says(fault, "the database does not answer").await;
    field.servers.postgres.start().await.unwrap();
    sleep(WHILE).await;
    load.stop().await;
    field.whole(fault, UNSTORED).await;

    // What was prepared outlives its server, and is published when it is committed.
    let fault = "the prepared transaction committed";
    drop(prepared);
    field.stack.admin.execute("COMMIT PREPARED 'forgotten'").await.unwrap();
    field.whole(fault, UNSTORED).await;

    let fault = "PostgreSQL stopped (immediate) and started";
    let load = field.load();
    sleep(WHILE).await;
    field.servers.postgres.abort().await;
    field.says(fault, "the database does not answer").await;
    field.servers.postgres.start().await.unwrap();
    sleep(WHILE).await;
    load.stop().await;
    field.whole(fault, UNSTORED).await;

    let fault = "all sessions of the relays terminated";
    let load = field.load();
    for _ in 0..3 {
        sleep(WHILE).await;
        field.end_sessions().await;
    }
    sleep(WHILE).await;
    load.stop().await;
    field.whole(fault, 3 * UNSTORED).await;

    let fault = "connections exhausted";
    let load = field.load();
    sleep(WHILE).await;
    let limit = async |field: &Field, limit: i32| {
        let database = "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I CONNECTION LIMIT ";
        let sql = format!("{database}{limit}', current_database()); END $$");
        field.stack.admin.execute(sqlx::AssertSqlSafe(sql)).await.unwrap();
    };
    limit(&field, 1).await;
    field.end_sessions().await;
    field.says(fault, "no connection is left").await;
    limit(&field, -1).await;
    sleep(WHILE).await;
    load.stop().await;
    field.whole(fault, UNSTORED).await;

    let fault = "a lock on a partition";
    let load = field.load();
    sleep(WHILE).await;
    let mut locker = field.stack.admin.acquire().await.unwrap();
    locker.execute("BEGIN; LOCK TABLE outbox.event IN ACCESS EXCLUSIVE MODE").await.unwrap();
    field.says(fault, "longer than statement_timeout").await;
    locker.execute("ROLLBACK").await.unwrap();
    drop(locker);
    sleep(WHILE).await;
    load.stop().await;
    field.whole(fault, UNSTORED).await;

    // The server takes back what it had committed, and hands out the same positions again. Nobody but the
    // relay itself makes it keep anything: what it publishes without having done so is seen.
    for sql in ["ALTER SYSTEM SET wal_writer_delay = '10s'", "SELECT pg_reload_conf()"] {
        field.stack.admin.execute(sql).await.unwrap();
    }
    for round in 1..=8 {
        let fault = format!("PostgreSQL killed with synchronous_commit=off, {round}");
        let load = field.load_with("off");
        sleep(WHILE).await;
        field.servers.postgres.kill().await;
        field.servers.postgres.start().await.unwrap();
        sleep(WHILE).await;
        load.stop().await;
        field.whole(&fault, UNSTORED).await;
    }
    field.end().await;
}

impl Field {
    /// Ends every session of the relays' role.
    async fn end_sessions(&self) {
        let url: sqlx::postgres::PgConnectOptions = self.stack.database_url.parse().unwrap();
        let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1";
        sqlx::query(end).bind(url.get_username()).execute(&self.stack.admin).await.unwrap();
    }
}
