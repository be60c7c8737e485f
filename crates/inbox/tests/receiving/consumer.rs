//! The consumer on a real broker: what it declares, and that it always consumes again.

use std::time::Duration;

use futures_util::StreamExt;
use inbox::{Config, Consumer, Envelope, Sequencer, Sources, Status, Topology};
use lapin::{
    Channel, Connection, ConnectionProperties,
    options::{
        BasicCancelOptions, BasicConsumeOptions, BasicPublishOptions, BasicRejectOptions,
        ConfirmSelectOptions, QueueDeleteOptions,
    },
    types::FieldTable,
};
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::support::{DEADLINE, Recorder, database, event, from, sources, tables, typed, until};

/// A virtual host, a database, and a consumer between them that can be started and stopped.
pub(crate) struct World {
    pub(crate) amqp: String,
    pub(crate) pool: PgPool,
    pub(crate) channel: Channel,
    _connection: Connection,
}

pub(crate) struct Running {
    stop: CancellationToken,
    task: JoinHandle<()>,
    pub(crate) status: watch::Receiver<Status>,
}

impl World {
    pub(crate) async fn new(name: &str) -> Self {
        let amqp = devstack::testing::virtual_host(name).await;
        let connection = Connection::connect(&amqp, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        Self { pool: database(name).await, amqp, channel, _connection: connection }
    }

    /// A consumer whose first node does not exist.
    pub(crate) fn start(&self, handler: Recorder) -> Running {
        self.start_with(handler, |config| config)
    }

    pub(crate) fn start_with(&self, handler: Recorder, set: impl FnOnce(Config) -> Config) -> Running {
        self.start_following(Sources::default(), handler, set)
    }

    pub(crate) fn start_following(
        &self,
        sources: Sources,
        handler: Recorder,
        set: impl FnOnce(Config) -> Config,
    ) -> Running {
        let nodes = format!("amqp://127.0.0.1:1/none,{}", self.amqp).parse().unwrap();
        let topology = Topology::new("events", "events.by_aggregate", "things", &["thing"]).unwrap();
        let config = set(Config { batch: 20, ..Config::new(topology, nodes, "receiving") });
        let sequencer = Sequencer::new("things", self.pool.clone(), handler).following(sources);
        let consumer = Consumer::new(config, sequencer);
        let (status, stop) = (consumer.status(), CancellationToken::new());
        let task = tokio::spawn(consumer.run(stop.clone()));
        Running { stop, task, status }
    }

    pub(crate) async fn publish(&self, envelope: Envelope) {
        let key = envelope.routing_key.as_str().into();
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        self.channel
            .basic_publish("events".into(), key, options, &envelope.body, envelope.properties)
            .await
            .unwrap()
            .await
            .unwrap();
    }

    /// As whom it publishes.
    pub(crate) fn user(&self) -> &str {
        self.amqp.split_once("://").unwrap().1.split_once(':').unwrap().0
    }

    /// A consumer of the test's own, to fail deliveries with.
    async fn consume(&self) -> lapin::Consumer {
        let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
        self.channel.basic_consume("things".into(), "".into(), options, arguments).await.unwrap()
    }

    pub(crate) async fn applied(&self) -> Vec<(String, i64)> {
        sqlx::query_as("SELECT aggregate, version FROM applied ORDER BY aggregate, n")
            .fetch_all(&self.pool)
            .await
            .unwrap()
    }

    pub(crate) async fn until_version(&self, aggregate: &str, version: i64) {
        until(&format!("{aggregate} reaches {version}"), async || {
            self.applied().await.contains(&(aggregate.to_owned(), version))
        })
        .await;
    }

    fn vhost(&self) -> &str {
        self.amqp.rsplit('/').next().unwrap()
    }

    /// How many consumers a queue has, as far as the broker says.
    pub(crate) async fn consumers(&self, queue: &str) -> Option<u64> {
        let queue = management(&format!("queues/{}/{queue}", self.vhost())).await;
        queue["consumers"].as_u64()
    }

    /// How many messages are in a queue, with those that are being delivered.
    pub(crate) async fn messages(&self, queue: &str) -> u64 {
        let queue = management(&format!("queues/{}/{queue}", self.vhost())).await;
        queue["messages"].as_u64().unwrap_or(u64::MAX)
    }
}

impl Running {
    /// The first status of that kind, however short it lasts.
    async fn first(&mut self, what: impl FnMut(&Status) -> bool) -> Status {
        tokio::time::timeout(DEADLINE, self.status.wait_for(what)).await.unwrap().unwrap().clone()
    }

