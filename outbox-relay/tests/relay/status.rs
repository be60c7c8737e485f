//! `status`: what it tells of relays that are well, that are not, and that are not there.

use std::{process::Stdio, time::Duration};

use lapin::types::{AMQPValue, FieldTable};
use serde_json::Value;
use sqlx::{Connection, Executor};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::Command,
};

use crate::stack::{Relay, Stack, eventually, output};

async fn status(stack: &Stack, arguments: &[&str]) -> String {
    output(stack.command("status").args(arguments)).await
}

#[tokio::test]
async fn a_relay_that_is_well() {
    let stack = Stack::new("status_well").await;
    assert_told!("status of nobody", status(&stack, &[]).await);
    let _subscriber = stack.subscribe("#").await;
    stack.append(0..100, 10, &["thing.new"]).await;
    let relay = Relay::ready(&mut stack.command("run")).await;
    stack.settled("default", 100).await;
    assert_told!("status of a relay that is well", status(&stack, &[]).await);
    assert_told!("status of a relay that is well, as JSON", status(&stack, &["--json"]).await);
    assert_told!("status of an unknown relay", status(&stack, &["--name", "other"]).await);
    relay.kill().await;
    let said = eventually("nobody leads", async || {
        let said = status(&stack, &["--name", "default"]).await;
        said.contains("no leader").then_some(said)
    });
    assert_told!("status when nobody leads", said.await);
}

#[tokio::test]
async fn a_relay_that_is_not_well() {
    let stack = Stack::new("status_unwell").await;
    let mut subscriber = stack.subscribe("#").await;
    stack.append(0..10, 10, &["thing.new"]).await;
    let _relay = Relay::ready(&mut stack.command("run")).await;
    subscriber.complete(10).await;
    stack.settled("default", 10).await;
    let pause =
        "INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, payload,
                                    headers, created_at, reason, detail)
         SELECT 'default', e.*, CASE WHEN position > 2 THEN 'unroutable' ELSE 'refused' END, 'said'
         FROM (SELECT position, id, aggregate_type, aggregate_id, version, type, payload, headers, created_at
               FROM outbox.event WHERE position <= 5) e;
         UPDATE outbox.relay SET paused_at = '2026-01-02 03:04:05Z', paused_by = 'somebody@somewhere'";
    stack.admin.execute(pause).await.unwrap();
    eventually("the leader is paused", async || {
        let waiting = "SELECT waiting @? '$[*] ? (@.part == \"paused\")' FROM outbox.relay";
        sqlx::query_scalar::<_, bool>(waiting).fetch_one(&stack.admin).await.unwrap().then_some(())
    })
    .await;
    // Ten events that wait, after five positions that an open transaction has taken.
    let mut open = stack.writer.acquire().await.unwrap().detach();
    open.execute("SET application_name = 'slow-service'; BEGIN").await.unwrap();
    open.execute(
        "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
         SELECT 'thing', 'slow', n, 'thing.new', '{}' FROM generate_series(1, 5) n",
    )
    .await
    .unwrap();
    stack.append(10..20, 10, &["thing.new"]).await;
    let stable = eventually("it reads what waits", async || {
        let said = status(&stack, &[]).await;
        (said.contains("handed out up to 25") && said.contains("10 events")).then_some(said)
    });
    assert_told!("status of a relay that is not well", stable.await);
    assert_told!("status of a relay that is not well, as JSON", status(&stack, &["--json"]).await);
    open.close().await.unwrap();
}

