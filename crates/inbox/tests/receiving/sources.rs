//! Nobody can forge an event: a consumer that names its sources believes their users alone.

use std::sync::atomic::Ordering;

use inbox::{Config, Outcome, Sequencer, Status};

use crate::{
    consumer::{Running, World},
    support::{DEADLINE, Recorder, database, event, from, in_incarnation, sources, typed, until},
};

async fn says(running: &mut Running, what: impl FnMut(&Status) -> bool) -> Status {
    let waited = running.status.wait_for(what);
    tokio::time::timeout(DEADLINE, waited).await.unwrap().unwrap().clone()
}

/// What an attacker may send who may write to the exchange, beside the genuine events.
#[tokio::test]
async fn what_is_forged_changes_nothing() {
    let pool = database("forged").await;
    let sequencer = Sequencer::new("forged", pool.clone(), Recorder::new("forged")).following(sources(&[
        "things=relay",
        "things=relay_new",
        "others=other_relay",
    ]));
    let mut no_event = event("a", 1, "");
    no_event.properties = no_event.properties.with_message_id("none".into());
    let messages = [
        from(event("a", 1, "1"), "things", "relay"),
        // Of the user after a rename.
        from(event("a", 2, "10"), "things", "relay_new"),
        // The next version, a baseline, an end, and what would be held; by a stranger and by another relay.
        from(event("a", 3, "forged"), "things", "intruder"),
        from(typed("thing.baseline", "a", 9, "forged", &["baseline"]), "things", "other_relay"),
        from(typed("thing.deleted", "a", 9, "forged", &[]), "things~2", "intruder"),
        from(event("new", 5, "forged"), "others", "relay"),
        event("a", 3, "without a user"),
        // Sources that nobody follows, well formed, too early, and no event at all.
        from(event("a", 3, "poison"), "thing", "relay"),
        from(event("gap", 5, ""), "strangers", "stranger"),
        from(event("gap", 5, ""), "strangers", "stranger"),
        from(no_event.clone(), "strangers~7", "stranger"),
        // Of a followed source, so it is looked into.
        from(no_event, "things", "relay"),
        from(event("a", 3, "1000"), "things", "relay"),
        // Of a new incarnation.
        from(in_incarnation(event("b", 1, "100"), 2, Some(1)), "things~2", "relay"),
    ];
    let outcome = sequencer.apply(&messages).await.unwrap();
    let expected = Outcome { applied: 4, foreign: 4, wrong_user: 5, rejected: 1, ..Outcome::default() };
    assert_eq!(outcome, expected);
    let state: Vec<(String, i64)> =
        sqlx::query_as("SELECT aggregate, sum FROM state ORDER BY aggregate").fetch_all(&pool).await.unwrap();
    assert_eq!(state, [("a".to_owned(), 1_011), ("b".to_owned(), 100)]);
    let chains: Vec<(String, String, i64)> =
        sqlx::query_as("SELECT source, aggregate_id, version FROM inbox.aggregate ORDER BY source")
            .fetch_all(&pool)
            .await
            .unwrap();
    let chain = |source: &str, id: &str, version| (source.to_owned(), id.to_owned(), version);
    assert_eq!(chains, [chain("things", "a", 3), chain("things~2", "b", 1)], "none of a stranger's");
    let held = "SELECT count(*) FROM inbox.held";
    assert_eq!(sqlx::query_scalar::<_, i64>(held).fetch_one(&pool).await.unwrap(), 0);
    let rejected: Vec<(String, i64)> =
        sqlx::query_as("SELECT reason, sum(times)::bigint FROM inbox.rejected GROUP BY 1 ORDER BY 1")
            .fetch_all(&pool)
            .await
            .unwrap();
    let expected = [("foreign", 4), ("malformed", 1), ("wrong-user", 5)];
    assert_eq!(rejected, expected.map(|(reason, times)| (reason.to_owned(), times)));
}

async fn count(world: &World, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(&world.pool).await.unwrap()
}

