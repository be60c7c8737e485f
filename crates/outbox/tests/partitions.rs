//! Partitions come ahead of the writers and go when nobody needs them, over real PostgreSQL.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use outbox::install;
use sqlx::{AssertSqlSafe, Executor, PgPool};

async fn database() -> PgPool {
    let pool = PgPool::connect(&devstack::testing::database("partitions").await).await.unwrap();
    install(&mut pool.acquire().await.unwrap(), "test").await.unwrap();
    pool
}

const APPEND: &str = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                      VALUES ('thing', 'a', $1, 'thing.changed', '{}') RETURNING tableoid::regclass::text";

/// Of another aggregate: one writer does not wait for the other.
const APPEND_ANOTHER: &str = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                              VALUES ('thing', 'another', 1, 'thing.new', '{}')";

/// Appends, and says where the event went.
async fn append(pool: &PgPool, version: i64) -> String {
    sqlx::query_scalar(APPEND).bind(version).fetch_one(pool).await.unwrap()
}

async fn partitions(pool: &PgPool) -> String {
    let sql =
        "SELECT string_agg(format('%s: %s to %s', name, coalesce(lower::text, '…'), coalesce(upper::text, '…')), E'\n' ORDER BY upper NULLS FIRST)
               FROM outbox.partition";
    sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
}

/// Why `event_1` is kept; "retired" when it was not.
async fn retire(pool: &PgPool, without_baseline: bool) -> String {
    let retired = sqlx::query("SELECT outbox.retire_partition('event_1', now() - interval '1 day', $1)");
    match retired.bind(without_baseline).execute(pool).await {
        Ok(_) => "retired".to_owned(),
        Err(error) => error.as_database_error().unwrap().message().to_owned(),
    }
}

