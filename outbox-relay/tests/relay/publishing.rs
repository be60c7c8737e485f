//! What a subscriber receives, and what becomes of what nobody takes.

use std::{collections::BTreeMap, fmt::Write};

use lapin::{
    ExchangeKind,
    options::{BasicGetOptions, QueueBindOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use sqlx::Executor;

use crate::stack::{
    BROKER_PASSWORD, DATABASE_PASSWORD, DECLARING, EXCHANGE, Message, Relay, Stack, as_of_3_10, eventually,
    output,
};

/// A message as a subscriber would describe it.
fn describe(message: &Message, user: &str) -> String {
    let mut text = format!("routing key: {}\n", message.key);
    let p = &message.properties;
    for (name, value) in [
        ("message_id", format!("{:?}", p.message_id())),
        ("type", format!("{:?}", p.kind())),
        ("app_id", format!("{:?}", p.app_id())),
        ("timestamp", format!("{:?}", p.timestamp())),
        ("content_type", format!("{:?}", p.content_type())),
        ("content_encoding", format!("{:?}", p.content_encoding())),
        ("delivery_mode", format!("{:?}", p.delivery_mode())),
        ("priority", format!("{:?}", p.priority())),
        ("correlation_id", format!("{:?}", p.correlation_id())),
        ("reply_to", format!("{:?}", p.reply_to())),
        ("expiration", format!("{:?}", p.expiration())),
        ("user_id", format!("{:?}", p.user_id()).replace(user, "the relay's user")),
    ] {
        writeln!(text, "{name}: {value}").unwrap();
    }
    for (name, value) in p.headers().as_ref().unwrap().inner() {
        match value {
            AMQPValue::LongString(s) => {
                writeln!(text, "header {name}: {:?}", std::str::from_utf8(s.as_bytes()).unwrap()).unwrap();
            }
            other => writeln!(text, "header {name}: {other:?}").unwrap(),
        }
    }
    write!(text, "body: {:?}", message.body).unwrap();
    text
}

#[tokio::test]
async fn a_message_as_a_subscriber_receives_it() {
    let stack = Stack::new("relay_message").await;
    let mut subscriber = stack.subscribe("#").await;
    let body = "{ \"cpf\" : 12345678901,\t\"value\":\n  123456789012345.1234, \"huge\": 1e400, \
                \"exact\":123456789012345678901234567890.00, \"name\": \"Ação \\u00e9 \\u0000 \\/ 😀\", \
                \"twice\":1,\"twice\":2 }  ";
    let append = "INSERT INTO outbox.event
                      (id, aggregate_type, aggregate_id, version, type, payload, headers, created_at)
                  VALUES ($1::uuid, 'person', $2, $3, $4, $5::json, $6::jsonb, '2019-06-15 19:23:55.9-03')";
    let headers = r#"{"aggregate_type": "mine", "aggregate_id": 1, "aggregate_version": 99,
        "previous_id": "01890a5d-ac96-774b-bcce-b302099a8057", "chain_start": true, "source_parent": 7,
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "baseline": true, "no": false,
        "null": null, "integer": -42, "beyond 64 bits": 9223372036854775808, "decimal": 1.50,
        "text": "Ação", "array": [1, "a"], "object": {"a": null}}"#;
    let person = "c0a8012e-0000-4000-8000-000000000001";
    sqlx::query(append)
        .bind("01890a5d-ac96-774b-bcce-b302099a8057")
        .bind(person)
        .bind(1_i64)
        .bind("person.new")
        .bind(body)
        .bind(headers)
        .execute(&stack.writer)
        .await
        .unwrap();
    let mut relay = Relay::ready(&mut stack.command("run")).await;
    let message = &subscriber.count(1).await[0];
    assert_eq!(message.body, body, "byte for byte");
    insta::assert_snapshot!(describe(message, &stack.vhost));

    // The next incarnation is another source.
    assert!(relay.terminate().await.success());
    stack.admin.execute("UPDATE outbox.source SET incarnation = 2").await.unwrap();
    sqlx::query(append)
        .bind("01890a5d-ac96-774b-bcce-b302099a8058")
        .bind(person)
        .bind(2_i64)
        .bind("person.deleted")
        .bind("null")
        .bind(None::<&str>)
        .execute(&stack.writer)
        .await
        .unwrap();
    let _relay = Relay::ready(&mut stack.command("run")).await;
    insta::assert_snapshot!(describe(&subscriber.count(2).await[1], &stack.vhost));
}

/// As the binding of CloudEvents to AMQP has them; a writer's own headers do not take their names.
#[tokio::test]
async fn a_message_with_the_attributes_of_cloudevents() {
    let stack = Stack::new("relay_cloudevents").await;
    let mut subscriber = stack.subscribe("#").await;
    let append = r#"INSERT INTO outbox.event
                        (id, aggregate_type, aggregate_id, version, type, payload, headers, created_at)
                    VALUES ('01890a5d-ac96-774b-bcce-b302099a8057', 'order', 'o-1', 1, 'order.new', '{"n": 1}',
                            '{"cloudEvents_id": "mine", "cloudEvents_other": "mine", "own": "mine"}',
                            '2019-06-15 19:23:55.9-03')"#;
    sqlx::query(append).execute(&stack.writer).await.unwrap();
    let _relay = Relay::ready(stack.command("run").env("CLOUDEVENTS", "true")).await;
    insta::assert_snapshot!(describe(&subscriber.count(1).await[0], &stack.vhost));

    // A replay is the same message once more.
    stack.settled("default", 1).await;
    stack.permit_all(include_str!("../../../deploy/permissions/replay").replace("QUEUE", "x").as_str()).await;
    let mut replay = stack.command("replay");
    replay.env("CLOUDEVENTS", "true").args(["--all", "--to-everybody", "--yes"]);
    let said = output(&mut replay).await;
    let messages = subscriber.count(2).await;
    let names = |message: &Message| -> Vec<String> {
        let headers = message.properties.headers().clone().unwrap();
        headers.inner().keys().map(ToString::to_string).filter(|name| name != "replayed").collect()
    };
    assert_eq!(names(&messages[0]), names(&messages[1]), "{said}");
}

#[tokio::test]
async fn what_no_queue_takes_is_held() {
    let stack = Stack::new("relay_hold").await;
    let mut persons = stack.subscribe("person.*").await;
    // Some of each window can be routed and some cannot.
    stack.append(0..2_000, 20, &["person.new", "score.new", "score.new"]).await;
    let relay = Relay::start(stack.command("run").env("UNROUTABLE", "hold").env("LANES", "1")).await;
    insta::assert_snapshot!(
        relay.waits("no queue").await,
        @"events: no queue takes events of type score.new: bind a queue to the exchange event_dispatcher, or let them go with --unroutable score.new=drop"
    );
    // Of the first window, which has one event of each aggregate, only what a queue took counts.
    relay.counts(7, 0).await;
    // The others wait, or wait behind one that does.
    eventually("the rest waits", async || {
        (relay.metric("outbox_relay_held_events").await? == "1993").then_some(())
    })
    .await;
    assert_eq!(persons.count(7).await.len(), 7);

    stack.bind("all", "#", FieldTable::default()).await;
    let mut all = stack.consume("all").await;
    all.until(|messages| messages.len() >= 1_993).await;
    relay.is_ready().await;
    stack.settled("default", 2_000).await;
    relay.counts(2_000, 0).await;
    // Between them, the two queues have every event, and nothing twice that was routed.
    persons.count(667).await;
    let mut by_aggregate: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    for message in &all.messages {
        by_aggregate.entry(message.header("aggregate_id")).or_default().push(message.number());
    }
    assert_eq!(by_aggregate.len(), 20);
    for numbers in by_aggregate.values() {
        assert!(numbers.is_sorted_by(|a, b| a + 20 == *b), "{numbers:?}");
    }
    let mut numbers: Vec<i64> =
        all.messages.iter().chain(&persons.messages[..7]).map(Message::number).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (0..2_000).collect::<Vec<_>>());
}

