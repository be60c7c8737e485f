//! What somebody should look at, while work goes on.

use std::time::Duration;

use inbox::{Config, Status};
use lapin::options::QueueDeleteOptions;

use crate::{
    consumer::{Running, World},
    support::{DEADLINE, Recorder, event, forked, until},
};

async fn says(running: &mut Running, what: impl FnMut(&Status) -> bool) -> Status {
    let waited = running.status.wait_for(what);
    tokio::time::timeout(DEADLINE, waited).await.unwrap().unwrap().clone()
}

#[tokio::test]
async fn a_queue_that_was_lost_is_told_of() {
    let world = World::new("lost_queue").await;
    let mut running = world.start(Recorder::new("things"));
    running.until_consuming().await;
    assert_eq!(running.status.borrow().queue, None, "the first queue is new, and nothing was lost");
    world.publish(event("a", 1, "")).await;
    world.publish(event("b", 1, "")).await;
    until("both are applied", async || {
        let applied = sqlx::query_scalar::<_, i64>("SELECT count(*) FROM applied");
        applied.fetch_one(&world.pool).await.unwrap() == 2
    })
    .await;
    running.stop().await;

    let mut running = world.start(Recorder::new("things"));
    running.until_consuming().await;
    assert_eq!(running.status.borrow().queue, None, "the queue was there");
    // As when the broker lost its data.
    world.channel.queue_delete("things".into(), QueueDeleteOptions::default()).await.unwrap();
    let status = says(&mut running, |status| status.queue.is_some() && status.consuming.is_ok()).await;
    assert_eq!(status.waiting(), Vec::<String>::new(), "work goes on");
    insta::assert_snapshot!(status.queue.unwrap());
    running.stop().await;
}

#[tokio::test]
async fn holes_and_forks_are_named_with_what_to_do() {
    let world = World::new("alarms").await;
    let mut running =
        world.start_with(Recorder::new("things"), |config| Config { hole_after: Duration::ZERO, ..config });
    running.until_consuming().await;
    world.publish(event("a", 1, "")).await;
    world.publish(event("a", 3, "")).await;
    for (aggregate, version) in [("b", 5), ("c", 2), ("d", 2), ("e", 2)] {
        world.publish(event(aggregate, version, "")).await;
    }
    // Poison is no hole, nor is what waits behind it.
    world.publish(event("f", 1, "poison")).await;
    world.publish(event("f", 2, "")).await;
    world.publish(forked(event("a", 1, "other"), "a", 1, 0)).await;
    let status = says(&mut running, |status| {
        status.forks.is_some() && status.holes.as_ref().is_some_and(|holes| holes.contains("2 others"))
    })
    .await;
    assert_eq!(status.consuming, Ok(()), "work goes on");
    insta::assert_snapshot!(status.holes.unwrap(), @"versions are missing, and later ones wait for them: thing/a of things lacks version 2; thing/b of things lacks versions 1 to 4; thing/c of things lacks version 1; and 2 others. Have the source replay the aggregate thing/a to the queue things, or publish a baseline of it");
    insta::assert_snapshot!(status.forks.unwrap(), @"events contradict what was applied: thing/a of things at version 1. Was a backup restored, or a failover made, without a new incarnation of the source? They are stored in inbox.rejected and not applied");

    for (aggregate, version) in [("a", 2), ("c", 1), ("d", 1), ("e", 1)] {
        world.publish(event(aggregate, version, "")).await;
    }
    for version in 1..=4 {
        world.publish(event("b", version, "")).await;
    }
    says(&mut running, |status| status.holes.is_none()).await;
    running.stop().await;
}
