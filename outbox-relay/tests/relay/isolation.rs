//! Trouble belongs to what has it: other aggregates, types and subscribers go on.

use std::{collections::HashSet, time::Instant};

use lapin::{
    BasicProperties, Confirmation, ExchangeKind,
    options::{
        BasicPublishOptions, ConfirmSelectOptions, ExchangeBindOptions, ExchangeDeclareOptions,
        QueueBindOptions, QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
};
use serde_json::json;

use crate::stack::{EXCHANGE, Message, Relay, Stack, eventually};

/// Appends one event, and returns its position.
async fn one(stack: &Stack, aggregate: (&str, &str), version: i64, type_: &str, body: &str) -> i64 {
    sqlx::query_scalar(
        "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
         VALUES ($1, $2, $3, $4, $5::json) RETURNING position",
    )
    .bind(aggregate.0)
    .bind(aggregate.1)
    .bind(version)
    .bind(type_)
    .bind(body)
    .fetch_one(&stack.writer)
    .await
    .unwrap()
}

/// What is in `outbox.parked`, in words.
async fn rows(stack: &Stack) -> Vec<String> {
    let sql = "SELECT format('%s %s %s', state, reason, type) FROM outbox.parked ORDER BY position";
    sqlx::query_scalar(sql).fetch_all(&stack.admin).await.unwrap()
}

async fn low_water(stack: &Stack, position: i64) {
    eventually("the low-water mark goes on", async || {
        let sql = "SELECT low_water >= $1 FROM outbox.relay";
        let there = sqlx::query_scalar::<_, bool>(sql).bind(position).fetch_optional(&stack.admin).await;
        there.unwrap().unwrap_or_default().then_some(())
    })
    .await;
}

/// A user may publish orders, and no bills: the bills are set aside, and every order comes, whether anything else does
/// or not.
#[tokio::test]
async fn a_type_that_may_not_be_published_stops_no_other() {
    let stack = Stack::new("relay_denied").await;
    let mut all = stack.subscribe("#").await;
    let path = format!("topic-permissions/{0}/{0}", stack.vhost);
    let rights = json!({"exchange": EXCHANGE, "write": r"^order\.", "read": ""});
    stack.manage(reqwest::Method::PUT, &path, Some(rights)).await;
    let relay = Relay::ready(&mut stack.command("run")).await;
    for n in 0..20_i64 {
        one(&stack, ("bill", &format!("b{n}")), 1, "bill.new", r#"{"n": 0}"#).await;
        one(&stack, ("order", "o"), n + 1, "order.new", &format!(r#"{{"n": {n}}}"#)).await;
        all.until(|messages| messages.iter().any(|m| m.key == "order.new" && m.number() == n)).await;
    }
    // Only what is taken later tells that it is the bill.
    let mut version = 21;
    eventually("every bill is set aside", async || {
        one(&stack, ("order", "o"), version, "order.new", r#"{"n": 0}"#).await;
        version += 1;
        let rows = rows(&stack).await;
        (rows.len() == 20 && rows.iter().all(|row| row == "parked refused bill.new")).then_some(())
    })
    .await;
    relay.is_ready().await;
}

/// Whether a queue takes an event need not depend on its type: here on the aggregate's.
#[tokio::test]
async fn the_same_type_of_another_aggregate_type_goes_on() {
    let stack = Stack::new("relay_headers").await;
    let channel = stack.channel().await;
    let by_aggregate = format!("{EXCHANGE}.by_aggregate");
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    let none = FieldTable::default;
    channel
        .exchange_declare(by_aggregate.as_str().into(), ExchangeKind::Headers, durable, none())
        .await
        .unwrap();
    channel
        .exchange_bind(
            by_aggregate.as_str().into(),
            EXCHANGE.into(),
            "#".into(),
            ExchangeBindOptions::default(),
            none(),
        )
        .await
        .unwrap();
    channel.queue_declare("orders".into(), QueueDeclareOptions::default(), none()).await.unwrap();
    let mut order = FieldTable::default();
    order.insert("aggregate_type".into(), AMQPValue::LongString("order".into()));
    channel
        .queue_bind(
            "orders".into(),
            by_aggregate.as_str().into(),
            "".into(),
            QueueBindOptions::default(),
            order,
        )
        .await
        .unwrap();
    let mut orders = stack.consume("orders").await;
    one(&stack, ("audit", "a"), 1, "changed", r#"{"n": 0}"#).await;
    let relay = Relay::start(&mut stack.command("run")).await;
    relay.waits("no queue takes events of type changed").await;
    for n in 0..10 {
        one(&stack, ("order", "o"), n + 1, "changed", &format!(r#"{{"n": {n}}}"#)).await;
    }
    orders.count(10).await;
    orders.assert_order();
    relay.is_ready().await;
}

/// Publishes to the queue alone until it refuses what comes.
async fn fill(stack: &Stack, queue: &str) {
    let channel = stack.channel().await;
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    for _ in 0..1_000 {
        let (options, properties) = (BasicPublishOptions::default(), BasicProperties::default());
        let publish = channel.basic_publish("".into(), queue.into(), options, b"{}", properties).await;
        if matches!(publish.unwrap().await.unwrap(), Confirmation::Nack(_)) {
            return;
        }
    }
    panic!("{queue} takes everything");
}

/// A queue at its limit has its own events wait. Another subscriber gets everything, and few copies.
#[tokio::test]
async fn a_full_queue_stops_no_other_subscriber() {
    let stack = Stack::new("relay_beside_full").await;
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    stack.bind("full", "order.#", arguments).await;
    fill(&stack, "full").await;
    let mut well = stack.subscribe("#").await;
    let began = Instant::now();
    let mut relay = Relay::ready(&mut stack.command("run")).await;
    for n in 0..8 {
        one(&stack, ("order", &format!("o{n}")), 1, "order.new", &format!(r#"{{"n": {n}}}"#)).await;
    }
    for n in 0..20_i64 {
        let number = 100 + n;
        one(&stack, ("bill", "b"), n + 1, "bill.new", &format!(r#"{{"n": {number}}}"#)).await;
        well.until(|messages| messages.iter().any(|m| m.number() == number)).await;
    }
    // Its successors wait with it.
    one(&stack, ("order", "o7"), 2, "order.changed", r#"{"n": 50}"#).await;
    let last = one(&stack, ("bill", "b"), 21, "bill.new", r#"{"n": 200}"#).await;
    let waits =
        "events wait, and everything else goes on: the broker refuses events of type order.new for now";
    eventually("it says what waits", async || relay.get("ready").await?.1.contains(waits).then_some(()))
        .await;
    // What waits costs rows, and the mark goes on.
    low_water(&stack, last).await;
    well.until(|messages| messages.iter().any(|m| m.number() == 200)).await;
    assert!(well.messages.iter().all(|m| m.number() != 50), "it overtook its predecessor");
    let seconds = usize::try_from(began.elapsed().as_secs()).unwrap() + 1;
    let copies = |messages: &[Message]| messages.iter().filter(|m| m.number() < 8).count();
    // The first try, the budget of a pause, and what it gets in a second.
    assert!(copies(&well.messages) <= 8 + 10 + 10 * seconds, "{} copies", copies(&well.messages));

    // Across a restart; then the queue is emptied again and again.
    assert!(relay.terminate().await.success());
    let relay = Relay::start(&mut stack.command("run")).await;
    // What it was filled with.
    stack.channel().await.queue_purge("full".into(), QueuePurgeOptions::default()).await.unwrap();
    let mut orders = stack.consume("full").await;
    orders.until(|m| m.iter().map(Message::number).collect::<HashSet<_>>().len() == 9).await;
    orders.assert_order();
    eventually("nothing waits", async || rows(&stack).await.is_empty().then_some(())).await;
    relay.is_ready().await;
}

/// As many events in one transaction as wait in memory, and more, of a type that nobody takes: one that somebody takes
/// comes all the same, the mark goes on, and what waits comes when its queue does.
#[tokio::test]
async fn a_burst_that_nobody_takes_stops_nobody() {
    let stack = Stack::new("relay_burst").await;
    let small = vec![("MAX_EVENTS", "100"), ("LANES", "1")];
    for (name, events, settings) in [("default", 10_000, vec![]), ("small", 1_000, small)] {
        let mut incomes = stack.subscribe(&format!("{name}.income")).await;
        sqlx::query(
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
             SELECT 'audit', $1 || n % ($2 / 2), n / ($2 / 2) + 1, $1 || '.seen', json_build_object('n', n)
             FROM generate_series(0, $2 - 1) n ORDER BY n",
        )
        .bind(name)
        .bind(i32::try_from(events).unwrap())
        .execute(&stack.writer)
        .await
        .unwrap();
        let last = one(&stack, ("person", name), 1, &format!("{name}.income"), r#"{"n": 1}"#).await;
        let mut relay = Relay::start(stack.command("run").envs(settings)).await;
        incomes.count(1).await;
        low_water(&stack, last).await;
        assert!(relay.terminate().await.success());

        // Another leader goes on with what waits.
        let mut relay = Relay::start(&mut stack.command("run")).await;
        stack.bind(&format!("{name}.seen"), &format!("{name}.seen"), FieldTable::default()).await;
        let mut seen = stack.consume(&format!("{name}.seen")).await;
        // Those of which it was certain were set aside, and let later ones of their aggregates go on.
        let all = |messages: &[Message]| messages.iter().map(Message::number).collect::<HashSet<_>>().len();
        seen.until(|messages| messages.len() >= events && all(messages) == events).await;
        eventually("nothing is left", async || rows(&stack).await.is_empty().then_some(())).await;
        assert!(relay.terminate().await.success());
    }
}

/// A rule lets the successors of what a full queue refuses go on, after a time.
#[tokio::test]
async fn a_rule_lets_events_pass_a_full_queue() {
    let stack = Stack::new("relay_pass").await;
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    stack.bind("full", "order.new", arguments).await;
    let mut well = stack.subscribe("#").await;
    let _relay = Relay::ready(stack.command("run").env("NACKED", "order.*=pass")).await;
    for n in 0..3 {
        one(&stack, ("order", &n.to_string()), 1, "order.new", &format!(r#"{{"n": {n}}}"#)).await;
        one(&stack, ("order", &n.to_string()), 2, "order.changed", &format!(r#"{{"n": {}}}"#, 10 + n)).await;
    }
    // The first one goes on at once.
    well.until(|m| (10..13).all(|n| m.iter().any(|m| m.number() == n))).await;
    let mut aside = rows(&stack).await;
    // What was behind may be confirmed and still have its row.
    aside.retain(|row| row.starts_with("parked"));
    assert_eq!(aside, ["parked nacked order.new"; 2]);
    let mut orders = stack.consume("full").await;
    orders.until(|messages| (0..3).all(|n| messages.iter().any(|m| m.number() == n))).await;
    eventually("nothing is aside", async || rows(&stack).await.is_empty().then_some(())).await;
}

/// Headers travel in one frame, and a broker or a setting may allow small ones only.
#[tokio::test]
async fn an_event_whose_headers_fit_in_no_frame_is_set_aside() {
    let stack = Stack::new("relay_frame").await;
    let mut all = stack.subscribe("#").await;
    // RabbitMQ 4.1 and later take no smaller ones.
    let url = format!("{}?frame_max=8192", stack.amqp_url);
    sqlx::query(
        "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers)
         SELECT 'thing', n::text, 1, 'thing.new', json_build_object('n', n),
                jsonb_build_object('note', repeat('x', CASE n WHEN 7 THEN 9000 WHEN 8 THEN 7700 ELSE 1 END))
         FROM generate_series(0, 39) n ORDER BY n",
    )
    .execute(&stack.writer)
    .await
    .unwrap();
    let relay = Relay::ready(stack.command("run").env("AMQP_URL", url)).await;
    all.count(39).await;
    let detail = eventually("it is set aside", async || {
        let sql = "SELECT replace(detail, id::text, 'ID') FROM outbox.parked
                   WHERE aggregate_id = '7' AND state = 'parked' AND reason = 'refused'";
        sqlx::query_scalar::<_, String>(sql).fetch_optional(&stack.admin).await.unwrap()
    })
    .await;
    insta::assert_snapshot!(
        detail,
        @"event ID of type thing.new: AMQP cannot carry it: its headers take a frame of 9232 bytes, and this connection's frame_max is 8192; raise that at the broker and in AMQP_URL, then run: outbox-relay parked retry"
    );
    stack.settled("default", 40).await;
    // Each came once: no connection was lost over it.
    relay.counts(39, 0).await;
    assert_eq!(all.messages.len(), 39);

    // With the server's own, larger frames, by hand.
    let mut relay = relay;
    assert!(relay.terminate().await.success());
    let _relay = Relay::ready(&mut stack.command("run")).await;
    sqlx::query("UPDATE outbox.parked SET next_attempt_at = now()").execute(&stack.admin).await.unwrap();
    all.count(40).await;
}

/// A server may allow fewer connections than there are lanes: those that have one publish everything, and find out what
/// may not be published, too.
#[tokio::test]
async fn lanes_without_a_connection_keep_no_events() {
    let stack = Stack::new("relay_few_connections").await;
    let mut all = stack.subscribe("#").await;
    // One of them is this test's.
    let path = format!("vhost-limits/{}/max-connections", stack.vhost);
    stack.manage(reqwest::Method::PUT, &path, Some(json!({"value": 3}))).await;
    let path = format!("topic-permissions/{0}/{0}", stack.vhost);
    let rights = json!({"exchange": EXCHANGE, "write": r"^thing\.", "read": ""});
    stack.manage(reqwest::Method::PUT, &path, Some(rights)).await;
    one(&stack, ("bill", "b"), 1, "bill.new", r#"{"n": 1000}"#).await;
    // Of connections that come at the same moment the server may let some in beyond its limit.
    let mut relay = Relay::start(stack.command("run").env("LANES", "12")).await;
    for n in 0..10 {
        stack.append(n * 40..(n + 1) * 40, 40, &["thing.new"]).await;
        let count = usize::try_from((n + 1) * 40).unwrap();
        all.until(|m| m.iter().map(Message::number).collect::<HashSet<_>>().len() == count).await;
    }
    all.assert_order();
    eventually("the bill is set aside", async || {
        (rows(&stack).await == ["parked refused bill.new"]).then_some(())
    })
    .await;
    relay.is_ready().await;
    eventually("it says so", async || {
        relay.get("ready").await?.1.contains("of 12 connections cannot publish").then_some(())
    })
    .await;
    assert!(relay.terminate().await.success());
}
