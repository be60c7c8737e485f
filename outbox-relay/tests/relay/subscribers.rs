//! Subscribers that should be there: whoever gets nothing is named, with what to do.

use std::{fs, path::PathBuf};

use lapin::{
    ExchangeKind,
    options::{ExchangeBindOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use reqwest::Method;
use serde_json::Value;
use tokio::process::Command;
use uuid::Uuid;

use crate::stack::{BROKER_PASSWORD, EXCHANGE, Relay, Stack, eventually, output, program};

/// A queue that is bound to nothing.
async fn declare(stack: &Stack, queue: &str) {
    let options = QueueDeclareOptions { durable: true, ..Default::default() };
    let channel = stack.channel().await;
    channel.queue_declare(queue.into(), options, FieldTable::default()).await.unwrap();
}

fn expecting(stack: &Stack, command: &str, expect: &str, management: Option<&str>) -> Command {
    let mut program = stack.command(command);
    program.env("EXPECT", expect);
    if let Some(url) = management {
        program.env("MANAGEMENT_URL", url);
    }
    program
}

/// What `/ready` asks attention for about subscribers; none while there is nothing.
async fn attention(relay: &Relay) -> Option<String> {
    let (_, body) = relay.get("ready").await?;
    let body: Value = serde_json::from_str(&body).unwrap();
    let said = body["attention"].as_array()?.iter().find(|said| said["part"] == "subscribers")?;
    Some(said["reason"].as_str().unwrap().to_owned())
}

async fn attends(relay: &Relay, reason: &str) -> String {
    eventually(&format!("attention: {reason}"), async || {
        attention(relay).await.filter(|said| said.contains(reason))
    })
    .await
}

async fn is_well(relay: &Relay) {
    eventually("no attention", async || attention(relay).await.is_none().then_some(())).await;
}

/// The values of a metric, by queue.
async fn values(relay: &Relay, metric: &str) -> Vec<String> {
    let (_, text) = relay.get("metrics").await.unwrap();
    let of = |line: &str| {
        let labels = line.strip_prefix(metric)?.strip_prefix('{')?;
        let (_, queue) = labels.split_once("queue=\"")?;
        Some(queue.replace("\"}", ""))
    };
    let mut values: Vec<String> = text.lines().filter_map(of).collect();
    values.sort();
    values
}

/// Asks until the broker's statistics have caught up.
async fn doctor_says(program: &mut Command, wanted: &[&str]) -> String {
    eventually(&format!("{wanted:?}"), async || {
        let said = output(program).await;
        let (_, said) = said.split_once("blocked: ")?;
        let (_, said) = said.split_once('\n').unwrap_or_default();
        (wanted.iter().all(|wanted| said.contains(wanted)) && !said.contains("an unknown number"))
            .then(|| said.to_owned())
    })
    .await
}

/// The commonest mistake with RabbitMQ: its consumer runs, and nothing comes.
#[tokio::test]
async fn an_unbound_queue_beside_a_bound_one() {
    let stack = Stack::new("subscribers_unbound").await;
    let mut bound = stack.subscribe("#").await;
    declare(&stack, "mail").await;
    let mail = stack.consume("mail").await;
    let management = stack.management_url().await;
    let expect = r##"[{"queue": "mail", "types": ["thing.*"]}, {"queue": "#", "types": ["thing.new"]}]"##;
    let relay = Relay::ready(&mut expecting(&stack, "run", expect, Some(&management))).await;
    stack.append(0..10, 5, &["thing.new"]).await;
    bound.complete(10).await;
    assert_told!("an unbound queue", attends(&relay, "the queue mail").await);
    let ok = async || values(&relay, "outbox_relay_expected_subscribers").await;
    eventually("mail is not as expected", async || (ok().await == ["# 1", "mail 0"]).then_some(())).await;
    let consumers = async || values(&relay, "outbox_relay_expected_subscriber_consumers").await;
    eventually("both have a consumer", async || (consumers().await == ["# 1", "mail 1"]).then_some(())).await;

    let id: Uuid = sqlx::query_scalar("SELECT id FROM outbox.event WHERE position = 1")
        .fetch_one(&stack.admin)
        .await
        .unwrap();
    let trace = async |management: Option<&str>| {
        let mut trace = stack.command("trace");
        if let Some(url) = management {
            trace.env("MANAGEMENT_URL", url);
        }
        output(trace.arg(id.to_string())).await.replace(&id.to_string(), "EVENT")
    };
    assert_told!("trace of an event of which the bindings are known", trace(Some(&management)).await);
    assert!(!trace(None).await.contains("queues"));
    assert_told!("trace without the management API", trace(Some("http://a:b@127.0.0.1:1")).await);

    // As the advice has it.
    let path = format!("bindings/{}/e/{EXCHANGE}/q/mail", stack.vhost);
    let body = serde_json::json!({"routing_key": "thing.*"});
    stack.manage(Method::POST, &path, Some(body)).await;
    is_well(&relay).await;
    eventually("mail is as expected", async || (ok().await == ["# 1", "mail 1"]).then_some(())).await;
    drop(mail);
}

#[tokio::test]
async fn each_way_to_get_nothing() {
    let stack = Stack::new("subscribers_ways").await;
    stack.bind("wrong", "things.*", FieldTable::default()).await;
    stack.bind("part", "thing.new", FieldTable::default()).await;
    stack.bind("idle", "#", FieldTable::default()).await;
    let _consumers = (stack.consume("wrong").await, stack.consume("part").await);
    let expect = r#"[{"queue": "wrong", "types": ["thing.*"]}, {"queue": "part", "types": ["thing.new", "thing.changed"]},
                     {"queue": "idle", "types": ["thing.#"]}, {"queue": "absent", "types": ["thing.new"]}]"#;
    let management = stack.management_url().await;
    let mut doctor = expecting(&stack, "doctor", expect, Some(&management));
    let said = doctor_says(&mut doctor, &["wrong is not", "nothing consumes", "wrong: ", "1 consumer"]).await;
    let one_consumer = |queue: &str| {
        let of = said.lines().find(|line| line.contains(&format!("subscriber {queue}:")));
        of.is_some_and(|line| !line.contains("nothing consumes"))
    };
    assert!(one_consumer("wrong") && one_consumer("part"), "{said}");
    assert_told!("doctor of subscribers that get nothing", said);

    // RabbitMQ 4 lets no user see a queue that has no right to it.
    let mut doctor = expecting(&stack, "doctor", expect, None);
    doctor_says(&mut doctor, &["the queue absent does not exist"]).await;
    stack.permit_all(".*\n.*\n.*").await;
    // AMQP knows no bindings.
    let mut doctor = expecting(&stack, "doctor", expect, None);
    let said = doctor_says(&mut doctor, &["absent"]).await;
    assert_told!("doctor by passive declarations", crate::stack::as_of_3_10(&said));
}

#[tokio::test]
async fn both_exchanges() {
    let stack = Stack::new("subscribers_exchanges").await;
    let channel = stack.channel().await;
    let by_aggregate = format!("{EXCHANGE}.by_aggregate");
    for (name, kind) in [(&*by_aggregate, ExchangeKind::Headers), ("orders", ExchangeKind::Fanout)] {
        let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
        channel.exchange_declare(name.into(), kind, options, FieldTable::default()).await.unwrap();
    }
    let (options, none) = (ExchangeBindOptions::default(), FieldTable::default());
    channel
        .exchange_bind(by_aggregate.as_str().into(), EXCHANGE.into(), "#".into(), options, none.clone())
        .await
        .unwrap();
    channel.exchange_bind("orders".into(), EXCHANGE.into(), "order.*".into(), options, none).await.unwrap();
    for (queue, exchange, aggregate_type) in
        [("things", &*by_aggregate, Some("thing")), ("all", &*by_aggregate, None), ("mail", "orders", None)]
    {
        declare(&stack, queue).await;
        let mut arguments = FieldTable::default();
        if let Some(aggregate_type) = aggregate_type {
            arguments.insert("aggregate_type".into(), AMQPValue::LongString(aggregate_type.into()));
        }
        let options = QueueBindOptions::default();
        channel.queue_bind(queue.into(), exchange.into(), "".into(), options, arguments).await.unwrap();
    }
    let mut consumers = Vec::new();
    for queue in ["things", "all", "mail"] {
        consumers.push(stack.consume(queue).await);
    }
    let management = stack.management_url().await;
    let expect = r##"[{"queue": "things", "types": ["thing.*"]}, {"queue": "all", "types": ["#"]},
                     {"queue": "mail", "types": ["order.new", "thing.new"]}]"##;
    let mut doctor = expecting(&stack, "doctor", expect, Some(&management));
    let wanted = ["things: 1 consumer", "all: 1 consumer", "1 consumer, 0 messages; it gets order.new"];
    assert_told!("doctor of subscribers behind exchanges", doctor_says(&mut doctor, &wanted).await);

    stack.append(0..1, 1, &["order.new"]).await;
    let trace = output(stack.command("trace").env("MANAGEMENT_URL", &management).arg("thing/a0")).await;
    assert!(
        trace.contains("queues, by the bindings of now: all, mail, things\n")
            || trace.ends_with("all, mail, things"),
        "{trace}"
    );
}