    pub(crate) async fn until_consuming(&mut self) {
        let waited = self.status.wait_for(|s| s.consuming.is_ok() && s.broker.is_ok() && s.database.is_ok());
        tokio::time::timeout(DEADLINE, waited).await.unwrap().unwrap();
    }

    pub(crate) async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(DEADLINE, self.task).await.unwrap().unwrap();
    }
}

async fn management(path: &str) -> Value {
    let server = std::env::var(devstack::testing::MANAGEMENT_URL).unwrap();
    reqwest::get(format!("{server}/api/{path}")).await.unwrap().json().await.unwrap()
}

#[tokio::test]
async fn what_is_declared() {
    let world = World::new("declared").await;
    let mut running = world.start(Recorder::new("things"));
    running.until_consuming().await;
    let vhost = world.vhost();
    let pick = |all: Value, fields: &[&str]| -> Vec<Value> {
        let mut rows: Vec<Value> = all
            .as_array()
            .unwrap()
            .iter()
            .map(|row| fields.iter().map(|f| ((*f).to_owned(), row[f].clone())).collect())
            .collect();
        // The broker's own exchanges, and every queue's binding to the default exchange.
        rows.retain(|row| {
            row["name"] != "" && row["source"] != "" && !row["name"].to_string().contains("amq.")
        });
        rows.sort_by_key(ToString::to_string);
        rows
    };
    let bindings = ["source", "destination_type", "destination", "routing_key", "arguments"];
    let declared = json!({
        "exchanges": pick(management(&format!("exchanges/{vhost}")).await, &["name", "type", "durable"]),
        "queues": pick(management(&format!("queues/{vhost}")).await, &["name", "type", "durable", "arguments"]),
        "bindings": pick(management(&format!("bindings/{vhost}")).await, &bindings),
    });
    // As text: insta would show the insides of arbitrary-precision numbers.
    insta::assert_snapshot!(serde_json::to_string_pretty(&declared).unwrap());
    running.stop().await;
}

#[tokio::test]
async fn a_stream_with_everything_in_it() {
    let world = World::new("stream").await;
    let mut running = world.start(Recorder::new("things"));
    running.until_consuming().await;
    let mut no_event = event("a", 9, "no event");
    no_event.properties = no_event.properties.with_message_id("none".into());
    for message in [
        event("a", 1, ""),
        event("a", 3, ""),
        no_event,
        event("b", 1, "poison"),
        event("b", 2, ""),
        event("a", 1, ""),
        event("a", 2, ""),
        typed("thing.invented.later", "a", 4, "", &[]),
    ] {
        world.publish(message).await;
    }
    world.until_version("a", 4).await;
    until("everything is acknowledged", async || world.messages("things").await == 0).await;
    insta::assert_snapshot!(tables(&world.pool, "things").await);
    running.stop().await;
    assert_eq!(world.messages("things.dead").await, 0);
}