#[tokio::test]
async fn what_no_queue_takes_is_dropped_where_the_rules_say_so() {
    let stack = Stack::new("relay_drop").await;
    let mut persons = stack.subscribe("person.*").await;
    // Windows of hundreds in which every second message comes back: a return that is taken for the
    // answer to another message would drop what arrived, or count what did not.
    stack.append(0..4_000, 4_000, &["person.new", "score.new"]).await;
    let relay = Relay::start(stack.command("run").env("UNROUTABLE", "hold,score.*=drop")).await;
    stack.settled("default", 4_000).await;
    relay.is_ready().await;
    relay.counts(2_000, 2_000).await;
    let mut numbers: Vec<i64> = persons.count(2_000).await.iter().map(Message::number).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (0..4_000).step_by(2).collect::<Vec<_>>());
    assert!(persons.messages.iter().all(|m| m.key == "person.new"));
}

/// Nothing in the schema keeps a writer from using an id twice.
#[tokio::test]
async fn a_return_tells_apart_events_with_the_same_id() {
    let stack = Stack::new("relay_twin").await;
    let mut persons = stack.subscribe("person.*").await;
    let twins = "INSERT INTO outbox.event (id, aggregate_type, aggregate_id, version, type, payload)
                 SELECT '01890a5d-ac96-774b-bcce-b302099a8057', 'thing', type, 1, type, '{}'
                 FROM unnest(ARRAY['person.new', 'score.new', 'score.changed']) type";
    stack.writer.execute(twins).await.unwrap();
    let relay = Relay::ready(stack.command("run").env("UNROUTABLE", "score.*=drop")).await;
    stack.settled("default", 3).await;
    relay.counts(1, 2).await;
    assert_eq!(persons.count(1).await[0].key, "person.new");
}

