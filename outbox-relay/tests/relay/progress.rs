//! Where a relay goes on after it was stopped, killed or replaced.

use std::collections::BTreeMap;

use sqlx::{Connection, Executor};

use crate::stack::{Proxy, Relay, Stack, eventually};

/// What a relay stores, as people see it.
async fn stored(stack: &Stack, name: &str) -> String {
    let (row, leader): (String, String) = sqlx::query_as(
        "SELECT format('name %s, low_water %s, high %s, open %s, epoch %s', name, low_water, high, open, epoch),
                leader
         FROM outbox.relay WHERE name = $1 AND heartbeat_at >= leader_since AND paused_at IS NULL",
    )
    .bind(name)
    .fetch_one(&stack.admin)
    .await
    .unwrap();
    let (host, process) = leader.split_once(':').unwrap();
    assert!(!host.is_empty() && process.parse::<u32>().is_ok(), "host:process {leader}");
    row
}

#[tokio::test]
async fn killed_it_goes_on_and_loses_nothing() {
    let stack = Stack::new("relay_kill").await;
    let mut subscriber = stack.subscribe("#").await;
    stack.append(0..5_000, 100, &["person.new"]).await;
    for seen in [500, 1_500, 3_000] {
        let relay = Relay::start(stack.command("run").env("LEASE", "1m")).await;
        subscriber.until(|messages| messages.last().is_some_and(|m| m.number() >= seen)).await;
        relay.kill().await;
    }
    let _relay = Relay::ready(stack.command("run").env("LEASE", "1m")).await;
    subscriber.complete(5_000).await;
    stack.settled("default", 5_000).await;
    insta::assert_snapshot!(
        stored(&stack, "default").await,
        @"name default, low_water 5000, high 5000, open {}, epoch 4"
    );
}

#[tokio::test]
async fn stopped_in_good_order_it_repeats_nothing() {
    let stack = Stack::new("relay_stop").await;
    let mut subscriber = stack.subscribe("#").await;
    stack.append(0..5_000, 100, &["person.new"]).await;
    for seen in [500, 1_500, 3_000] {
        let mut relay = Relay::start(&mut stack.command("run")).await;
        subscriber.until(|messages| messages.last().is_some_and(|m| m.number() >= seen)).await;
        let status = relay.terminate().await;
        assert!(status.success(), "{status}: {}", relay.log());
    }
    let mut relay = Relay::ready(&mut stack.command("run")).await;
    subscriber.complete(5_000).await;
    stack.settled("default", 5_000).await;
    assert!(relay.terminate().await.success());
    assert_eq!(subscriber.messages.len(), 5_000, "nothing came twice");
}

#[tokio::test]
async fn a_second_relay_stands_by_and_takes_over() {
    let stack = Stack::new("relay_standby").await;
    let mut subscriber = stack.subscribe("#").await;
    let first = Relay::ready(&mut stack.command("run")).await;
    let mut second = Relay::ready(&mut stack.command("run")).await;
    stack.append(0..100, 10, &["person.new"]).await;
    subscriber.complete(100).await;
    stack.settled("default", 100).await;
    // Ready, but it is the first that publishes.
    first.counts(100, 0).await;
    second.counts(0, 0).await;
    first.kill().await;
    stack.append(100..200, 10, &["person.new"]).await;
    subscriber.complete(200).await;
    stack.settled("default", 200).await;
    second.counts(100, 0).await;

    // A relay that stops gives way to the next at once, too.
    let third = Relay::ready(&mut stack.command("run")).await;
    assert!(second.terminate().await.success());
    stack.append(200..300, 10, &["person.new"]).await;
    subscriber.complete(300).await;
    stack.settled("default", 300).await;
    third.counts(100, 0).await;
    assert_eq!(subscriber.messages.len(), 300);
}

/// It keeps its connections, and says nothing: its lease ends, and another one leads.
#[tokio::test]
async fn a_stopped_leader_loses_its_leadership() {
    let stack = Stack::new("relay_lease").await;
    let mut subscriber = stack.subscribe("#").await;
    let run = || {
        let mut program = stack.command("run");
        program.env("LEASE", "2s");
        program
    };
    let first = Relay::ready(&mut run()).await;
    let mut second = Relay::ready(&mut run()).await;
    stack.append(0..5_000, 100, &["person.new"]).await;
    subscriber.until(|messages| messages.len() >= 500).await;
    first.signal("STOP").await;
    // Whatever it has published by then, these are left to the other one.
    stack.append(5_000..5_500, 100, &["person.new"]).await;
    subscriber.complete(5_500).await;
    stack.settled("default", 5_500).await;
    assert_ne!(second.counted().await.0, "0");

    // What it had in mind is void when it wakes up; it stands by, and leads again when its turn comes.
    first.signal("CONT").await;
    stack.append(5_500..6_000, 100, &["person.new"]).await;
    subscriber.complete(6_000).await;
    stack.settled("default", 6_000).await;
    assert!(second.terminate().await.success());
    stack.append(6_000..7_000, 100, &["person.new"]).await;
    subscriber.complete(7_000).await;
    stack.settled("default", 7_000).await;
}

