//! A relay erases what is left of an aggregate with a long history, and publishes none of it meanwhile.

use std::collections::HashSet;

use crate::stack::{Message, Relay, Stack, eventually, output};

const PENDING: &str = "SELECT count(*) FROM outbox.erasure";
const STORED: &str =
    "SELECT count(*) FROM outbox.event WHERE aggregate_id = 'a0' AND payload::text LIKE '%\"n\"%'";

async fn count(stack: &Stack, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(&stack.admin).await.unwrap()
}

#[tokio::test]
async fn what_is_being_erased_is_published_erased_and_a_killed_relay_is_followed() {
    let stack = Stack::new("relay_erasures").await;
    stack.append(0..2_600, 1, &["thing.changed"]).await;
    let erase = "SELECT outbox.erase('{thing}', '{a0}', '{2601}')";
    sqlx::query(erase).execute(&stack.writer).await.unwrap();
    let other = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                 SELECT 'thing', 'other', n, 'thing.changed', json_build_object('n', n) FROM generate_series(1, 100) n";
    sqlx::query(other).execute(&stack.writer).await.unwrap();
    assert_eq!((count(&stack, PENDING).await, count(&stack, STORED).await), (1, 600));
    assert_told!("erasures_pending", output(&mut stack.command("erasures")).await);

    // It is killed in the middle of its third step, before any queue is there for what it publishes.
    let killed = Relay::start(
        stack.command("run").env("ERASURE_STEP", "100").env("FAILPOINTS", "erase=2*off->return"),
    )
    .await;
    eventually("it is killed", async || killed.get("live").await.is_none().then_some(())).await;
    assert_eq!(count(&stack, STORED).await, 400, "two steps are done, and nothing of the third");

    let mut subscriber = stack.subscribe("#").await;
    let _relay = Relay::ready(stack.command("run").env("ERASURE_STEP", "100")).await;
    let of = |message: &Message| message.header("aggregate_id");
    let both = |messages: &[Message]| {
        let versions = |id: &str| {
            let of_it = messages.iter().filter(|message| of(message) == id);
            of_it.map(|message| message.header("aggregate_version")).collect::<HashSet<_>>().len()
        };
        messages.len() >= 2_700 && (versions("a0"), versions("other")) == (2_600, 100)
    };
    for message in subscriber.until(both).await {
        assert_eq!(message.body.contains("\"erased\":true"), of(message) == "a0", "{message:?}");
    }
    eventually("nothing is left", async || (count(&stack, PENDING).await == 0).then_some(())).await;
    assert_eq!(count(&stack, STORED).await, 0);
    assert_told!("erasures_done", output(&mut stack.command("erasures")).await);
}

#[tokio::test]
async fn erasures_are_finished_by_hand_and_replayed_erased() {
    let stack = Stack::new("relay_erasures_by_hand").await;
    let mut subscriber = stack.subscribe("#").await;
    let mut relay = Relay::ready(&mut stack.command("run")).await;
    stack.append(0..2_100, 1, &["thing.changed"]).await;
    subscriber.complete(2_100).await;
    stack.settled("default", 2_100).await;
    relay.terminate().await;
    let erase = "SELECT outbox.erase('{thing}', '{a0}', '{2101}')";
    sqlx::query(erase).execute(&stack.writer).await.unwrap();
    assert_eq!((count(&stack, PENDING).await, count(&stack, STORED).await), (1, 100));

    let published = subscriber.messages.len();
    let replayed = output(stack.command("replay").args([
        "--from",
        "2091",
        "--to-everybody",
        "--yes",
        "--rate",
        "1000000",
    ]))
    .await;
    assert!(replayed.contains("10 events replayed"), "{replayed}");
    for message in &subscriber.count(published + 10).await[published..] {
        assert!(message.body.contains("\"erased\":true"), "{message:?}");
    }
    let said = output(stack.command("erasures").args(["--finish", "--erasure-step", "10"])).await;
    assert!(said.starts_with("exit code: 0"), "{said}");
    assert_eq!((count(&stack, PENDING).await, count(&stack, STORED).await), (0, 0));
}