#[tokio::test]
async fn a_full_queue_is_waited_for() {
    let stack = Stack::new("relay_full").await;
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(10));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    stack.bind("small", "#", arguments).await;
    stack.append(0..200, 20, &["person.new"]).await;
    let relay = Relay::start(&mut stack.command("run")).await;
    insta::assert_snapshot!(
        relay.waits("refuses").await,
        @"events: the broker refuses events of type person.new for now; is a queue at its limit?"
    );
    relay.counts(10, 0).await;

    // Room for one more at a time, so that of a window some are refused and later ones are not.
    let channel = stack.channel().await;
    let mut versions = BTreeMap::new();
    for _ in 0..200 {
        let message = eventually("there is a message", async || {
            let options = BasicGetOptions { no_ack: true };
            Some(Message::from(channel.basic_get("small".into(), options).await.unwrap()?.delivery))
        })
        .await;
        let last = versions.insert(message.header("aggregate_id"), message.header("aggregate_version"));
        let version: i64 = message.header("aggregate_version").parse().unwrap();
        assert_eq!(version, last.map_or(0, |v| v.parse().unwrap()) + 1, "in order and once");
    }
    relay.is_ready().await;
    stack.settled("default", 200).await;
    relay.counts(200, 0).await;
}

#[tokio::test]
async fn a_missing_exchange_is_waited_for() {
    let stack = Stack::without_exchange("relay_exchange").await;
    stack.append(0..5, 1, &["person.new"]).await;
    let relay = Relay::start(&mut stack.command("run")).await;
    insta::assert_snapshot!(
        relay.waits("exchange").await,
        @r#"broker: the exchange "event_dispatcher" does not exist; declare it (topic, durable), or start with --declare-exchange"#
    );
    // The program was told to declare it, but its user may not.
    let forbidden = Relay::start(stack.command("run").args(["--name", "other", "--declare-exchange"])).await;
    let said = forbidden.waits("cannot be declared").await.replace(&stack.vhost, "VHOST");
    insta::assert_snapshot!(as_of_3_10(&said));

    stack.declare_exchange(ExchangeKind::Topic).await;
    relay.waits("no queue").await;
    stack.subscribe("#").await.complete(5).await;
    relay.is_ready().await;
}

#[tokio::test]
async fn an_exchange_is_declared_if_the_relay_may() {
    let stack = Stack::without_exchange("relay_declare").await;
    stack.permit_all(DECLARING).await;
    let relay = Relay::ready(stack.command("run").env("DECLARE_EXCHANGE", "true")).await;
    let path = format!("exchanges/{}/{EXCHANGE}", stack.vhost);
    let exchange = stack.manage(reqwest::Method::GET, &path, None).await;
    assert_eq!((&exchange["type"], &exchange["durable"]), (&"topic".into(), &true.into()));
    relay.kill().await;

    stack.manage(reqwest::Method::DELETE, &path, None).await;
    stack.declare_exchange(ExchangeKind::Fanout).await;
    let relay = Relay::start(stack.command("run").arg("--declare-exchange")).await;
    let said = relay.waits("is not the durable topic exchange").await.replace(&stack.vhost, "VHOST");
    insta::assert_snapshot!(said);
    // One that declares nothing sees it as well, and doctor too; where the user may declare.
    let other = Relay::start(stack.command("run").args(["--name", "other"])).await;
    let told = other.waits("is not the durable topic exchange").await;
    assert!(told.contains("'topic'") && told.contains("'fanout'"), "both kinds: {told}");
    other.kill().await;
    let found = output(&mut stack.command("doctor")).await;
    assert!(
        found.contains("problem  exchange: the exchange \"event_dispatcher\" exists, and is not"),
        "{found}"
    );

    // Deleted and declared again while it is there.
    stack.manage(reqwest::Method::DELETE, &path, None).await;
    relay.is_ready().await;
    stack.manage(reqwest::Method::DELETE, &path, None).await;
    stack.append(0..1, 1, &["person.new"]).await;
    relay.waits("no queue").await;
    stack.subscribe("#").await.complete(1).await;
}