#[tokio::test]
async fn it_always_consumes_again() {
    let world = World::new("again").await;
    let mut running = world.start(Recorder::new("things"));
    running.until_consuming().await;
    world.publish(event("a", 1, "")).await;
    world.until_version("a", 1).await;

    // The connection is closed by an operator.
    let server = std::env::var(devstack::testing::MANAGEMENT_URL).unwrap();
    let name = async || {
        let all = management(&format!("vhosts/{}/connections", world.vhost())).await;
        let ours = |c: &&Value| c["client_properties"]["connection_name"] == "receiving";
        all.as_array().unwrap().iter().find(ours).map(|c| c["name"].as_str().unwrap().to_owned())
    };
    // The management's lists lag behind the broker.
    until("the connection is listed", async || name().await.is_some()).await;
    let mut url: reqwest::Url = server.parse().unwrap();
    url.path_segments_mut().unwrap().extend(["api", "connections", &name().await.unwrap()]);
    running.status.mark_unchanged();
    let closed = reqwest::Client::new().delete(url).send().await.unwrap();
    assert!(closed.status().is_success(), "{closed:?}");
    let status = running.first(|status| status.broker.is_err()).await;
    insta::assert_debug_snapshot!("closed_by_an_operator", status);
    world.publish(event("a", 2, "")).await;
    world.until_version("a", 2).await;
    running.until_consuming().await;

    // The queue is deleted: the broker cancels the subscription, the channel stays open.
    world.channel.queue_delete("things".into(), QueueDeleteOptions::default()).await.unwrap();
    let status = running.first(|status| status.consuming.is_err()).await;
    insta::assert_debug_snapshot!("queue_deleted", status);
    running.until_consuming().await;
    world.publish(event("a", 3, "")).await;
    world.until_version("a", 3).await;

    // The database is away: nothing is consumed, and nothing is lost or rejected.
    let (name, server) = {
        let options = world.pool.connect_options();
        (options.get_database().unwrap().to_owned(), std::env::var(devstack::testing::POSTGRES_URL).unwrap())
    };
    let mut aside =
        <sqlx::PgConnection as sqlx::Connection>::connect(&format!("{server}/postgres")).await.unwrap();
    let mut execute = async |sql: String| {
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut aside).await.unwrap();
    };
    execute(format!("ALTER DATABASE {name} ALLOW_CONNECTIONS false")).await;
    execute(format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")).await;
    world.publish(event("a", 4, "")).await;
    let status = running.first(|status| status.database.is_err()).await;
    insta::assert_debug_snapshot!("database_away", status.consuming);
    execute(format!("ALTER DATABASE {name} ALLOW_CONNECTIONS true")).await;
    world.until_version("a", 4).await;

    running.stop().await;
    let expected: Vec<_> = (1..=4).map(|version| ("a".to_owned(), version)).collect();
    assert_eq!(world.applied().await, expected);
}

#[tokio::test]
async fn dead_letters_keep_their_place() {
    let world = World::new("dead").await;
    // The user of the broker stays with a message: through both exchanges, redelivered and dead-lettered.
    let start = || {
        let followed = sources(&[&format!("things={}", world.user())]);
        world.start_following(followed, Recorder::new("things"), |config| config)
    };
    let event = |version| from(event("a", version, ""), "things", world.user());
    let mut running = start();
    running.until_consuming().await;
    running.stop().await;
    world.publish(event(1)).await;

    // Failed deliveries use the limit up, as consumers that die do.
    let mut failing = world.consume().await;
    let mut deliveries = 0;
    until("the delivery limit is reached", async || {
        // Whatever is delivered comes at once; then there is time to look whether that was all.
        match tokio::time::timeout(Duration::from_millis(500), failing.next()).await {
            Ok(message) => {
                deliveries += 1;
                message.unwrap().unwrap().reject(BasicRejectOptions { requeue: true }).await.unwrap();
                false
            }
            Err(_) => world.messages("things.dead").await == 1,
        }
    })
    .await;
    world.channel.basic_cancel(failing.tag(), BasicCancelOptions::default()).await.unwrap();
    assert_eq!(deliveries, 21);

    // Its successors wait for it, and it is taken from the dead letters.
    for version in 2..=5 {
        world.publish(event(version)).await;
    }
    let mut running = start();
    running.until_consuming().await;
    world.until_version("a", 5).await;
    running.stop().await;
    let expected: Vec<_> = (1..=5).map(|version| ("a".to_owned(), version)).collect();
    assert_eq!(world.applied().await, expected);
    let sql = "SELECT count(*) FROM inbox.rejected";
    assert_eq!(sqlx::query_scalar::<_, i64>(sql).fetch_one(&world.pool).await.unwrap(), 0);
    until("the dead letters are settled", async || world.messages("things.dead").await == 0).await;
}

