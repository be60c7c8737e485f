//! The whole system: four requests become a score, and a bad day on one side is none on the other.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a panic in a test is the report")]

mod support;

use std::{collections::BTreeMap, fmt::Write, time::Instant};

use devstack::{
    stack::{Addresses, Stack},
    testing::{DEADLINE, eventually},
};
use futures_util::StreamExt;
use lapin::{
    Channel, Connection, ConnectionProperties, Consumer, ExchangeKind,
    message::Delivery,
    options::{BasicConsumeOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use support::{Answer, Apis, payload, stack};
use tokio_util::sync::CancellationToken;

const CPF: u64 = 11111;

/// The README's requests in their order: path below `/person`, and sample.
const REQUESTS: [(&str, &str); 4] =
    [("", "person"), ("/11111/income", "income"), ("/11111/asset", "asset"), ("/11111/debt", "debt")];

#[tokio::test]
async fn the_samples_become_a_score() {
    let stack = stack().await;
    let addresses = stack.addresses();
    let apis = Apis::of(&addresses);
    let mut subscriber = Subscriber::of_everything(&addresses.amqp_url).await;
    let mut plain = Names::default();

    let mut answers = Vec::new();
    for (path, sample) in REQUESTS {
        let answer = apis.post(&format!("/person{path}"), payload(sample)).await;
        answers.push(format!("POST /person{path}\n{}", answer.shown()));
    }
    let written = Instant::now();
    let score = apis.until_score(CPF, 5000 + 20 - 50).await;
    eprintln!("the score was there {:?} after the last write", written.elapsed());
    answers.push(format!("GET /{CPF}/score\n{}", score.shown()));
    let entries = apis.read(&format!("/{CPF}/score/entries")).await;
    answers.push(format!("GET /{CPF}/score/entries\n{}", entries.shown()));
    let document = apis.read("/openapi.json").await.json();
    for (schema, answer) in [("Score", &score), ("Entries", &entries)] {
        let example = &document["components"]["schemas"][schema]["examples"][0];
        assert_eq!(plainly(example), plainly(&answer.json()), "the example of {schema}");
    }
    insta::assert_snapshot!("answers", plain.name(&answers.join("\n")));

    let events = "SELECT * FROM outbox.event ORDER BY position";
    insta::assert_snapshot!("outbox_of_person", plain.rows(&addresses.person_database_url, events).await);
    insta::assert_snapshot!("outbox_of_score", plain.rows(&addresses.score_database_url, events).await);

    // Both relays publish into the one exchange, so only the order within each source is certain.
    let mut messages: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for _ in 0..REQUESTS.len() + 3 {
        let message = subscriber.next().await;
        let source = message.properties.app_id().clone().unwrap().to_string();
        messages.entry(source).or_default().push(shown(&message));
    }
    for (source, messages) in messages {
        insta::assert_snapshot!(format!("messages_of_{source}"), plain.name(&messages.join("\n")));
    }

    let mut model = String::new();
    for (table, order) in [
        ("score.person", "id"),
        ("score.entry", "id"),
        ("inbox.aggregate", "1, 2, 3, 4"),
        ("inbox.held", "1"),
        ("inbox.rejected", "1"),
    ] {
        let sql = format!("SELECT * FROM {table} ORDER BY {order}");
        let rows = plain.rows(&addresses.score_database_url, &sql).await;
        writeln!(model, "{table}:\n{rows}").unwrap();
    }
    // Four bytes of each of four ids.
    insta::with_settings!({filters => vec![(r#""recent":"\\\\x[0-9a-f]{32}""#, r#""recent":"<ids>""#)]}, {
        insta::assert_snapshot!("read_model", model);
    });
    stack.stop(&CancellationToken::new()).await;
}

/// Without what differs each time: ids and times.
fn plainly(json: &Value) -> Value {
    match json {
        Value::String(text) if text.len() > 20 => json!("id or time"),
        Value::Array(list) => list.iter().map(plainly).collect(),
        Value::Object(object) => object.iter().map(|(name, value)| (name.clone(), plainly(value))).collect(),
        other => other.clone(),
    }
}

#[tokio::test]
async fn a_bad_day_on_one_side_is_none_on_the_other() {
    let mut stack = stack().await;
    let no_hurry = CancellationToken::new();
    let apis = Apis::of(&stack.addresses());

    // The broker is away: writes are accepted, and arrive later.
    accepted(&apis.post("/person", payload("person")).await);
    stack.servers.rabbitmq.stop(&no_hurry).await;
    accepted(&apis.post("/person/11111/income", payload("income")).await);
    accepted(&apis.post("/person/11111/asset", payload("asset")).await);
    let reason = eventually("the relay says why it is not ready", async || {
        stack.person_relay.not_ready().await.ok_or_else(|| "ready".to_owned())
    })
    .await;
    assert!(reason.contains("broker"), "{reason}");
    assert_eq!(stack.person_api.not_ready().await, None, "the person side does not need the broker");
    stack.servers.rabbitmq.start().await.unwrap();
    apis.until_score(CPF, 5020).await;

    // The score side is away: the person side does not notice.
    stack.score_projector.stop(&no_hurry).await;
    stack.score_relay.stop(&no_hurry).await;
    stack.score_api.stop(&no_hurry).await;
    accepted(&apis.post("/person/11111/debt", payload("debt")).await);
    eventually("the relay publishes what nobody fetches", async || unpublished(&stack).await).await;
    assert_eq!(stack.person_api.not_ready().await, None);
    for program in [&mut stack.score_projector, &mut stack.score_relay, &mut stack.score_api] {
        program.start().await.unwrap();
        program.ready(DEADLINE).await.unwrap();
    }
    apis.until_score(CPF, 4970).await;
    stack.stop(&no_hurry).await;
}

/// A subscriber that begins late gets everybody's state by baselines; to one that has everything they say
/// nothing new. And whether a subscriber is right is one command.
#[tokio::test]
async fn a_late_subscriber_begins_with_baselines() {
    let mut stack = stack().await;
    let no_hurry = CancellationToken::new();
    let (addresses, apis) = (stack.addresses(), Apis::of(&stack.addresses()));
    for (path, sample) in REQUESTS {
        accepted(&apis.post(&format!("/person{path}"), payload(sample)).await);
    }
    apis.until_score(CPF, 4970).await;
    compare(&stack).await.unwrap();

    let mut score = PgConnection::connect(&addresses.score_database_url).await.unwrap();
    let everybody = [("DATABASE_URL", &*addresses.person_database_url)];
    stack.person_api.command(&["republish", "--all"], &everybody).await.unwrap();
    // The samples are versions 1 to 4, so each baseline is the next one.
    until_version(&apis, 5).await;
    compare(&stack).await.unwrap();
    let published = "SELECT count(*) FROM outbox.event";
    assert_eq!(sqlx::query_scalar::<_, i64>(published).fetch_one(&mut score).await.unwrap(), 3);

    // As if the score service had begun only now.
    stack.score_projector.stop(&no_hurry).await;
    let nothing = "TRUNCATE score.person, score.entry, inbox.aggregate, outbox.event";
    sqlx::query(nothing).execute(&mut score).await.unwrap();
    stack.score_projector.start().await.unwrap();
    stack.score_projector.ready(DEADLINE).await.unwrap();
    let refused = compare(&stack).await.unwrap_err();
    assert!(format!("{refused:#}").contains("has received nothing of person"), "{refused:#}");
    stack.person_api.command(&["republish", "--all"], &everybody).await.unwrap();
    apis.until_score(CPF, 4970).await;
    compare(&stack).await.unwrap();
    assert_eq!(sqlx::query_scalar::<_, i64>(published).fetch_one(&mut score).await.unwrap(), 3);
    stack.stop(&no_hurry).await;
}

/// Holds the read model's inbox against the outbox of the person service.
async fn compare(stack: &Stack) -> anyhow::Result<()> {
    let Addresses { person_database_url, score_database_url, .. } = stack.addresses();
    let databases = [("DATABASE_URL", &*person_database_url), ("INBOX_DATABASE_URL", &score_database_url)];
    stack.person_relay.command(&["digest", "--consumer", "score"], &databases).await
}

async fn until_version(apis: &Apis, version: i64) {
    eventually(&format!("version {version}"), async || {
        let answer = apis.score(CPF).await;
        if answer.json()["version"] == version { Ok(()) } else { Err(answer.shown()) }
    })
    .await;
}

fn accepted(answer: &Answer) {
    assert_eq!(answer.status, 201, "{}", answer.shown());
}

/// How many events of the database `person` its relay has not settled yet, unless there are none.
async fn unpublished(stack: &Stack) -> Result<(), String> {
    let mut conn = PgConnection::connect(&stack.addresses().person_database_url).await.unwrap();
    let sql = "SELECT count(*) FROM outbox.event WHERE position > (SELECT low_water FROM outbox.relay)";
    let left: i64 = sqlx::query_scalar(sql).fetch_one(&mut conn).await.unwrap();
    if left == 0 { Ok(()) } else { Err(format!("{left} events")) }
}

/// A plain consumer, as anybody would write it in any language.
struct Subscriber {
    consumer: Consumer,
    _channel: Channel,
    _connection: Connection,
}

impl Subscriber {
    async fn of_everything(amqp: &str) -> Self {
        let connection = Connection::connect(amqp, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        let (exchange, queue) = ("event_dispatcher", "everything");
        let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
        let none = FieldTable::default;
        channel.exchange_declare(exchange.into(), ExchangeKind::Topic, durable, none()).await.unwrap();
        let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
        channel.queue_declare(queue.into(), exclusive, none()).await.unwrap();
        let options = QueueBindOptions::default();
        channel.queue_bind(queue.into(), exchange.into(), "#".into(), options, none()).await.unwrap();
        let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
        let consumer = channel.basic_consume(queue.into(), "test".into(), options, none()).await.unwrap();
        Self { consumer, _channel: channel, _connection: connection }
    }

    async fn next(&mut self) -> Delivery {
        let next = tokio::time::timeout(DEADLINE, self.consumer.next()).await;
        next.expect("a message in time").unwrap().unwrap()
    }
}

/// A message with everything that a subscriber sees of it.
fn shown(message: &Delivery) -> String {
    let properties = &message.properties;
    let text = |value: &Option<lapin::types::ShortString>| value.as_ref().map(ToString::to_string);
    let headers: BTreeMap<_, _> = properties.headers().iter().flat_map(FieldTable::inner).collect();
    let headers: Vec<_> =
        headers.iter().map(|(name, value)| format!("  {name}: {}", header(value))).collect();
    let timestamp = properties.timestamp().expect("a timestamp");
    assert!((1_600_000_000..10_000_000_000).contains(&timestamp), "seconds since 1970: {timestamp}");
    let properties = json!({
        "message_id": text(properties.message_id()),
        "type": text(properties.kind()),
        "app_id": text(properties.app_id()),
        "timestamp": "seconds",
        "content_type": text(properties.content_type()),
        "delivery_mode": properties.delivery_mode(),
        // Unused ones stay away.
        "correlation_id": text(properties.correlation_id()),
        "reply_to": text(properties.reply_to()),
        "expiration": text(properties.expiration()),
        "user_id": text(properties.user_id()),
        "priority": properties.priority(),
        "content_encoding": text(properties.content_encoding()),
    });
    let set = properties.as_object().unwrap().iter().filter(|(_, value)| !value.is_null());
    let set: Vec<_> = set.map(|(name, value)| format!("{name}: {value}")).collect();
    format!(
        "exchange {} routing key {}\n{}\nheaders:\n{}\nbody: {}\n",
        message.exchange,
        message.routing_key,
        set.join("\n"),
        headers.join("\n"),
        String::from_utf8_lossy(&message.data),
    )
}

/// A header's value with its AMQP type.
fn header(value: &AMQPValue) -> String {
    match value {
        AMQPValue::LongString(text) => format!("{:?}", String::from_utf8_lossy(text.as_bytes())),
        other => format!("{other:?}"),
    }
}

/// Gives what differs in every run a name that does not, the same name for the same value, so that a
/// snapshot shows what belongs together. Whatever does not look like an id or a time stays as it is.
#[derive(Default)]
struct Names {
    ids: Vec<String>,
}

impl Names {
    /// The rows of a query as lines of JSON.
    async fn rows(&mut self, database: &str, sql: &str) -> String {
        let mut conn = PgConnection::connect(database).await.unwrap();
        // `json`, not `jsonb`: columns in their order, payloads byte for byte.
        let sql = format!("SELECT row_to_json(row)::text FROM ({sql}) row");
        let rows: Vec<String> = sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(&mut conn).await.unwrap();
        self.name(&rows.join("\n"))
    }

    fn name(&mut self, text: &str) -> String {
        let mut named = String::new();
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            let taken = if let Some(id) = rest.get(..36).filter(|text| is_id(text)) {
                let known = self.ids.iter().position(|known| known == id);
                let number = known.unwrap_or_else(|| {
                    self.ids.push(id.to_owned());
                    self.ids.len() - 1
                });
                write!(named, "<id {}>", number + 1).unwrap();
                36
            } else if let Some(length) = time(rest) {
                named.push_str("<time>");
                length
            } else {
                named.push(first);
                first.len_utf8()
            };
            rest = &rest[taken..];
        }
        named
    }
}

/// A UUID of version 7, in lower case.
fn is_id(text: &str) -> bool {
    uuid::Uuid::parse_str(text)
        .is_ok_and(|id| id.get_version_num() == 7 && id.hyphenated().to_string() == text)
}

/// The length of the RFC 3339 time of this run that `text` begins with. The sample's date of birth is
/// no such time: it has no fraction of a second.
fn time(text: &str) -> Option<usize> {
    let pattern = "dddd-dd-ddTdd:dd:dd.";
    let fits = |(c, p): (char, char)| if p == 'd' { c.is_ascii_digit() } else { c == p };
    let seconds = text.get(..pattern.len())?;
    if !seconds.chars().zip(pattern.chars()).all(fits) {
        return None;
    }
    let fraction = text[pattern.len()..].chars().take_while(char::is_ascii_digit).count();
    let zone = &text[pattern.len() + fraction..];
    let zone = if zone.starts_with('Z') { 1 } else { zone.starts_with("+00:00").then_some(6)? };
    Some(pattern.len() + fraction + zone)
}

#[test]
fn names_are_the_same_for_the_same_id() {
    let id = uuid::Uuid::now_v7();
    let other = uuid::Uuid::now_v7();
    let text = format!("{id} {other} {id} 2026-01-02T03:04:05.678901Z 2019-06-15T19:23:55-03:00");
    assert_eq!(Names::default().name(&text), "<id 1> <id 2> <id 1> <time> 2019-06-15T19:23:55-03:00");
}