/// Many more poison messages than the breaker lets through, and as many that would be held.
#[tokio::test]
async fn strangers_stop_nobody() {
    let world = World::new("strangers").await;
    let followed = || sources(&[&format!("things={}", world.user())]);
    // What was held of a source before anybody said that it is not followed.
    let before = Sequencer::new("things", world.pool.clone(), Recorder::new("things"));
    before.apply(&[from(event("before", 1, "poison"), "strangers", "stranger")]).await.unwrap();
    before.apply(&[from(event("before", 2, ""), "strangers", "stranger")]).await.unwrap();

    let limits = |config| Config { max_refused: 3, max_held: 1, ..config };
    let mut running = world.start_following(followed(), Recorder::new("things"), limits);
    running.until_consuming().await;
    for n in 0..25 {
        world.publish(from(event(&format!("bad {n}"), 1, "poison"), "strangers", world.user())).await;
        world.publish(from(event(&format!("gap {n}"), 2, ""), "strangers", world.user())).await;
    }
    world.publish(from(event("good", 1, ""), "things", world.user())).await;
    world.until_version("good", 1).await;
    assert!(running.status.borrow().waiting().is_empty());
    running.stop().await;
    assert_eq!(
        count(&world, "SELECT sum(times)::bigint FROM inbox.rejected WHERE reason = 'foreign'").await,
        50
    );
    assert_eq!(count(&world, "SELECT count(*) FROM inbox.held").await, 2, "those of before");
    assert_eq!(count(&world, "SELECT count(*) FROM inbox.aggregate").await, 2, "that of before, and `good`");
}

/// The handler refuses everything of one source, and the other's events go on; then it refuses both.
#[tokio::test]
async fn one_source_does_not_stop_another() {
    let world = World::new("two").await;
    let user = world.user().to_owned();
    let handler = Recorder::new("things");
    let followed = sources(&[&format!("one={user}"), &format!("two={user}")]);
    let limits = |config| Config { max_refused: 3, ..config };
    let mut running = world.start_following(followed, handler.clone(), limits);
    running.until_consuming().await;
    for n in 0..10 {
        world.publish(from(event(&format!("bad {n}"), 1, "broken"), "one", &user)).await;
    }
    // Of the other nothing has come yet, and then it is the last to come.
    world.publish(from(event("good", 1, ""), "two", &user)).await;
    world.until_version("good", 1).await;
    world.publish(from(event("bad 10", 1, "broken"), "one", &user)).await;
    world.publish(from(in_incarnation(event("better", 1, ""), 2, Some(1)), "two~2", &user)).await;
    world.until_version("better", 1).await;

    for n in 0..5 {
        world.publish(from(event(&format!("worse {n}"), 1, "broken"), "two~2", &user)).await;
    }
    let stopped = says(&mut running, |status| status.consuming.is_err()).await.consuming.unwrap_err();
    insta::assert_snapshot!(stopped, @r#"the handler refused 11 events in a row of "one", and the last of every other source, the last with: the handler is broken; they are in inbox.held"#);
    handler.passed.store(true, Ordering::Relaxed);
    says(&mut running, |status| status.consuming.is_ok()).await;
    running.stop().await;
}

/// A publisher's user was renamed, and nobody told the consumer: it says so, and goes on with the others.
#[tokio::test]
async fn a_wrong_user_is_an_alarm_of_its_own() {
    let world = World::new("renamed").await;
    let user = world.user().to_owned();
    let start = |publishers: &[&str]| {
        world.start_following(sources(publishers), Recorder::new("things"), |config| config)
    };
    let mut running = start(&["things=relay", &format!("others={user}")]);
    running.until_consuming().await;
    for version in 1..=3 {
        world.publish(from(event("a", version, ""), "things", &user)).await;
    }
    world.publish(from(event("b", 1, ""), "others", &user)).await;
    world.until_version("b", 1).await;
    let three = |status: &Status| status.sources.as_ref().is_err_and(|reason| reason.starts_with("3 "));
    let status = says(&mut running, three).await;
    assert_eq!(status.consuming, Ok(()), "work goes on");
    insta::assert_snapshot!(status.waiting().join("\n"), @r#"sources: 3 messages of a followed source did not come from its user: its user is "devstack", and "things" is published by relay. They are stored in inbox.rejected and not applied. If the publisher's user was renamed, name the new user for the source, have the rejected events replayed, and delete them from inbox.rejected. If not, another user forges events"#);
    running.stop().await;

    // A restart forgets nothing. The new user is named, and what was rejected is published again.
    let mut running = start(&["things=relay", &format!("things={user}"), &format!("others={user}")]);
    says(&mut running, |status| status.sources.is_err()).await;
    for version in 1..=3 {
        world.publish(from(event("a", version, ""), "things", &user)).await;
    }
    world.until_version("a", 3).await;
    let filter = inbox::rejected::Filter { ids: Vec::new(), reason: Some("wrong-user".to_owned()) };
    let mut conn = world.pool.acquire().await.unwrap();
    assert_eq!(inbox::rejected::drop(&mut conn, "things", &filter).await.unwrap(), 3);
    drop(conn);
    says(&mut running, |status| status.waiting().is_empty()).await;
    running.stop().await;
    until("nothing is left", async || world.messages("things").await == 0).await;
}
