//! Erasure takes the content of events and leaves their places, over real PostgreSQL.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use outbox::{Ended, erase, install};
use sqlx::{Executor, PgPool};

async fn database() -> PgPool {
    let pool = PgPool::connect(&devstack::testing::database("erasure").await).await.unwrap();
    install(&mut pool.acquire().await.unwrap(), "test").await.unwrap();
    // Two partitions and the net: positions 1, 2, 1000001, 1000002, …, and one beyond the last partition.
    for statement in [
        "SELECT outbox.add_partition(1000)",
        r#"INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers)
           VALUES ('thing', 'a', 1, 'thing.new', '{"id":"a","name":"Ada"}', '{"traceparent":"00-1-2-03"}'),
                  ('thing', 'b', 1, 'thing.new', '{"id":"b","name":"Grace"}', NULL)"#,
        "SELECT setval('outbox.position', 1000000)",
        r#"INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers)
           VALUES ('thing', 'a', 2, 'part.new', '{"id":"a-2","name":"Ada\u0000"}', '{"baseline":true,"who":"Ada"}'),
                  ('other', 'a', 1, 'other.new', '{"id":"a","name":"Grace"}', NULL)"#,
        "SELECT setval('outbox.position', 2000000)",
        r#"INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
           VALUES ('thing', 'a', 3, 'part.new', '{"id":"a-3","name":"Ada"}'),
                  ('thing', 'a', 4, 'part.new', '["Ada"]'),
                  ('thing', 'a', 5, 'thing.deleted', '{"id":"a"}')"#,
        "INSERT INTO outbox.relay (name) VALUES ('default')",
        COPY,
    ] {
        pool.execute(statement).await.unwrap();
    }
    pool
}

/// Sets everything aside.
const COPY: &str = "
INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, payload, headers,
                           created_at, reason, detail)
SELECT 'default', position, id, aggregate_type, aggregate_id, version, type, payload, headers, created_at,
       'unroutable', 'no queue takes it'
FROM outbox.event";

async fn rows(pool: &PgPool) -> String {
    sqlx::query_scalar(
        "SELECT string_agg(concat_ws(' ', row, position, aggregate_type || '/' || aggregate_id, version, type,
                                     payload, headers), E'\n' ORDER BY row, position)
         FROM (SELECT 'event ' AS row, position, aggregate_type, aggregate_id, version, type, payload, headers
               FROM outbox.event
               UNION ALL
               SELECT 'parked', position, aggregate_type, aggregate_id, version, type, payload, headers
               FROM outbox.parked) AS every",
    )
    .fetch_one(pool)
    .await
    .unwrap()
}

fn ended() -> [Ended; 1] {
    [Ended { aggregate_type: "thing".into(), aggregate_id: "a".to_owned(), version: 5 }]
}

#[tokio::test]
async fn content_goes_and_places_stay_in_every_partition_and_what_is_set_aside() {
    let pool = database().await;
    let mut tx = pool.begin().await.unwrap();
    assert_eq!(erase(&mut tx, &ended()).await.unwrap(), 4);
    assert_eq!(erase(&mut tx, &ended()).await.unwrap(), 0, "again it has nothing to do");
    tx.commit().await.unwrap();
    insta::assert_snapshot!(rows(&pool).await);
}

#[tokio::test]
async fn a_copy_that_is_being_made_is_waited_for_and_erased() {
    let pool = database().await;
    pool.execute("DELETE FROM outbox.parked").await.unwrap();
    let mut relay = pool.begin().await.unwrap();
    relay.execute("SELECT pg_advisory_xact_lock(1869968482, 3)").await.unwrap();
    relay.execute(COPY).await.unwrap();

    let erasing = tokio::spawn({
        let pool = pool.clone();
        async move {
            let mut tx = pool.begin().await.unwrap();
            erase(&mut tx, &ended()).await.unwrap();
            tx.commit().await.unwrap();
        }
    });
    let waits = "SELECT EXISTS (SELECT FROM pg_locks JOIN pg_database d ON d.oid = database
                                WHERE d.datname = current_database() AND locktype = 'advisory' AND objid = 3
                                  AND NOT granted)";
    while !erasing.is_finished() && !sqlx::query_scalar::<_, bool>(waits).fetch_one(&pool).await.unwrap() {
        tokio::task::yield_now().await;
    }
    relay.commit().await.unwrap();
    erasing.await.unwrap();
    let traces =
        "SELECT count(*) FROM outbox.parked WHERE payload::text LIKE '%Ada%' OR headers::text LIKE '%Ada%'";
    assert_eq!(sqlx::query_scalar::<_, i64>(traces).fetch_one(&pool).await.unwrap(), 0);
}
