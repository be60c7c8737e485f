//! Two servers, an outbox that is written to all the time, relays, and a queue that keeps what arrives.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use devstack::{
    folder::Folder,
    servers::{Servers, Setup},
    testing::Place,
};
use futures_util::StreamExt;
use lapin::{
    ExchangeKind,
    options::{BasicConsumeOptions, QueueDeclareOptions},
    types::FieldTable,
};
use sqlx::{Connection, Executor, PgConnection};
use tokio::{process::Command, task::JoinSet};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::stack::{EXCHANGE, Message, Proxy, Relay, Stack, eventually, output};

/// The queue that is bound to everything. Nobody takes from it while there is a fault.
pub(crate) const QUEUE: &str = "all";
/// How many write at the same time, each to aggregates of its own.
const WRITERS: i32 = 2;
/// Aggregates of each writer.
const AGGREGATES: i32 = 100;
/// How many of them a transaction changes.
const CHANGED: i32 = 5;
/// What each writer pauses after a transaction.
const PACE: Duration = Duration::from_millis(20);
/// How long a fault lasts once it is noticed, and how long the load goes on before and after it.
pub(crate) const WHILE: Duration = Duration::from_secs(1);

/// Events that come twice at most, per broker connection that is lost: two lanes, each with one window on
/// its way.
pub(crate) const IN_FLIGHT: usize = 2 * 250;
/// Events that come twice at most when a relay is killed or its database is lost: what is in flight, and
/// what was published since the progress was last stored.
pub(crate) const UNSTORED: usize = 4_000;

pub(crate) struct Field {
    pub(crate) stack: Stack,
    pub(crate) relays: Vec<Relay>,
    /// Before RabbitMQ, for the relays alone.
    pub(crate) broker: Proxy,
    /// Before PostgreSQL, for everybody.
    pub(crate) database: Proxy,
    pub(crate) servers: Servers,
    /// The events that arrived at least once.
    seen: HashSet<Uuid>,
    /// Each aggregate's last version that arrived.
    versions: HashMap<String, i64>,
    // Last, because it waits for what is left of the others.
    pub(crate) folder: Folder,
}

impl Field {
    pub(crate) async fn new(name: &str) -> Self {
        let folder = Folder::temporary().unwrap();
        let servers = Servers::start(&folder, Setup::QUIET).await.unwrap();
        let place = Place::of(&servers);
        let (database, broker) = (Proxy::new(&place.postgres).await, Proxy::new(&place.amqp).await);
        let stack = Stack::on(Place { postgres: database.url(&place.postgres), ..place }, name).await;
        // A row of its own for each aggregate, as in any service.
        stack
            .admin
            .execute("CREATE TABLE thing (id int PRIMARY KEY, version bigint NOT NULL); GRANT ALL ON thing TO PUBLIC")
            .await
            .unwrap();
        sqlx::query("INSERT INTO thing SELECT n, 0 FROM generate_series(1, $1) n")
            .bind(WRITERS * AGGREGATES)
            .execute(&stack.admin)
            .await
            .unwrap();
        let field = Self {
            stack,
            relays: Vec::new(),
            broker,
            database,
            servers,
            seen: HashSet::new(),
            versions: HashMap::new(),
            folder,
        };
        field.topology(FieldTable::default()).await;
        field
    }

    /// The exchange, and the queue.
    pub(crate) async fn topology(&self, queue: FieldTable) {
        self.stack.declare_exchange(ExchangeKind::Topic).await;
        self.stack.bind(QUEUE, "#", queue).await;
    }

    /// Takes a binding of the queue away.
    pub(crate) async fn unbind(&self, key: &str) {
        let vhost = &self.stack.vhost;
        let binding = format!("bindings/{vhost}/e/{EXCHANGE}/q/{QUEUE}/{key}");
        self.stack.manage(reqwest::Method::DELETE, &binding, None).await;
    }

    /// `run`, with both servers behind a proxy.
    pub(crate) fn run(&self) -> Command {
        let mut run = self.stack.command("run");
        run.env("AMQP_URL", self.broker.url(&self.stack.amqp_url));
        run
    }

    /// Adds a relay and waits until it is ready.
    pub(crate) async fn add(&mut self, run: &mut Command) {
        self.relays.push(Relay::ready(run).await);
    }