#[tokio::test]
async fn a_management_api_that_cannot_be_asked() {
    let stack = Stack::new("subscribers_management").await;
    stack.permit_all(".*\n.*\n.*").await;
    let _stock = stack.subscribe("#").await;
    let expect = r##"[{"queue": "#", "types": ["thing.*"]}, {"queue": "absent", "types": ["thing.*"]}]"##;
    let mut away = expecting(&stack, "run", expect, Some("http://monitor:mqs3cretmqs3cret@127.0.0.1:1"));
    let relay = Relay::ready(&mut away).await;
    // What AMQP knows is said all the same.
    assert_told!("the management API is away", attends(&relay, "absent").await);
    let ok = async || values(&relay, "outbox_relay_expected_subscribers").await;
    eventually("passively", async || (ok().await == ["# 1", "absent 0"]).then_some(())).await;

    let url = stack.management_url().await.replace(BROKER_PASSWORD, "other");
    let mut doctor = expecting(&stack, "doctor", expect, Some(&url));
    let said = doctor_says(&mut doctor, &["management API"]).await;
    assert_told!("a user whom the management API does not let in", crate::stack::as_of_3_10(&said));
}

/// That is said by the part `broker`, and nothing is known of the queues.
#[tokio::test]
async fn a_broker_that_is_away_is_no_attention_of_subscribers() {
    let stack = Stack::new("subscribers_away").await;
    let expect = r#"[{"queue": "mail", "types": ["thing.*"]}]"#;
    let mut away = expecting(&stack, "run", expect, Some("http://a:b@127.0.0.1:1"));
    away.env("AMQP_URL", "amqp://relay:mqs3cretmqs3cret@127.0.0.1:1/%2f").env("LOG", "outbox_relay=debug");
    let relay = Relay::start(&mut away).await;
    let asked = async || relay.log().contains("expected subscribers cannot be looked for").then_some(());
    eventually("the broker was asked", asked).await;
    assert_eq!(attention(&relay).await, None);
    assert_eq!(values(&relay, "outbox_relay_expected_subscribers").await, ["mail 0"]);
    // Nothing is known by it, and it waits for nothing.
    let waiting = relay.waits("no connection to RabbitMQ").await;
    assert!(!waiting.contains("subscribers"), "{waiting}");
}