/// Rows of `outbox.parked` that wait: of the first of each aggregate it is told for what, and what to do.
#[tokio::test]
async fn events_that_wait() {
    let stack = Stack::new("status_waiting").await;
    let rows = "
        INSERT INTO outbox.relay (name, low_water, high) VALUES ('default', 0, 0), ('large', 0, 0);
        INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, created_at,
                                   reason, detail, attempts, parked_at, next_attempt_at, state)
        SELECT 'default', position, format('00000000-0000-7000-8000-%s', lpad(position::text, 12, '0'))::uuid, 'thing',
               aggregate, version, type, now(), reason, detail, 3, timestamptz '2026-01-02 03:04:05Z',
               CASE WHEN version = 1 THEN timestamptz '2026-01-02 03:09:05Z' END, 'waiting'
        FROM (VALUES (1, 'a', 1, 'order.new', 'nacked', 'a queue is full'),
                     (2, 'a', 2, 'order.changed', 'behind', ''),
                     (3, 'b', 1, 'order.new', 'nacked', 'a queue is full'),
                     (4, 'c', 1, 'bill.new', 'refused', 'it is too large'),
                     (5, 'd', 1, 'bill.new', 'silent', 'no response'),
                     (6, 'e', 1, 'audit.seen', 'unroutable', 'no queue takes it'),
                     (7, 'f', 1, 'audit.seen', 'behind', ''),
                     (8, 'b', 2, 'order.changed', 'behind', ''))
             AS row (position, aggregate, version, type, reason, detail);
        INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, created_at,
                                   reason, detail, parked_at, next_attempt_at, state)
        SELECT 'large', n, gen_random_uuid(), 'thing', n, 1, 'audit.seen', now(), 'unroutable', 'no queue takes it',
               timestamptz '2026-01-02 03:04:05Z', now(), 'waiting'
        FROM generate_series(1, 10001) n";
    stack.admin.execute(rows).await.unwrap();
    assert_told!("status of events that wait", status(&stack, &["--name", "default"]).await);
    assert_told!(
        "status of events that wait, as JSON",
        status(&stack, &["--name", "default", "--json"]).await
    );
    assert_told!("status of more events than are counted", status(&stack, &["--name", "large"]).await);
    let doctor = output(&mut stack.command("doctor")).await;
    let lines: Vec<&str> = doctor.lines().skip_while(|line| !line.contains(", waiting events: ")).collect();
    assert_told!("doctor of events that wait", lines[..2].join("\n"));
}

/// A relay alone is well, but what waits is not.
#[tokio::test]
async fn a_relay_with_a_full_queue_tells_what_waits() {
    let stack = Stack::new("status_full").await;
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    stack.bind("full", "thing.*", arguments).await;
    let mut well = stack.subscribe("bill.new").await;
    let _relay = Relay::ready(&mut stack.command("run")).await;
    stack.append(0..20, 10, &["thing.new"]).await;
    sqlx::query(
        "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
         VALUES ('thing', 'bill', 1, 'bill.new', '{}')",
    )
    .execute(&stack.writer)
    .await
    .unwrap();
    well.count(1).await;
    let said = eventually("it tells what waits", async || {
        let said = status(&stack, &[]).await;
        said.contains("begin with thing.new, nacked: the broker refuses").then_some(said)
    })
    .await;
    assert!(said.starts_with("exit code: 3"), "{said}");
    let doctor = output(&mut stack.command("doctor")).await;
    assert!(doctor.contains("warning  relay default, waiting events: "), "{doctor}");
}

/// More than is counted, of a relay that has never run: told all the same, and quickly.
#[tokio::test]
async fn a_backlog_that_is_too_large_to_count() {
    let stack = Stack::new("status_backlog").await;
    stack.append(0..20_000, 100, &["thing.new"]).await;
    let read = "INSERT INTO outbox.relay (name, low_water, high, open, leader, heartbeat_at) VALUES
                ('audit', 100, 9000, '{[201,301),[1001,1002)}', 'host:1', now() - interval '1 day'),
                ('default', 15000, 20000, '{[15001,15011)}', NULL, NULL)";
    stack.admin.execute(read).await.unwrap();
    assert_told!("status of a large backlog", status(&stack, &[]).await);
}

#[tokio::test]
async fn watching() {
    let stack = Stack::new("status_watch").await;
    let _subscriber = stack.subscribe("#").await;
    let _relay = Relay::ready(&mut stack.command("run")).await;
    let mut program = stack.command("status");
    let mut watch = program
        .args(["--watch", "--interval", "100ms", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    stack.append(0..100, 10, &["thing.new"]).await;
    let end = tokio::time::Instant::now() + Duration::from_mins(1);
    loop {
        let line = tokio::time::timeout_at(end, lines.next_line()).await.unwrap().unwrap().unwrap();
        let said: Value = serde_json::from_str(&line).unwrap();
        let relay = &said["relays"][0];
        if relay["position"]["low_water"] == 100 && relay["rate"]["drained_in_seconds"].as_f64() == Some(0.0)
        {
            break;
        }
    }
    let interrupt = Command::new("kill").args(["-INT", &watch.id().unwrap().to_string()]).status().await;
    assert!(interrupt.unwrap().success());
    assert_eq!(watch.wait().await.unwrap().code(), Some(0));
}