#[tokio::test]
async fn a_partition_is_added_under_open_writers_and_readers() {
    let pool = database().await;
    let mut writer = pool.begin().await.unwrap();
    writer.execute(APPEND_ANOTHER).await.unwrap();
    let mut reader = pool.begin().await.unwrap();
    reader.execute("SELECT count(*) FROM outbox.event_1").await.unwrap();

    pool.execute("SELECT outbox.add_partition(1000)").await.unwrap();
    pool.execute("SELECT setval('outbox.position', 1000000)").await.unwrap();
    assert_eq!(append(&pool, 1).await, "outbox.event_2");
    writer.commit().await.unwrap();
    reader.commit().await.unwrap();
    insta::assert_snapshot!(partitions(&pool).await, @r"
    event_default: … to …
    event_1: … to 1000001
    event_2: 1000001 to 1001001
    ");
    // With all that the first one has.
    let shape = "SELECT string_agg(format('%s %s', replace(pg_get_indexdef(indexrelid), $1, 'PARTITION'), indisvalid), E'\n'
                                   ORDER BY pg_get_indexdef(indexrelid))
                 FROM pg_index WHERE indrelid = ('outbox.' || $1)::regclass";
    let shape =
        async |name| sqlx::query_scalar::<_, String>(shape).bind(name).fetch_one(&pool).await.unwrap();
    assert_eq!(shape("event_1").await, shape("event_2").await);
    let checks =
        "SELECT count(*) FROM pg_constraint WHERE contype = 'c' AND conrelid = ('outbox.' || $1)::regclass";
    let checks = async |name| sqlx::query_scalar::<_, i64>(checks).bind(name).fetch_one(&pool).await.unwrap();
    assert_eq!(checks("event_1").await, checks("event_2").await);

    // A lock that somebody keeps is given up soon, and nothing is left half-done.
    let mut locked = pool.begin().await.unwrap();
    locked.execute("LOCK TABLE outbox.event_default IN ACCESS SHARE MODE").await.unwrap();
    let error = pool.execute("SELECT outbox.add_partition(1000)").await.unwrap_err();
    assert_eq!(error.as_database_error().unwrap().code().unwrap(), "55P03");
    locked.rollback().await.unwrap();
    // The error was told before its transaction had quite ended, and until then somebody is at it.
    let mut added: Option<String> = None;
    for _ in 0..500 {
        added = sqlx::query_scalar("SELECT outbox.add_partition(1000)").fetch_one(&pool).await.unwrap();
        if added.is_some() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(added.as_deref(), Some("event_3"));
}

#[tokio::test]
async fn what_fell_into_the_net_stays_there_and_the_next_partition_begins_above() {
    let pool = database().await;
    pool.execute("SELECT setval('outbox.position', 1000000)").await.unwrap();
    assert_eq!(append(&pool, 1).await, "outbox.event_default");
    pool.execute("SELECT outbox.add_partition(1000)").await.unwrap();
    assert_eq!(append(&pool, 2).await, "outbox.event_default");
    insta::assert_snapshot!(partitions(&pool).await, @r"
    event_default: … to …
    event_1: … to 1000001
    event_2: 1001001 to 1002001
    ");
    pool.execute("SELECT setval('outbox.position', 1001000)").await.unwrap();
    assert_eq!(append(&pool, 3).await, "outbox.event_2");
    // The net is emptied like any other.
    pool.execute("INSERT INTO outbox.relay (name, low_water, high) VALUES ('default', 1001001, 1001001)")
        .await
        .unwrap();
    let retire = "SELECT outbox.retire_partition('event_default', now() + interval '1 day', true)";
    pool.execute(retire).await.unwrap();
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM outbox.event").fetch_one(&pool).await.unwrap();
    assert_eq!(left, 1);
}

/// Every reason to keep a partition, each taken away in its turn.
#[tokio::test]
async fn a_partition_is_retired_when_nobody_needs_it() {
    let pool = database().await;
    append(&pool, 1).await;
    pool.execute("SELECT outbox.add_partition(1000)").await.unwrap();
    let mut said = vec![("nothing else was done", retire(&pool, false).await)];
    for (step, sql) in [
        ("the next one is in use", "SELECT setval('outbox.position', 1000000)"),
        ("a relay", "INSERT INTO outbox.relay (name) VALUES ('default'), ('other')"),
        ("one has settled", "UPDATE outbox.relay SET low_water = 1000000, high = 1000000 WHERE name = 'default'"),
        (
            "both have, and one set it aside",
            "UPDATE outbox.relay SET low_water = 1000000, high = 1000000;
             INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, payload, created_at, reason, detail)
             SELECT 'default', position, id, aggregate_type, aggregate_id, version, type, payload, created_at, 'unroutable', 'x' FROM outbox.event",
        ),
        (
            "it is replayed",
            "DELETE FROM outbox.parked;
             INSERT INTO outbox.replay (id, next_position, to_position, target, started_by)
             VALUES ('00000000-0000-7000-8000-000000000000', 1, 10, 'queue', 'somebody')",
        ),
        ("the replay died", "UPDATE outbox.replay SET heartbeat_at = now() - interval '2 minutes'"),
        (
            // What a writer says of its events' age tells nothing: one of 2019, imported, is at the end.
            "its writers say that it is old",
            "UPDATE outbox.event SET created_at = '2019-01-01Z'",
        ),
        ("it is old", "SELECT outbox.why_kept('event_1', 'infinity', true);
                       UPDATE outbox.partition_age SET full_since = now() - interval '2 days'"),
    ] {
        pool.execute(sql).await.unwrap();
        said.push((step, retire(&pool, false).await));
    }
    let said: Vec<String> = said
        .into_iter()
        .map(|(step, answer)| format!("{step}: {}", answer.split(" since 20").next().unwrap()))
        .collect();
    let said = said.join("\n");
    insta::assert_snapshot!(said);

    // A newer event does not tell the whole state, a baseline does.
    append(&pool, 2).await;
    assert!(retire(&pool, false).await.contains("neither a baseline"));
    let baseline = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers)
                    VALUES ('thing', 'a', 3, 'thing.baseline', '{}', '{\"baseline\": true}')";
    pool.execute(baseline).await.unwrap();
    assert_eq!(retire(&pool, false).await, "retired");
    assert_eq!(retire(&pool, false).await, "event_1 is kept: it is empty");
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM outbox.event").fetch_one(&pool).await.unwrap();
    assert_eq!(left, 2);

    // An empty one can go, one that holds something cannot.
    let drop = async |name| {
        let dropped = pool.execute(AssertSqlSafe(format!("SELECT outbox.drop_partition('{name}')"))).await;
        dropped.map_or_else(|e| e.as_database_error().unwrap().message().to_owned(), |_| "dropped".to_owned())
    };
    assert_eq!(drop("event_2").await, "event_2 was not retired");
    assert_eq!(drop("event_default").await, "event_default is no partition that could be dropped");
    assert_eq!(drop("event_1").await, "dropped");
    assert_eq!(append(&pool, 4).await, "outbox.event_2");
}

/// Whose last word is that they are gone need no baseline; and it can be given up on.
#[tokio::test]
async fn deleted_aggregates_need_no_baseline() {
    let pool = database().await;
    append(&pool, 1).await;
    let deleted = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                   VALUES ('thing', 'a', 2, 'thing.deleted', '{}'), ('thing', 'b', 1, 'thing.new', '{}')";
    pool.execute(deleted).await.unwrap();
    pool.execute(
        "SELECT outbox.add_partition(1000);
         SELECT setval('outbox.position', 1000000);
         SELECT outbox.why_kept('event_1', 'infinity', true);
         UPDATE outbox.partition_age SET full_since = now() - interval '2 days';
         INSERT INTO outbox.relay (name, low_water, high) VALUES ('default', 1000000, 1000000)",
    )
    .await
    .unwrap();
    assert!(retire(&pool, false).await.contains("of thing/b, for one"));
    assert_eq!(retire(&pool, true).await, "retired");
}