    /// Begins to write: in each transaction some versions of some aggregates, and an event of each.
    pub(crate) fn load(&self) -> Load {
        self.load_with("on")
    }

    /// As [`load`](Self::load), with commits that are durable, or `off`.
    pub(crate) fn load_with(&self, synchronous_commit: &'static str) -> Load {
        let enough = CancellationToken::new();
        let mut writers = JoinSet::new();
        for writer in 0..WRITERS {
            let options = (*self.stack.writer.connect_options()).clone();
            let options = options.options([("synchronous_commit", synchronous_commit)]);
            writers.spawn(write(options, writer, enough.clone()));
        }
        Load { enough, writers }
    }

    /// Waits until some relay says `reason`, and `status` as well if `status` can be asked.
    pub(crate) async fn says(&self, fault: &str, reason: &str) {
        let begin = Instant::now();
        eventually(&format!("{fault}: some relay says: {reason}"), async || {
            for relay in &self.relays {
                if relay
                    .get("ready")
                    .await
                    .is_some_and(|(status, body)| status == 503 && body.contains(reason))
                {
                    return Some(());
                }
            }
            None
        })
        .await;
        let said = begin.elapsed();
        let asked = eventually(&format!("{fault}: status says: {reason}"), async || {
            let told = output(&mut self.stack.command("status")).await;
            let away = told.contains("the database cannot be reached") || told.contains("did not answer");
            (away || told.contains(reason)).then_some(!away)
        })
        .await;
        println!(
            "{fault}: {:.1} s until a relay says \"{reason}\"; {}",
            said.as_secs_f32(),
            if asked { "so does status" } else { "status says that the database is away" }
        );
    }

    /// Everything that was committed has arrived, in order, and all relays are ready. At most `twice`
    /// events came once more.
    pub(crate) async fn whole(&mut self, fault: &str, twice: usize) {
        let begin = Instant::now();
        self.settled(fault).await;
        let settled = begin.elapsed();
        let messages = self.drain().await;
        let (arrived, again) = (messages.len(), self.take_in(fault, &messages));
        self.all_arrived(fault).await;
        println!(
            "{fault}: all settled {:.1} s after the load, {arrived} arrived, {again} of them again",
            settled.as_secs_f32(),
        );
        assert!(again <= twice, "{fault}: {again} events came again, and {twice} might");
    }

    /// Checks the order, and counts what came before.
    fn take_in(&mut self, fault: &str, messages: &[Message]) -> usize {
        let mut again = 0;
        for message in messages {
            again += usize::from(!self.seen.insert(id(message)));
            let version: i64 = message.header("aggregate_version").parse().unwrap();
            let aggregate = message.header("aggregate_id");
            let last = self.versions.entry(aggregate.clone()).or_default();
            assert!(version <= *last + 1, "{fault}: {aggregate} jumps from {last} to {version}");
            *last = version.max(*last);
        }
        again
    }