/// A subscriber that follows versions finds its exchange, and need not declare it. Without a queue it takes nothing.
#[tokio::test]
async fn the_exchange_by_aggregate_is_there_before_the_first_subscriber() {
    let stack = Stack::without_exchange("relay_by_aggregate").await;
    stack.permit_all(DECLARING).await;
    stack.append(0..1, 1, &["person.new"]).await;
    let mut relay = Relay::start(stack.command("run").arg("--declare-exchange")).await;
    relay.waits("no queue takes events of type person.new").await;
    let by_aggregate = format!("{EXCHANGE}.by_aggregate");
    let declared =
        stack.manage(reqwest::Method::GET, &format!("exchanges/{}/{by_aggregate}", stack.vhost), None).await;
    assert_eq!((&declared["type"], &declared["durable"]), (&"headers".into(), &true.into()));

    let channel = stack.channel().await;
    let none = FieldTable::default;
    channel.queue_declare("copy".into(), QueueDeclareOptions::default(), none()).await.unwrap();
    let mut matching = none();
    matching.insert("x-match".into(), AMQPValue::LongString("all".into()));
    matching.insert("aggregate_type".into(), AMQPValue::LongString("thing".into()));
    let bind = QueueBindOptions::default();
    channel.queue_bind("copy".into(), by_aggregate.as_str().into(), "".into(), bind, matching).await.unwrap();
    stack.consume("copy").await.complete(1).await;
    relay.is_ready().await;
    assert!(relay.terminate().await.success());

    // It publishes without it where its user may declare the main exchange alone, or where it is of another kind.
    let path = format!("exchanges/{}/{by_aggregate}", stack.vhost);
    stack.manage(reqwest::Method::DELETE, &path, None).await;
    stack.permit(&format!("^{EXCHANGE}$")).await;
    let mut all = stack.subscribe("#").await;
    let relay = Relay::ready(stack.command("run").arg("--declare-exchange")).await;
    stack.append(1..2, 1, &["person.new"]).await;
    all.count(1).await;
    let said = relay.log();
    relay.kill().await;
    assert!(said.contains("the exchange by aggregate is not declared"), "{said}");
    assert!(stack.try_manage(reqwest::Method::GET, &path, None).await.is_err());
    let fanout = serde_json::json!({"type": "fanout", "durable": true});
    stack.manage(reqwest::Method::PUT, &path, Some(fanout)).await;
    stack.permit_all(DECLARING).await;
    let relay = Relay::ready(stack.command("run").arg("--declare-exchange")).await;
    let said = relay.log();
    relay.kill().await;
    assert!(
        said.contains("the exchange by aggregate is not declared") && said.contains("'fanout'"),
        "{said}"
    );
}

/// One that declares nothing leaves it alone.
#[tokio::test]
async fn no_exchange_by_aggregate_unasked() {
    let stack = Stack::new("relay_no_by_aggregate").await;
    stack.permit_all(DECLARING).await;
    let mut all = stack.subscribe("#").await;
    stack.append(0..1, 1, &["person.new"]).await;
    let _relay = Relay::ready(&mut stack.command("run")).await;
    all.complete(1).await;
    let path = format!("exchanges/{}/{EXCHANGE}.by_aggregate", stack.vhost);
    assert!(stack.try_manage(reqwest::Method::GET, &path, None).await.is_err());
}

/// Personal data and passwords stay out of the log, whatever `LOG` says and whatever comes back.
#[tokio::test]
async fn no_log_shows_a_payload_or_a_password() {
    let stack = Stack::new("relay_log").await;
    let payload = "personal-98765432100";
    sqlx::query(
        "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
         VALUES ('person', 'a', 1, 'person.new', to_json($1::text))",
    )
    .bind(payload)
    .execute(&stack.writer)
    .await
    .unwrap();
    let log = "trace,lapin=trace,lapin::returned_messages=trace,lapin::channel=trace,lapin::io_loop=trace,\
               lapin::buffer=trace,lapin::frames=trace,lapin::connection=trace,lapin::internal_rpc=trace,\
               lapin::acknowledgement=trace,amq_protocol=trace,amq_protocol::frame=trace,sqlx=trace,\
               sqlx::query=trace";
    let relay = Relay::start(stack.command("run").env("LOG", log)).await;
    relay.waits("no queue").await;
    stack.subscribe("#").await.count(1).await;
    relay.is_ready().await;
    let log = eventually("it logs", async || {
        let log = relay.log();
        log.contains("sqlx").then_some(log)
    })
    .await;
    for secret in [payload, DATABASE_PASSWORD, BROKER_PASSWORD] {
        assert!(!log.contains(secret), "{secret} in clear");
        // As Rust prints bytes.
        let bytes = format!("{:?}", secret.as_bytes());
        assert!(!log.contains(bytes.trim_matches(['[', ']'])), "{secret} as bytes");
    }
}
