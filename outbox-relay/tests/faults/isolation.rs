//! One event, or one queue, is nobody else's outage: what needs a broker of its own.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use devstack::rabbitmq::RabbitMq;
use lapin::{
    ExchangeKind,
    options::{ExchangeBindOptions, ExchangeDeclareOptions, QueueBindOptions},
    types::{AMQPValue, FieldTable},
};
use reqwest::Method;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::{
    field::{Field, QUEUE},
    stack::{BROKER_PASSWORD, EXCHANGE, Subscriber, eventually},
};

/// Appends one event with this body, and returns its position.
async fn append(field: &Field, aggregate: &str, version: i64, type_: &str, body: &str) -> i64 {
    sqlx::query_scalar(
        "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
         VALUES ('thing', $1, $2, $3, $4::json) RETURNING position",
    )
    .bind(aggregate)
    .bind(version)
    .bind(type_)
    .bind(body)
    .fetch_one(&field.stack.writer)
    .await
    .unwrap()
}

/// The broker takes bodies of 64 KiB, and the outbox has one type alone, so that nothing of another type tells that the
/// broker is well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: make test-faults"]
async fn an_event_that_is_too_large_for_the_broker() {
    let mut field = Field::new("faults_large").await;
    field.servers.rabbitmq.limit_bodies(64 * 1024).await.unwrap();
    let mut all = field.stack.consume(QUEUE).await;
    let mut run = field.run();
    field.add(&mut run).await;

    let note = "x".repeat(80_000);
    append(&field, "large", 1, "order.new", &json!({"n": 100, "note": note}).to_string()).await;
    let mut last = 0;
    for n in 0..5 {
        last = append(&field, &format!("small{n}"), 1, "order.new", &json!({"n": n}).to_string()).await;
    }
    all.complete(5).await;
    let (large, rest): (Vec<String>, Vec<String>) = eventually("the large event is set aside", async || {
        let sql =
            "SELECT format('%s %s %s: %s', state, reason, aggregate_id, replace(detail, id::text, 'ID'))
                       FROM outbox.parked";
        let rows: Vec<String> = sqlx::query_scalar(sql).fetch_all(&field.stack.admin).await.unwrap();
        let (large, rest) = rows.into_iter().partition(|row: &String| row.contains(" large: "));
        let large: Vec<String> = large;
        large.iter().any(|row| row.starts_with("parked ")).then_some((large, rest))
    })
    .await;
    assert!(rest.is_empty(), "{rest:?}");
    insta::assert_snapshot!(
        large.join("\n"),
        @"parked refused large: event ID of type order.new: PRECONDITION_FAILED - message size 80019 is larger than configured max size 65536"
    );
    field.stack.settled("default", last).await;
    field.relays[0].is_ready().await;
    // Nothing of it is repeated: the small ones came twice at most, when the channel ended over the large one.
    assert!(all.messages.len() <= 10, "{} messages", all.messages.len());

    // With a larger limit, by hand.
    field.servers.rabbitmq.limit_bodies(128 * 1024).await.unwrap();
    eventually("it comes", async || {
        let retry = field.stack.command("parked").args(["retry", "--all"]).output().await.unwrap();
        assert!(retry.status.success(), "{retry:?}");
        // A channel that is open keeps the limit of before; one refusal more opens another.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let sql = "SELECT NOT EXISTS (SELECT FROM outbox.parked)";
        sqlx::query_scalar::<_, bool>(sql).fetch_one(&field.stack.admin).await.unwrap().then_some(())
    })
    .await;
    all.until(|messages| messages.iter().any(|message| message.number() == 100)).await;
    field.end().await;
}

/// Events of the queue without a majority: more than the 33 that would stop a connection, on each of the lanes.
const SILENT: i64 = 200;
/// Events of others at a time.
const OTHERS: i64 = 500;
/// Aggregates of a type whose events go to several queues; those below this number, to the one without a majority, too.
const MIXED: i64 = 50;
const DEAD: i64 = 10;

/// A broker of three nodes, of which two are killed.
struct Cluster {
    field: Field,
    peers: Vec<RabbitMq>,
    /// Events of type `other.new` so far.
    others: i64,
    other: Subscriber,
}

impl Cluster {
    /// The quorum queue `quorum` is on all nodes; the others, and the relay, on the first alone.
    async fn new() -> Self {
        let mut field = Field::new("faults_majority").await;
        let mut peers = Vec::new();
        for number in [2, 3] {
            let mut peer = field.servers.rabbitmq.peer(&field.folder, number).unwrap();
            peer.start().await.unwrap();
            peers.push(peer);
        }
        let (stack, none) = (&field.stack, FieldTable::default());
        stack.manage(Method::DELETE, &format!("queues/{}/{QUEUE}", stack.vhost), None).await;
        let text = |text: &str| AMQPValue::LongString(text.into());
        let mut quorum = none.clone();
        quorum.insert("x-queue-type".into(), text("quorum"));
        stack.bind("quorum", "silent.*", quorum).await;
        stack.bind("classic", "other.*", none.clone()).await;
        stack.bind("siblings", "mixed.*", none.clone()).await;
        let channel = stack.channel().await;
        let by_aggregate = format!("{EXCHANGE}.by_aggregate");
        let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
        let name = || by_aggregate.as_str().into();
        channel.exchange_declare(name(), ExchangeKind::Headers, durable, none.clone()).await.unwrap();
        let options = ExchangeBindOptions::default();
        channel.exchange_bind(name(), EXCHANGE.into(), "mixed.*".into(), options, none).await.unwrap();
        for dead in 0..DEAD {
            let mut of = FieldTable::default();
            of.insert("aggregate_id".into(), text(&format!("m{dead}")));
            let options = QueueBindOptions::default();
            channel.queue_bind("quorum".into(), name(), "".into(), options, of).await.unwrap();
        }
        eventually("the queue has all its members", async || {
            let path = format!("queues/{}/quorum", stack.vhost);
            let told = stack.try_manage(Method::GET, &path, None).await.ok()?;
            (told["online"].as_array()?.len() == 3).then_some(())
        })
        .await;
        let address = field.servers.rabbitmq.url();
        let (address, vhost) = (address.rsplit_once('@').unwrap().1, &field.stack.vhost);
        let url = format!("amqp://{vhost}:{BROKER_PASSWORD}@{address}/{vhost}");
        let mut run = field.run();
        run.env("AMQP_URL", url);
        field.add(&mut run).await;
        let other = field.stack.consume("classic").await;
        Self { field, peers, others: 0, other }
    }

