//! A sequence that stands behind what is in use: it is noticed, one command sets it right, and what was written meanwhile
//! is published.

use serde_json::Value;
use sqlx::{AssertSqlSafe, Executor};

use crate::stack::{Relay, Stack, eventually, output};

/// Writes on, as services do: where a position is taken, it fails, and is tried again. From which number on which event of
/// which aggregate, with its next version.
async fn write(stack: &Stack, events: &[(i64, &str)]) {
    for &(number, aggregate) in events {
        eventually("a free position is found", async || {
            sqlx::query(
                "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                 SELECT 'thing', $2, count(*) + 1, 'thing.changed', json_build_object('n', $1::bigint)
                 FROM outbox.event WHERE aggregate_id = $2",
            )
            .bind(number)
            .bind(aggregate)
            .execute(&stack.admin)
            .await
            .ok()
            .map(|_| ())
        })
        .await;
    }
}

/// Rolls back, so that positions stay free.
async fn roll_back(stack: &Stack, count: i64) {
    let mut tx = stack.admin.begin().await.unwrap();
    let take = "SELECT outbox.next_position() FROM generate_series(1, $1)";
    sqlx::query(take).bind(count).execute(&mut *tx).await.unwrap();
    tx.rollback().await.unwrap();
}

/// The command, as the schema's owner.
async fn recover(stack: &Stack, arguments: &[&str]) -> String {
    let (_, database) = stack.database_url.rsplit_once('/').unwrap();
    let admin = std::env::var(devstack::testing::POSTGRES_URL).unwrap();
    let mut program = stack.command("recover");
    output(program.args(arguments).env("DATABASE_URL", format!("{admin}/{database}"))).await
}

/// What `doctor` says of the sequence.
async fn examined(stack: &Stack) -> String {
    let said = output(stack.command("doctor").arg("--json").env_remove("AMQP_URL")).await;
    let report: Value = serde_json::from_str(said.split_once('\n').unwrap().1).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let found = checks.iter().find(|check| check["name"] == "sequence").unwrap();
    format!("{}: {} -> {}", found["state"], found["finding"], found["advice"])
}

/// Twenty events at 29 positions: after each five, three stay free.
async fn used(name: &str) -> Stack {
    let stack = Stack::new(name).await;
    for first in [0, 5, 10, 15] {
        if first > 0 {
            roll_back(&stack, 3).await;
        }
        stack.append(first..first + 5, 5, &["thing.new"]).await;
    }
    stack
}

#[tokio::test]
async fn a_sequence_that_is_set_back_while_no_relay_runs() {
    let stack = used("sequence_stopped").await;
    let mut subscriber = stack.subscribe("thing.*").await;
    let mut relay = Relay::ready(&mut stack.command("run")).await;
    subscriber.complete(20).await;
    stack.settled("default", 29).await;
    assert!(relay.terminate().await.success());

    // What a restore that carries no sequence leaves.
    stack.admin.execute("SELECT setval('outbox.position', 1, false)").await.unwrap();
    // The next event of a known aggregate would lie below the one before it: its writer is told.
    let known = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                 VALUES ('thing', 'a0', 5, 'thing.changed', '{}')";
    let told = stack.writer.execute(known).await.unwrap_err();
    assert_eq!(told.as_database_error().unwrap().code().unwrap(), "40001", "{told}");
    // New aggregates are written, in one transaction each.
    write(&stack, &[(20, "b0"), (21, "b1"), (22, "b2"), (23, "b0"), (24, "b1")]).await;
    let refused = output(stack.command("run").env("LISTEN", "127.0.0.1:0")).await;
    assert!(refused.starts_with("exit code: 1"), "{refused}");
    insta::assert_snapshot!(refused.lines().last().unwrap());
    insta::assert_snapshot!(examined(&stack).await);
    insta::assert_snapshot!(recover(&stack, &[]).await);
    insta::assert_snapshot!(recover(&stack, &["--sequence", "--json"]).await);
    insta::assert_snapshot!(recover(&stack, &["--sequence", "--yes"]).await);
    insta::assert_snapshot!(recover(&stack, &["--sequence", "--yes"]).await);

    // New ones of the same aggregates come after them.
    write(&stack, &[(25, "b2"), (26, "b0"), (27, "a0")]).await;
    let _relay = Relay::ready(&mut stack.command("run")).await;
    subscriber.complete(28).await;
    subscriber.assert_rising();
    assert_eq!(subscriber.messages.len(), 28, "an event was published twice");
}