#[tokio::test]
async fn a_message_that_came_back_twice_is_taken_alone() {
    let world = World::new("suspect").await;
    let mut running = world.start(Recorder::new("things"));
    running.until_consuming().await;
    running.stop().await;
    for version in 1..=10 {
        world.publish(event("a", version, "")).await;
    }
    for _ in 0..2 {
        let mut failing = world.consume().await;
        let mut received = Vec::new();
        for _ in 0..10 {
            received.push(failing.next().await.unwrap().unwrap());
        }
        // Given back once nothing can be delivered to this consumer again. By a reject: since RabbitMQ 4 a nack
        // counts as no failed delivery.
        world.channel.basic_cancel(failing.tag(), BasicCancelOptions::default()).await.unwrap();
        for message in received {
            message.reject(BasicRejectOptions { requeue: true }).await.unwrap();
        }
    }
    for version in 1..=10 {
        world.publish(event("b", version, "")).await;
    }
    let mut running = world.start(Recorder::new("things"));
    running.until_consuming().await;
    world.until_version("a", 10).await;
    world.until_version("b", 10).await;
    running.stop().await;

    // Rows of one transaction share their xmin.
    let transactions = async |aggregate: &str| -> i64 {
        sqlx::query_scalar("SELECT count(DISTINCT xmin::text) FROM applied WHERE aggregate = $1")
            .bind(aggregate)
            .fetch_one(&world.pool)
            .await
            .unwrap()
    };
    assert_eq!(transactions("a").await, 10);
    assert!(transactions("b").await < 10, "the others are taken together");
}

#[tokio::test]
async fn a_stop_finishes_what_was_begun_and_gives_back_the_rest() {
    let world = World::new("stop").await;
    let mut running = world.start(Recorder::new("things"));
    running.until_consuming().await;
    // Half a second each, so the stop comes in the middle of the first batch.
    for n in 0..30 {
        world.publish(event(&format!("{n:02}"), 1, "slow")).await;
    }
    until("a handler is at work", async || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE '%pg_sleep%' AND state = 'active' AND pid <> pg_backend_pid()";
        sqlx::query_scalar::<_, i64>(sql).fetch_one(&world.pool).await.unwrap() > 0
    })
    .await;
    running.stop().await;
    let applied = world.applied().await.len() as u64;
    assert!((1..30).contains(&applied), "{applied}");
    until("what was not applied is ready again", async || world.messages("things").await == 30 - applied)
        .await;

    let mut running = world.start(Recorder::new("things"));
    running.until_consuming().await;
    until("the rest is applied", async || world.applied().await.len() == 30).await;
    until("everything is acknowledged", async || world.messages("things").await == 0).await;
    running.stop().await;
}

#[tokio::test]
async fn two_replicas_stay_correct_when_one_dies() {
    let world = World::new("replicas").await;
    let mut first = world.start(Recorder::new("things"));
    first.until_consuming().await;
    let mut second = world.start(Recorder::new("things"));
    second.until_consuming().await;
    let mut kill = Some(first);
    for version in 1..=40 {
        for aggregate in ["a", "b", "c"] {
            world.publish(event(aggregate, version, "")).await;
        }
        if version == 20 {
            // Without a word, as SIGKILL would; the connection goes with the task.
            kill.take().unwrap().task.abort();
        }
    }
    for aggregate in ["a", "b", "c"] {
        world.until_version(aggregate, 40).await;
    }
    second.stop().await;
    let expected: Vec<_> =
        ["a", "b", "c"].iter().flat_map(|a| (1..=40).map(|v| ((*a).to_owned(), v))).collect();
    assert_eq!(world.applied().await, expected);
}

#[test]
fn names_are_checked_without_quoting_them() {
    let long = "q".repeat(251);
    let error = Topology::new("events", "events.by_aggregate", &long, &[]).unwrap_err();
    insta::assert_snapshot!(error, @"the queue's name must be 1 to 250 bytes long");
}
