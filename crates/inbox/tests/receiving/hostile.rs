//! Messages that no client library would send, but that anybody who may publish can: none of them ends the
//! process or the connection, and the events around them are applied.

use devstack::testing::raw::{RawPublisher, long, nested, short};
use inbox::rejected::{self, Rejected};
use lapin::{
    options::QueueDeclareOptions,
    types::{AMQPValue, FieldTable},
};

use crate::{
    consumer::World,
    support::{Recorder, event, id, until},
};

/// The deepest nesting that a frame of 128 KiB has space for, beside an event's own headers.
const DEEPEST: usize = 26_000;

/// How many queues a message passes on its way.
const DETOURS: usize = 5;

/// An event of the first version of an aggregate, with these further headers, each with its type before it.
fn properties(aggregate: &str, message_id: &[u8], headers: &[(&[u8], Vec<u8>)]) -> Vec<u8> {
    let text = |text: &[u8]| [b"S", long(text).as_slice()].concat();
    let own = [
        (b"aggregate_type".as_slice(), text(b"thing")),
        (b"aggregate_id", text(aggregate.as_bytes())),
        (b"aggregate_version", [b"l", 1i64.to_be_bytes().as_slice()].concat()),
    ];
    let table: Vec<u8> =
        own.iter().chain(headers).flat_map(|(name, value)| [short(name), value.clone()].concat()).collect();
    // headers, message_id, type, app_id
    let flags: u16 = 1 << 13 | 1 << 7 | 1 << 5 | 1 << 3;
    let texts = [short(message_id), short(b"thing.changed"), short(b"things")].concat();
    [flags.to_be_bytes().as_slice(), &long(&table), &texts].concat()
}

fn event_id(aggregate: &str) -> String {
    id(aggregate, 1, 0).to_string()
}

/// What was rejected, oldest first.
async fn all_rejected(world: &World) -> Vec<Rejected> {
    let ids: Vec<i64> =
        sqlx::query_scalar("SELECT id FROM inbox.rejected ORDER BY id").fetch_all(&world.pool).await.unwrap();
    let mut conn = world.pool.acquire().await.unwrap();
    let mut all = Vec::new();
    for id in ids {
        all.extend(rejected::message(&mut conn, "things", id, true).await.unwrap());
    }
    all
}

/// Waits until nothing is left in these queues.
async fn empty(world: &World, queues: &[&str]) {
    for queue in queues {
        until(&format!("{queue} is empty"), async || world.messages(queue).await == 0).await;
    }
}

#[tokio::test]
async fn no_headers_end_the_process_or_the_connection() {
    let world = World::new("hostile_headers").await;
    let mut running = world.start(Recorder::new("things"));
    running.until_consuming().await;
    let mut raw = RawPublisher::connect(&world.amqp).unwrap();
    assert_eq!(raw.largest(), 131_072, "what follows is made for RabbitMQ's default");

    let deep = [(b"deep".as_slice(), nested(DEEPEST))];
    let five = [(b"five".as_slice(), nested(5))];
    let four = [(b"four".as_slice(), nested(4))];
    let many: Vec<_> = (0..150).map(|n| (format!("h{n}").into_bytes(), vec![b't', 1])).collect();
    let many: Vec<(&[u8], Vec<u8>)> =
        many.iter().map(|(name, value)| (name.as_slice(), value.clone())).collect();
    let name = [(b"\xFF\xFE".as_slice(), vec![b'V'])];
    let hostile: [(&str, &[u8], Vec<u8>); 6] = [
        ("deep", b"thing.changed", properties("deep", event_id("deep").as_bytes(), &deep)),
        ("five", b"thing.changed", properties("five", event_id("five").as_bytes(), &five)),
        ("many", b"thing.changed", properties("many", event_id("many").as_bytes(), &many)),
        ("name", b"thing.changed", properties("name", event_id("name").as_bytes(), &name)),
        ("id", b"thing.changed", properties("id", b"\xFF\x00\xC3", &[])),
        // What is not UTF-8 in a routing key is no reason to refuse an event.
        ("key", b"thing.\xFF", properties("key", event_id("key").as_bytes(), &four)),
    ];
    for (n, (case, routing_key, properties)) in hostile.iter().enumerate() {
        world.publish(event("before", 1 + i64::try_from(n).unwrap(), "1")).await;
        raw.publish("events", routing_key, properties, b"1").unwrap_or_else(|e| panic!("{case}: {e}"));
    }
    world.publish(event("after", 1, "1")).await;

    world.until_version("after", 1).await;
    world.until_version("before", 6).await;
    world.until_version("key", 1).await;
    let mut shown: Vec<_> = all_rejected(&world)
        .await
        .into_iter()
        .map(|r| (r.properties["headers"]["aggregate_id"].as_str().unwrap().to_owned(), r.detail, r.times))
        .collect();
    // Two connections publish them.
    shown.sort();
    insta::assert_debug_snapshot!(shown);
    empty(&world, &["things", "things.dead"]).await;
    assert!(running.status.borrow().waiting().is_empty(), "{:?}", running.status.borrow());
    running.stop().await;
}

#[tokio::test]
async fn a_message_that_outgrew_its_frame_is_received_and_costs_the_others_nothing() {
    let world = World::new("hostile_frame").await;
    let mut running = world.start(Recorder::new("things"));
    running.until_consuming().await;
    // Queues that pass on what they get, each with a note in the headers.
    let detour = |n: usize| format!("detour.{n}.{}", "x".repeat(200));
    for n in 0..DETOURS {
        let (exchange, key) =
            if n + 1 < DETOURS { ("", detour(n + 1)) } else { ("events", "thing.changed".to_owned()) };
        let mut arguments = FieldTable::default();
        arguments.insert("x-message-ttl".into(), AMQPValue::LongInt(0));
        arguments.insert("x-dead-letter-exchange".into(), AMQPValue::LongString(exchange.into()));
        arguments.insert("x-dead-letter-routing-key".into(), AMQPValue::LongString(key.into()));
        let options = QueueDeclareOptions { durable: true, ..Default::default() };
        world.channel.queue_declare(detour(n).into(), options, arguments).await.unwrap();
    }

    let mut raw = RawPublisher::connect(&world.amqp).unwrap();
    // Almost as large as the broker takes it. What it adds on the detours goes beyond the frame.
    let without =
        8 + 12 + properties("large", event_id("large").as_bytes(), &[(b"own", b"S\0\0\0\0".to_vec())]).len();
    let text = vec![b'x'; 131_072 - 700 - without];
    let own = [(b"own".as_slice(), [b"S", long(&text).as_slice()].concat())];
    for n in 1..=5 {
        world.publish(event("others", n, "1")).await;
        raw.publish("", detour(0).as_bytes(), &properties("large", event_id("large").as_bytes(), &own), b"1")
            .unwrap();
    }
    world.publish(event("others", 6, "1")).await;

    world.until_version("others", 6).await;
    // It is an event still: all that is missing is where it has been.
    world.until_version("large", 1).await;
    empty(&world, &["things", "things.dead"]).await;
    assert_eq!(all_rejected(&world).await.len(), 0);
    running.stop().await;
}