    /// Appends events that are no business of the queue without a majority, and says how long it takes until all are
    /// there.
    async fn others(&mut self) -> Duration {
        let began = Instant::now();
        for n in self.others..self.others + OTHERS {
            // Every second one is of an aggregate of its own.
            let k = n / 2;
            let (aggregate, version) =
                if n % 2 == 0 { (format!("o{n}"), 1) } else { (format!("c{}", k % 50), k / 50 + 1) };
            append(&self.field, &aggregate, version, "other.new", &json!({"n": n}).to_string()).await;
        }
        self.others += OTHERS;
        self.other.complete(usize::try_from(self.others).unwrap()).await;
        began.elapsed()
    }

    /// Of one type, events of which some wait for the queue without a majority. The others are there, in their order.
    async fn mixed(&self, siblings: &mut Subscriber, round: i64) -> Duration {
        let began = Instant::now();
        for n in 0..OTHERS {
            let version = round * OTHERS / MIXED + n / MIXED + 1;
            let (aggregate, body) = (format!("m{}", n % MIXED), json!({"n": version}).to_string());
            append(&self.field, &aggregate, version, "mixed.new", &body).await;
        }
        let last = (round + 1) * OTHERS / MIXED;
        siblings
            .until(|messages| {
                let done = messages.iter().filter(|message| message.number() == last);
                let done: HashSet<String> = done.map(|message| message.header("aggregate_id")).collect();
                (DEAD..MIXED).all(|n| done.contains(&format!("m{n}")))
            })
            .await;
        began.elapsed()
    }
}

/// Two of three nodes are killed: a quorum queue on all three does not answer any more. Everything else goes on, also what
/// has the same type.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: make test-faults"]
async fn a_queue_that_has_lost_its_majority() {
    let mut cluster = Cluster::new().await;
    let well = cluster.others().await;
    for peer in &mut cluster.peers {
        peer.kill().await;
    }
    // The silent ones, of many aggregates, and one aggregate's chain.
    for n in 0..SILENT {
        let (aggregate, version) =
            if n % 4 == 0 { ("chain".to_owned(), n / 4 + 1) } else { (format!("s{n}"), 1) };
        append(&cluster.field, &aggregate, version, "silent.new", &json!({"n": n}).to_string()).await;
    }
    // The first ones meet connections that stand still.
    let (first, then) = (cluster.others().await, cluster.others().await);
    println!("{OTHERS} events: {well:?} with all nodes, {first:?} once the queue is silent, then {then:?}");
    let mut siblings = cluster.field.stack.consume("siblings").await;
    let first = cluster.mixed(&mut siblings, 0).await;
    let (then, beside) = (cluster.mixed(&mut siblings, 1).await, cluster.others().await);
    println!(
        "{OTHERS} events, some for the silent queue: {first:?}, then {then:?}; others meanwhile {beside:?}"
    );

    // What is silent waits in the database, and the mark goes on. It goes out again and again, and stops nobody.
    let stack = &cluster.field.stack;
    cluster.field.progress("a queue without a majority").await;
    let rows = "SELECT count(*) FROM outbox.parked WHERE state = 'waiting'";
    let silent = SILENT + 2 * OTHERS / MIXED * DEAD;
    eventually("all that is silent waits", async || {
        (sqlx::query_scalar::<_, i64>(rows).fetch_one(&stack.admin).await.unwrap() == silent).then_some(())
    })
    .await;
    let (_, told) = cluster.field.relays[0].get("ready").await.unwrap();
    let (majority, others) = ("lost the majority of its nodes?", "everything else goes on");
    assert!(told.contains(majority) && told.contains(others), "{told}");
    let later = cluster.others().await;
    println!("{OTHERS} events while all that is silent waits in the database: {later:?}");

    for peer in &mut cluster.peers {
        peer.start().await.unwrap();
    }
    let stack = &cluster.field.stack;
    let mut quorum = stack.consume("quorum").await;
    quorum
        .until(|messages| {
            let ids: HashSet<_> =
                messages.iter().map(|message| message.properties.message_id().clone().unwrap()).collect();
            ids.len() >= usize::try_from(silent).unwrap()
        })
        .await;
    eventually("nothing waits", async || {
        (sqlx::query_scalar::<_, i64>(rows).fetch_one(&stack.admin).await.unwrap() == 0).then_some(())
    })
    .await;
    quorum.assert_order();
    siblings.assert_order();
    let Cluster { mut field, mut peers, .. } = cluster;
    field.relays[0].is_ready().await;
    for relay in &mut field.relays {
        assert!(relay.terminate().await.success());
    }
    field.relays.clear();
    for peer in &mut peers {
        peer.stop(&CancellationToken::new()).await;
    }
    field.end().await;
}