    /// Every relay is ready, and nothing that is stored is left to publish.
    pub(crate) async fn settled(&self, fault: &str) {
        let sql = "SELECT NOT EXISTS (SELECT FROM outbox.event WHERE position > high OR position <@ ANY (
                                         SELECT unnest(open)))
                          AND NOT EXISTS (SELECT FROM outbox.parked)
                   FROM outbox.relay";
        eventually(&format!("{fault}: everything is settled"), async || {
            let row = sqlx::query_scalar::<_, bool>(sql).fetch_one(&self.stack.admin).await;
            row.ok().filter(|settled| *settled).map(|_| ())
        })
        .await;
        for relay in &self.relays {
            relay.is_ready().await;
        }
    }

    /// What is stored by now is settled, whatever comes after it.
    pub(crate) async fn progress(&self, fault: &str) {
        let sql = "SELECT max(position) FROM outbox.event";
        let stored: i64 = sqlx::query_scalar(sql).fetch_one(&self.stack.admin).await.unwrap();
        eventually(&format!("{fault}: what is stored is settled"), async || {
            let sql = "SELECT low_water >= $1 FROM outbox.relay";
            let passed = sqlx::query_scalar::<_, bool>(sql).bind(stored).fetch_one(&self.stack.admin).await;
            passed.unwrap().then_some(())
        })
        .await;
    }

    /// Exactly what was committed has arrived.
    pub(crate) async fn all_arrived(&self, fault: &str) {
        let stored: Vec<Uuid> =
            sqlx::query_scalar("SELECT id FROM outbox.event").fetch_all(&self.stack.admin).await.unwrap();
        let missing = stored.iter().filter(|id| !self.seen.contains(id)).count();
        assert_eq!(missing, 0, "{fault}: of {} events {missing} never arrived", stored.len());
        assert_eq!(self.seen.len(), stored.len(), "{fault}: something arrived that was not committed");
    }

    /// Takes what the queue has, without a look at its order.
    pub(crate) async fn take(&mut self) -> usize {
        let messages = self.drain().await;
        self.seen.extend(messages.iter().map(id));
        messages.len()
    }

    /// How many events are stored and have not arrived.
    pub(crate) async fn missing(&self) -> usize {
        let stored: Vec<Uuid> =
            sqlx::query_scalar("SELECT id FROM outbox.event").fetch_all(&self.stack.admin).await.unwrap();
        stored.iter().filter(|id| !self.seen.contains(id)).count()
    }

    /// All that the queue has.
    async fn drain(&self) -> Vec<Message> {
        let channel = self.stack.channel().await;
        let options = QueueDeclareOptions { passive: true, ..Default::default() };
        let queue = channel.queue_declare(QUEUE.into(), options, FieldTable::default()).await.unwrap();
        let count = usize::try_from(queue.message_count()).unwrap();
        let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
        let mut consumer =
            channel.basic_consume(QUEUE.into(), "".into(), options, FieldTable::default()).await.unwrap();
        let mut messages = Vec::with_capacity(count);
        while messages.len() < count {
            let next = tokio::time::timeout(Duration::from_secs(30), consumer.next()).await;
            let delivery = next.unwrap_or_else(|_| panic!("{} of {count} messages came", messages.len()));
            messages.push(delivery.unwrap().unwrap().into());
        }
        channel.close(200, "".into()).await.unwrap();
        messages
    }

    /// Closes all of the relays' connections, as an operator does.
    pub(crate) async fn close_connections(&self) {
        let user = &self.stack.vhost;
        self.servers.rabbitmq.control(&["close_all_user_connections", user, "a test"]).await.unwrap();
    }

    /// Stops everything in good order.
    pub(crate) async fn end(mut self) {
        for relay in &mut self.relays {
            let status = relay.terminate().await;
            assert!(status.success(), "{status}: {}", relay.log());
        }
        self.servers.stop(&CancellationToken::new()).await;
    }
}

/// A message's event.
fn id(message: &Message) -> Uuid {
    message.properties.message_id().as_ref().unwrap().as_str().parse().unwrap()
}

/// Writers at work.
pub(crate) struct Load {
    enough: CancellationToken,
    writers: JoinSet<i32>,
}

impl Load {
    /// Lets them finish.
    pub(crate) async fn stop(self) {
        self.enough.cancel();
        let written: i32 = self.writers.join_all().await.into_iter().sum();
        assert!(written > 0, "nothing was written");
    }
}

/// Writes until there is enough, whatever happens to the server.
async fn write(options: sqlx::postgres::PgConnectOptions, writer: i32, enough: CancellationToken) -> i32 {
    let mut written = 0;
    while !enough.is_cancelled() {
        let connect = tokio::time::timeout(Duration::from_secs(5), PgConnection::connect_with(&options));
        if let Ok(Ok(mut conn)) = connect.await {
            let change = async |conn: &mut PgConnection, first: i32| {
                sqlx::query(
                    "WITH changed AS (
                         UPDATE thing SET version = version + 1 WHERE id BETWEEN $1 AND $1 + $2 - 1
                         RETURNING id, version
                     )
                     INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                     SELECT 'thing', id, version, 'thing.changed', '{}' FROM changed",
                )
                .bind(first)
                .bind(CHANGED)
                .execute(conn)
                .await
            };
            while !enough.is_cancelled() {
                // A server that says nothing is given up: whether it committed, it knows itself.
                let first = 1 + writer * AGGREGATES + written % (AGGREGATES / CHANGED) * CHANGED;
                match tokio::time::timeout(Duration::from_secs(5), change(&mut conn, first)).await {
                    Ok(Ok(_)) => written += 1,
                    _ => break,
                }
                tokio::time::sleep(PACE).await;
            }
        }
        tokio::time::sleep(PACE).await;
    }
    written
}
