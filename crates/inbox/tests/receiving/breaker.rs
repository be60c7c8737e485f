//! A handler that is broken stops consuming, and consuming goes on by itself when it is repaired.

use std::sync::atomic::Ordering;

use inbox::Config;
use sqlx::PgPool;

use crate::{
    consumer::{Running, World},
    support::{DEADLINE, Recorder, event, until},
};

async fn stopped(running: &mut Running) -> String {
    let waited = running
        .status
        .wait_for(|status| matches!(&status.consuming, Err(reason) if reason.contains("inbox.held")));
    let status = tokio::time::timeout(DEADLINE, waited).await.unwrap().unwrap();
    status.consuming.clone().unwrap_err()
}

async fn held(pool: &PgPool) -> i64 {
    sqlx::query_scalar("SELECT count(*) FROM inbox.held").fetch_one(pool).await.unwrap()
}

#[tokio::test]
async fn refused_in_a_row() {
    let world = World::new("row").await;
    let handler = Recorder::new("things");
    let start = || world.start_with(handler.clone(), |config| Config { max_refused: 5, ..config });
    let mut running = start();
    running.until_consuming().await;
    // One of them succeeds, so these are not in a row.
    for n in 0..4 {
        world.publish(event(&format!("bad {n}"), 1, "poison")).await;
    }
    world.publish(event("good", 1, "")).await;
    world.until_version("good", 1).await;
    running.stop().await;
    assert_eq!(held(&world.pool).await, 4);

    // All at once: in one batch.
    for n in 0..12 {
        world.publish(event(&format!("thing {n}"), 1, "broken")).await;
    }
    let mut running = start();
    insta::assert_snapshot!(stopped(&mut running).await, @"the handler refused 5 events in a row, the last with: the handler is broken; they are in inbox.held");
    assert_eq!(held(&world.pool).await, 4 + 5, "no more than it takes to know");
    until("the rest stays in the queue", async || world.messages("things").await == 7).await;

    // It tries by itself, and each try is counted.
    until("one is tried again", async || {
        let sql = "SELECT max(attempts) FROM inbox.held WHERE aggregate_id LIKE 'thing %'";
        sqlx::query_scalar::<_, i32>(sql).fetch_one(&world.pool).await.unwrap() > 1
    })
    .await;
    assert_eq!((held(&world.pool).await, world.messages("things").await), (9, 7));
    handler.passed.store(true, Ordering::Relaxed);
    running.until_consuming().await;
    until("the others are applied", async || world.applied().await.len() == 1 + 1 + 7).await;
    assert_eq!(held(&world.pool).await, 4 + 4, "what was refused is for somebody to redrive");
    running.stop().await;
}

#[tokio::test]
async fn too_many_held() {
    let world = World::new("bound").await;
    let handler = Recorder::new("things");
    let start = || world.start_with(handler.clone(), |config| Config { max_held: 5, ..config });
    let mut running = start();
    running.until_consuming().await;
    // A gap is filled from the queue alone, so it never stops consuming.
    for version in 2..=10 {
        world.publish(event("gap", version, "")).await;
    }
    world.publish(event("a", 1, "broken")).await;
    for version in 2..=5 {
        world.publish(event("a", version, "")).await;
    }
    until("14 are held", async || held(&world.pool).await == 14).await;
    running.stop().await;
    let mut running = start();
    running.until_consuming().await;

    world.publish(event("a", 6, "")).await;
    insta::assert_snapshot!(stopped(&mut running).await, @"more than 5 events were refused or wait behind one that was, the last with: the handler is broken; they are in inbox.held");
    running.stop().await;
    // Nor is anything consumed after a restart.
    world.publish(event("b", 1, "")).await;
    let mut running = start();
    stopped(&mut running).await;
    until("it stays in the queue", async || world.messages("things").await == 1).await;
    handler.passed.store(true, Ordering::Relaxed);
    world.until_version("b", 1).await;
    world.until_version("a", 6).await;
    running.until_consuming().await;
    running.stop().await;
}

/// However many events were refused, each try finds the next one by index; and once the cause is gone, they are applied many
/// at a time.
#[tokio::test]
async fn very_many_refused() {
    const REFUSED: i64 = 3_000;
    let world = World::new("refused").await;
    let handler = Recorder::new("things");
    sqlx::query(
        "WITH known AS (
             INSERT INTO inbox.aggregate (consumer, source, aggregate_type, aggregate_id)
             SELECT 'things', 'things', 'thing', 'a' || n FROM generate_series(1, $1) n RETURNING aggregate_id)
         INSERT INTO inbox.held (consumer, source, aggregate_type, aggregate_id, version, event_id, type, headers, payload,
                                 reason, error, attempts, first_at, last_at)
         SELECT 'things', 'things', 'thing', aggregate_id, 1, gen_random_uuid(), 'thing.changed', '{}', 'broken',
                'poison', 'the handler is broken', 1, now() - interval '1 hour', now() - interval '1 hour'
         FROM known",
    )
    .bind(REFUSED)
    .execute(&world.pool)
    .await
    .unwrap();
    sqlx::raw_sql("ANALYZE inbox.held; ANALYZE inbox.aggregate").execute(&world.pool).await.unwrap();
    let start = || world.start_with(handler.clone(), |config| Config { max_held: 5, ..config });
    let mut running = start();
    stopped(&mut running).await;
    until("some are tried again", async || {
        let sql = "SELECT count(*) >= 3 FROM inbox.held WHERE attempts > 1";
        sqlx::query_scalar(sql).fetch_one(&world.pool).await.unwrap()
    })
    .await;
    running.stop().await;
    let read = async |index: &str| -> i64 {
        sqlx::query_scalar(
            "SELECT coalesce(sum(idx_tup_read), 0)::bigint FROM pg_stat_user_indexes WHERE indexrelname = $1",
        )
        .bind(index)
        .fetch_one(&world.pool)
        .await
        .unwrap()
    };
    until("the statistics are there", async || read("held_retry").await > 0).await;
    assert!(read("held_retry").await < 1_000, "{} rows for a few tries", read("held_retry").await);

    handler.passed.store(true, Ordering::Relaxed);
    let calls = handler.calls.load(Ordering::Relaxed);
    let mut running = start();
    until("few are left", async || held(&world.pool).await <= 5).await;
    running.until_consuming().await;
    running.stop().await;
    let transactions: i64 =
        sqlx::query_scalar("SELECT count(DISTINCT xmin::text) FROM inbox.aggregate WHERE version = 1")
            .fetch_one(&world.pool)
            .await
            .unwrap();
    assert!(transactions < REFUSED / 20, "{transactions} transactions");
    assert!(handler.calls.load(Ordering::Relaxed) > calls);
}