#[tokio::test]
async fn tables_in_the_configuration_file() {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("expect-{}", Uuid::new_v4()));
    fs::create_dir(&folder).unwrap();
    let mail = "[[expect]]\nqueue = \"mail\"\ntypes = [\"order.*\", \"shop.new\"]\n";
    let two = format!("{mail}[[expect]]\nqueue = \"stock\"\ntypes = [\"#\"]\n");
    let urls = "database-url-file = \"FOLDER/url\"\n";
    let outboxes = format!(
        "{urls}{mail}[outbox.shop]\n[[outbox.shop.expect]]\nqueue = \"shop\"\ntypes = [\"shop.#\"]\n[outbox.bank]\nname = \"b\"\n"
    );
    fs::write(folder.join("url"), "postgres://relay@127.0.0.1:1/person").unwrap();
    let long = format!("[[expect]]\nqueue = \"{}\"\ntypes = [\"#\"]\n", "q".repeat(256));
    let mut said = Vec::new();
    for (case, file) in [
        ("several", format!("{urls}{two}")),
        ("of outboxes", outboxes),
        ("an unknown field", format!("{urls}[[expect]]\nqueue = \"mail\"\ntype = [\"order.*\"]\n")),
        ("an empty pattern", format!("{urls}[[expect]]\nqueue = \"mail\"\ntypes = [\"\"]\n")),
        ("a long name", format!("{urls}{long}")),
        ("no list", format!("{urls}expect = \"mail\"\n")),
        ("no list of an outbox", format!("{urls}[outbox.shop]\nexpect = 1\n")),
    ] {
        let path = folder.join("relay.toml");
        fs::write(&path, file.replace("FOLDER", folder.to_str().unwrap())).unwrap();
        let mut program = program();
        program.env("CONFIG_FILE", &path).env("AMQP_URL", "amqp://a:b@c/%2f").args(["run", "--check-config"]);
        program.env("MANAGEMENT_URL", "https://monitor:mqs3cretmqs3cret@mq:15671");
        let shown = output(&mut program).await;
        let of = |line: &&str| {
            ["expect", "management", "error", "exit", "[outbox", "Settings", "queue", "types"]
                .iter()
                .any(|word| line.contains(word))
        };
        let shown: Vec<&str> = shown.lines().filter(of).collect();
        said.push(format!("## {case}\n{}", shown.join("\n")));
    }
    insta::assert_snapshot!(said.join("\n\n").replace(folder.to_str().unwrap(), "FOLDER"));
    fs::remove_dir_all(&folder).unwrap();
}
