//! Retention over a long history looks at a bounded number of blocks, over real PostgreSQL.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use outbox::install;
use serde_json::Value;
use sqlx::{AssertSqlSafe, Executor, PgPool};

/// 20,000 events of 10,000 aggregates in five partitions, of which the first is the oldest; above them a baseline of each.
async fn database() -> PgPool {
    let pool = PgPool::connect(&devstack::testing::database("history").await).await.unwrap();
    install(&mut pool.acquire().await.unwrap(), "test").await.unwrap();
    pool.execute(
        "ALTER TABLE outbox.event DETACH PARTITION outbox.event_1;
         ALTER TABLE outbox.event ATTACH PARTITION outbox.event_1 FOR VALUES FROM (MINVALUE) TO (4001);
         SELECT outbox.add_partition(4000), outbox.add_partition(4000), outbox.add_partition(4000),
                outbox.add_partition(4000), outbox.add_partition(10001);
         INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
         SELECT 'thing', 'a' || n % 10000, n / 10000 + 1, 'thing.changed', '{}' FROM generate_series(0, 19999) n ORDER BY n;
         INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers)
         SELECT 'thing', 'a' || n, 3, 'thing.baseline', '{}', '{\"baseline\": true}' FROM generate_series(0, 9999) n;
         SELECT outbox.why_kept(name, '-infinity', true) FROM outbox.partition;
         UPDATE outbox.partition_age SET full_since = now() - interval '2 days';
         INSERT INTO outbox.relay (name, low_water, high) VALUES ('default', 30000, 30000)",
    )
    .await
    .unwrap();
    pool.execute("VACUUM ANALYZE outbox.event").await.unwrap();
    pool
}

/// Why `event_1` is kept, and how many blocks it took to find out.
async fn why_kept(pool: &PgPool) -> (Option<String>, i64) {
    const ASK: &str = "SELECT outbox.why_kept('event_1', now() - interval '1 day', false)";
    // The first look of a session reads the catalog, and so does one after an autovacuum: the cheapest of some counts.
    let mut conn = pool.acquire().await.unwrap();
    let reason = sqlx::query_scalar(ASK).fetch_one(&mut *conn).await.unwrap();
    let mut least = i64::MAX;
    for _ in 0..5 {
        let explain = AssertSqlSafe(format!("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {ASK}"));
        let plan: Value = sqlx::query_scalar(explain).fetch_one(&mut *conn).await.unwrap();
        let plan = &plan[0]["Plan"];
        let blocks = ["Shared Hit Blocks", "Shared Read Blocks"].map(|name| plan[name].as_i64().unwrap());
        least = least.min(blocks.iter().sum());
    }
    (reason, least)
}

#[tokio::test]
async fn baselines_of_all_are_found_in_one_pass() {
    let pool = database().await;
    let (reason, blocks) = why_kept(&pool).await;
    assert_eq!(reason, None);
    // For each of 4,000 aggregates a look into every partition above it was 71,690.
    assert!(blocks < 6_000, "{blocks} blocks");

    // The search ends with the first that keeps it, and begins with that next time.
    pool.execute(
        "UPDATE outbox.event SET headers = NULL WHERE aggregate_id IN ('a998', 'a999') AND version = 3",
    )
    .await
    .unwrap();
    let (reason, blocks) = why_kept(&pool).await;
    insta::assert_snapshot!(reason.unwrap(), @"of thing/a998, for one, there is neither a baseline nor its deletion above it: publish a baseline of each aggregate that has events in it, or give up its history (without baseline)");
    assert!(blocks < 300, "{blocks} blocks");

    // Once it has its baseline, the next one is named, and then nobody.
    let mend =
        "UPDATE outbox.event SET headers = '{\"baseline\": true}' WHERE version = 3 AND aggregate_id = ";
    pool.execute(AssertSqlSafe(format!("{mend} 'a998'"))).await.unwrap();
    assert!(why_kept(&pool).await.0.unwrap().starts_with("of thing/a999, for one"));
    pool.execute(AssertSqlSafe(format!("{mend} 'a999'"))).await.unwrap();
    assert_eq!(why_kept(&pool).await.0, None);
}

/// A partition from before the index has the same answer.
#[tokio::test]
async fn without_the_index_the_answer_is_the_same() {
    let pool = database().await;
    pool.execute("DROP INDEX outbox.event_3_whole_state, outbox.event_6_whole_state").await.unwrap();
    assert_eq!(why_kept(&pool).await.0, None);
    pool.execute("DELETE FROM outbox.event WHERE aggregate_id = 'a3000' AND version = 3").await.unwrap();
    assert!(why_kept(&pool).await.0.unwrap().starts_with("of thing/a3000, for one"));
    let missing: Vec<String> =
        sqlx::query_scalar("SELECT name FROM outbox.partition_without_index ORDER BY name")
            .fetch_all(&pool)
            .await
            .unwrap();
    assert_eq!(missing, ["event_3", "event_6"]);
}

/// All of a partition's aggregates are deleted in it: nothing is left to learn of them, unless a key is used again.
#[tokio::test]
async fn a_key_that_is_used_again_keeps_its_deletion() {
    let pool = database().await;
    pool.execute(
        "DELETE FROM outbox.event WHERE position > 4000;
         UPDATE outbox.event SET type = 'thing.deleted'",
    )
    .await
    .unwrap();
    assert_eq!(why_kept(&pool).await.0, None);
    pool.execute(
        "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
         VALUES ('thing', 'a17', 4, 'thing.new', '{}')",
    )
    .await
    .unwrap();
    assert!(why_kept(&pool).await.0.unwrap().starts_with("of thing/a17, for one"));
}
