//! A handler that is broken stops consuming, and consuming goes on by itself when it is repaired.

use std::sync::atomic::Ordering;

use inbox::Config;
use sqlx::PgPool;

use crate::{
    consumer::{Running, World},
    support::{Recorder, event, until},
};

async fn stopped(running: &mut Running) -> String {
    let waited = running
        .status
        .wait_for(|status| matches!(&status.consuming, Err(reason) if reason.contains("inbox.held")));
    let status = tokio::time::timeout(std::time::Duration::from_secs(30), waited).await.unwrap().unwrap();
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