#[tokio::test]
async fn a_sequence_that_is_set_back_under_a_leading_relay() {
    let stack = used("sequence_leading").await;
    let mut subscriber = stack.subscribe("thing.*").await;
    let relay = Relay::ready(&mut stack.command("run")).await;
    subscriber.complete(20).await;
    stack.settled("default", 29).await;

    stack.admin.execute("SELECT setval('outbox.position', 3)").await.unwrap();
    write(&stack, &[(20, "b0"), (21, "b1"), (22, "b0")]).await;
    let said = relay.waits("the sequence outbox.position stands at").await;
    assert!(said.contains("sequence: ") && said.contains("outbox-relay recover --sequence"), "{said}");
    let done = recover(&stack, &["--sequence", "--yes"]).await;
    assert!(done.starts_with("exit code: 0"), "{done}");
    write(&stack, &[(23, "b1"), (24, "b0"), (25, "a1")]).await;
    subscriber.complete(26).await;
    relay.is_ready().await;
    let versions =
        "SELECT string_agg(version::text, ' ' ORDER BY position) FROM outbox.event WHERE aggregate_id = 'b0'";
    let stored: String = sqlx::query_scalar(versions).fetch_one(&stack.admin).await.unwrap();
    assert_eq!(stored, "1 2 3");
}

/// Where nothing is stored above, nothing tells what is new. What an operator says was published stays where it is.
#[tokio::test]
async fn what_is_new_is_named_by_an_operator_where_nothing_tells() {
    let stack = used("sequence_from").await;
    let mut subscriber = stack.subscribe("thing.*").await;
    let mut relay = Relay::ready(&mut stack.command("run")).await;
    subscriber.complete(20).await;
    stack.settled("default", 29).await;
    assert!(relay.terminate().await.success());
    stack.admin.execute("DELETE FROM outbox.event WHERE position > 16").await.unwrap();
    stack.admin.execute("SELECT setval('outbox.position', 16)").await.unwrap();
    write(&stack, &[(20, "b0"), (21, "b1")]).await;
    insta::assert_snapshot!(recover(&stack, &["--sequence"]).await);
    insta::assert_snapshot!(recover(&stack, &["--sequence", "--from", "17"]).await);
    let done = recover(&stack, &["--sequence", "--from", "17", "--yes"]).await;
    assert!(done.contains("2 events written meanwhile"), "{done}");
    let _relay = Relay::ready(&mut stack.command("run")).await;
    subscriber.complete(22).await;
    assert_eq!(subscriber.messages.len(), 22, "an event was published twice");
}

/// An event that looks new, while its aggregate goes on above, stays: moved, it would come after its successors.
#[tokio::test]
async fn what_has_a_successor_above_stays() {
    let stack = used("sequence_order").await;
    // A writer changes a row's transaction, as an erasure does.
    let touch = "UPDATE outbox.event SET payload = payload WHERE position IN (2, 3) OR aggregate_id = 'a3'";
    stack.admin.execute(touch).await.unwrap();
    let relay = "INSERT INTO outbox.relay (name, low_water, high) VALUES ('default', 29, 29)";
    stack.admin.execute(relay).await.unwrap();
    stack.admin.execute("SELECT setval('outbox.position', 5)").await.unwrap();
    write(&stack, &[(20, "b0")]).await;
    let said = recover(&stack, &["--sequence"]).await;
    assert!(said.contains("1 event was written there meanwhile, the first at 6"), "{said}");
    assert!(said.contains("3 more may have been"), "{said}");
    let other = recover(&stack, &["--sequence", "--yes"]).await;
    assert!(other.contains("1 event written meanwhile"), "{other}");
    let stored = "SELECT string_agg(version || '@' || position, ' ' ORDER BY position) FROM outbox.event
                  WHERE aggregate_id IN ('a1', 'a2')";
    let stored: String = sqlx::query_scalar(AssertSqlSafe(stored)).fetch_one(&stack.admin).await.unwrap();
    assert!(stored.starts_with("1@2 1@3 2@"), "{stored}");
}