/// The other way round: it runs, but hears nothing of its database, on a connection that is half-open.
/// Once its lease is over it publishes nothing but what was on its way, whatever becomes possible then.
#[tokio::test]
async fn a_leader_that_hears_nothing_publishes_nothing() {
    let stack = Stack::new("relay_deaf").await;
    let mut subscriber = stack.subscribe("#").await;
    let (database, broker) = (Proxy::new(&stack.database_url).await, Proxy::new(&stack.amqp_url).await);
    // With the long lease of stack.command: a busy machine does not take the lead from it.
    let mut first = stack.command("run");
    // Its broker's connection is silent for longer than two heartbeats of 10 s where the machine is busy.
    let silent = format!("{}?heartbeat=60", broker.url(&stack.amqp_url));
    first.env("DATABASE_URL", database.url(&stack.database_url)).env("AMQP_URL", silent);
    let first = Relay::ready(&mut first).await;
    first.is_ready_with_all_connections().await;
    // What it read first, 100 events, is on its way; each lane has its next window in its hands.
    broker.hold_up(true);
    stack.append(0..5_000, 5_000, &["person.new"]).await;
    first.waits("the broker has not confirmed").await;
    let _second = Relay::ready(&mut stack.command("run")).await;
    database.hang();
    subscriber.complete(5_000).await;
    broker.hold_up(false);
    first.waits("the database did not answer").await;
    // What was on its way comes now, a second time.
    subscriber.until(|messages| messages.len() > 5_000).await;
    stack.append(5_000..5_001, 5_000, &["person.new"]).await;
    let came = subscriber.complete(5_001).await.len();
    assert!(came <= 5_001 + 100, "{came}: what was not on its way was published all the same");
}

/// As when it hangs in the middle of a statement, or on a socket that the server's timers do not cover:
/// its session stays, and so does its lock.
#[tokio::test]
async fn a_leader_that_says_nothing_for_long_is_ended() {
    let stack = Stack::new("relay_silent").await;
    let mut subscriber = stack.subscribe("#").await;
    let first = Relay::ready(&mut stack.command("run")).await;
    first.kill().await;
    let mut silent = sqlx::PgConnection::connect(&stack.database_url).await.unwrap();
    let lock = "SELECT pg_advisory_lock(1869968492, (SELECT id FROM outbox.relay))";
    eventually("the lock is taken", async || silent.execute(lock).await.ok()).await;
    stack.append(0..10, 1, &["person.new"]).await;
    let second = Relay::ready(&mut stack.command("run")).await;
    // Silent for a moment only: it is left alone.
    let beat = "UPDATE outbox.relay SET heartbeat_at = now() - interval '1 second' * ";
    stack.admin.execute(sqlx::AssertSqlSafe(format!("{beat} 5"))).await.unwrap();
    silent.execute("SELECT pg_sleep(1)").await.unwrap();
    assert_eq!(second.counted().await.0, "0");
    stack.admin.execute(sqlx::AssertSqlSafe(format!("{beat} 16"))).await.unwrap();
    subscriber.complete(10).await;
    assert!(silent.execute("SELECT 1").await.is_err(), "its session was ended");
}

#[tokio::test]
async fn each_name_publishes_everything_from_where_it_begins() {
    let stack = Stack::new("relay_names").await;
    let mut subscriber = stack.subscribe("#").await;
    stack.append(0..100, 10, &["person.new"]).await;
    let all = Relay::ready(stack.command("run").args(["--name", "all"])).await;
    subscriber.complete(100).await;
    let late = Relay::ready(stack.command("run").args(["--name", "late", "--begin", "end"])).await;
    eventually("the late one begins", async || {
        let rows = sqlx::query("SELECT FROM outbox.relay WHERE name = 'late'").fetch_all(&stack.admin).await;
        (rows.unwrap().len() == 1).then_some(())
    })
    .await;
    stack.append(100..150, 10, &["person.new"]).await;
    stack.settled("all", 150).await;
    stack.settled("late", 150).await;
    all.counts(150, 0).await;
    late.counts(50, 0).await;
    let mut times = BTreeMap::new();
    for message in subscriber.count(200).await {
        *times.entry(message.number()).or_insert(0) += 1;
    }
    assert!((0..150).all(|n| times[&n] == if n < 100 { 1 } else { 2 }), "{times:?}");
}

/// Where a name begins matters only once.
#[tokio::test]
async fn begin_end_on_an_empty_outbox_misses_nothing() {
    let stack = Stack::new("relay_begin").await;
    let mut subscriber = stack.subscribe("#").await;
    let mut program = stack.command("run");
    let relay = Relay::ready(program.env("BEGIN", "end")).await;
    stack.append(0..1, 1, &["person.new"]).await;
    subscriber.complete(1).await;
    stack.settled("default", 1).await;
    relay.kill().await;
    stack.append(1..2, 1, &["person.new"]).await;
    let _relay = Relay::ready(&mut program).await;
    subscriber.complete(2).await;
}
