//! Two servers, persons whose events are published, and projectors.

use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use devstack::{
    folder::Folder,
    ports,
    postgres::Postgres,
    servers::{Servers, Setup},
    testing::{Place, client},
};
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions},
};
use reqwest::Method;
use serde_json::Value;
use tokio::{task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::stack::{DEADLINE, PROGRAM, PUBLISHER, Stack, id, item, person, properties, until};

/// Persons whose events are published under load.
const PERSONS: u32 = 20;
/// How many confirms are awaited at once.
const WINDOW: usize = 50;
/// How long the broker may take to answer a window.
const ANSWER: Duration = Duration::from_secs(10);

pub(crate) struct Field {
    pub(crate) stack: Stack,
    pub(crate) place: Place,
    pub(crate) programs: Vec<Program>,
    /// How many versions of each person were published.
    pub(crate) versions: i64,
    pub(crate) servers: Servers,
    // Last, because it waits for what is left of the others.
    folder: Folder,
}

/// A running projector, killed when it is dropped.
pub(crate) struct Program {
    process: Child,
    listen: String,
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Program {
    pub(crate) async fn ready(&self) -> Option<(u16, String)> {
        let answer = client().get(format!("http://{}/ready", self.listen)).send().await.ok()?;
        Some((answer.status().as_u16(), answer.text().await.ok()?))
    }

    pub(crate) fn has_died(&mut self) -> bool {
        self.process.try_wait().unwrap().is_some()
    }
}

/// An event of the n-th person: the person, then items that are worth 1 each. The same one each time.
fn event(n: u32, version: i64) -> (String, BasicProperties, Value) {
    let (p, v) = (person_id(n), u128::try_from(version).unwrap());
    let (type_, body) = match version {
        1 => ("person.new", person(p, n.into())),
        _ => ("asset.new", item(id(1_000_000 * u128::from(n) + v), p, n.into(), "20")),
    };
    (type_.to_owned(), properties(event_id(n, version), type_, p, version, &body), body)
}

pub(crate) fn person_id(n: u32) -> Uuid {
    id(1_000_000 * u128::from(n))
}

pub(crate) fn event_id(n: u32, version: i64) -> Uuid {
    id((1 << 64) + 1_000_000 * u128::from(n) + u128::try_from(version).unwrap())
}

/// Publishes events in their order, again until each is confirmed. A broker that goes away in the middle of a call
/// may leave it without an answer, so each connection's window has an end.
pub(crate) async fn publish(amqp: &str, events: impl Iterator<Item = (u32, i64)>) {
    let mut events = events.collect::<Vec<_>>();
    events.reverse();
    let (mut left, mut taken) = (events.len(), Instant::now());
    while !events.is_empty() {
        if !publish_some(amqp, &mut events).await {
            assert!(taken.elapsed() < DEADLINE, "the broker took no event within {DEADLINE:?}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        if events.len() < left {
            (left, taken) = (events.len(), Instant::now());
        }
    }
}

/// One connection's life: takes from the end what is confirmed, and says whether that is all.
async fn publish_some(amqp: &str, events: &mut Vec<(u32, i64)>) -> bool {
    let open = async {
        let connection = Connection::connect(amqp, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        lapin::Result::Ok((connection, channel))
    };
    let Ok(Ok((_connection, channel))) = timeout(ANSWER, open).await else { return false };
    while !events.is_empty() {
        let window: Vec<_> = events.iter().rev().take(WINDOW).copied().collect();
        match timeout(ANSWER, confirmed(&channel, &window)).await {
            Ok(Ok(true)) => events.truncate(events.len() - window.len()),
            _ => return false,
        }
    }
    true
}

/// Publishes events; whether the broker took all of them.
async fn confirmed(channel: &Channel, window: &[(u32, i64)]) -> lapin::Result<bool> {
    let mut confirms = Vec::new();
    for (n, version) in window {
        let (type_, properties, body) = event(*n, *version);
        let body = body.to_string();
        let publish = channel.basic_publish(
            "event_dispatcher".into(),
            type_.into(),
            BasicPublishOptions::default(),
            body.as_bytes(),
            properties,
        );
        confirms.push(publish.await?);
    }
    let mut all = true;
    for confirm in confirms {
        all &= confirm.await?.is_ack();
    }
    Ok(all)
}

/// Persons change until it is enough.
pub(crate) struct Load {
    enough: CancellationToken,
    task: JoinHandle<i64>,
}

impl Field {
    pub(crate) async fn new(name: &str) -> Self {
        let folder = Folder::temporary().unwrap();
        let servers = Servers::start(&folder, Setup::QUIET).await.unwrap();
        let place = Place::of(&servers);
        let stack = Stack::on(&place, name).await;
        Self { stack, place, programs: Vec::new(), versions: 0, servers, folder }
    }

    pub(crate) fn vhost(&self) -> &str {
        self.stack.amqp.rsplit('/').next().unwrap()
    }

    /// Starts a projector, that dies at `failpoint` if it is not empty.
    pub(crate) fn start(&self, failpoint: &str) -> Program {
        self.start_at(&self.stack.database, failpoint)
    }

    /// One that has its read model elsewhere.
    pub(crate) fn start_at(&self, database: &str, failpoint: &str) -> Program {
        let listen = format!("127.0.0.1:{}", devstack::ports::free());
        let process = Command::new(PROGRAM)
            .args(["run", "--listen", &listen])
            .env("DATABASE_URL", database)
            .env("AMQP_URL", &self.stack.broker)
            .env("SOURCE", format!("person={PUBLISHER}"))
            .env("FAILPOINTS", failpoint)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Program { process, listen }
    }

    /// Adds a projector that goes on.
    pub(crate) async fn add(&mut self) {
        let program = self.start("");
        until("the projector is ready", async || {
            program.ready().await.is_some_and(|(status, _)| status == 200)
        })
        .await;
        self.programs.push(program);
    }

    /// The next `count` versions of each person.
    pub(crate) async fn publish(&mut self, count: i64) {
        let versions = self.versions + 1..=self.versions + count;
        publish(&self.stack.amqp, versions.flat_map(|v| (1..=PERSONS).map(move |n| (n, v)))).await;
        self.versions += count;
    }

    /// Publishes on and on.
    pub(crate) fn load(&self) -> Load {
        let enough = CancellationToken::new();
        let (amqp, mut version, until) = (self.stack.amqp.clone(), self.versions, enough.clone());
        let task = tokio::spawn(async move {
            while !until.is_cancelled() {
                version += 1;
                publish(&amqp, (1..=PERSONS).map(|n| (n, version))).await;
            }
            version
        });
        Load { enough, task }
    }

    pub(crate) async fn stop(&mut self, load: Load) {
        load.enough.cancel();
        let ended = timeout(DEADLINE, load.task).await;
        self.versions =
            ended.unwrap_or_else(|_| panic!("publishing did not end within {DEADLINE:?}")).unwrap();
    }

    /// Waits until some projector says `reason`, not being ready.
    pub(crate) async fn says(&self, fault: &str, reason: &str) {
        until(&format!("{fault}: some projector says: {reason}"), async || {
            for program in &self.programs {
                if program.ready().await.is_some_and(|(status, body)| status == 503 && body.contains(reason))
                {
                    return true;
                }
            }
            false
        })
        .await;
    }

    /// Waits until everything is in the read model, once and in order, and all projectors are ready.
    pub(crate) async fn whole(&self, fault: &str) {
        let begin = Instant::now();
        let versions = self.versions;
        until(&format!("{fault}: everybody is at version {versions}"), async || {
            // While the server comes up, there is no answer.
            let sql = "SELECT count(*) FROM score.person WHERE cpf <= $2 AND version = $1";
            let there: i64 = sqlx::query_scalar(sql)
                .bind(versions)
                .bind(i64::from(PERSONS))
                .fetch_one(&self.stack.pool)
                .await
                .unwrap_or(0);
            there == i64::from(PERSONS)
        })
        .await;
        for program in &self.programs {
            until(&format!("{fault}: ready again"), async || {
                program.ready().await.is_some_and(|(status, _)| status == 200)
            })
            .await;
        }
        let totals: Vec<(i64, i64)> = sqlx::query_as(
            "SELECT DISTINCT total::bigint, coalesce(c.version, 0)
             FROM score.person p LEFT JOIN outbox.aggregate c ON c.aggregate_id = p.id::text WHERE cpf <= $1",
        )
        .bind(i64::from(PERSONS))
        .fetch_all(&self.stack.pool)
        .await
        .unwrap();
        assert_eq!(totals, [(versions - 1, versions - 1)], "{fault}");
        // What it published: each version once, and rising.
        let wrong: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM (
                 SELECT version, row_number() OVER (PARTITION BY aggregate_id ORDER BY position) AS n
                 FROM outbox.event) AS event WHERE version <> n",
        )
        .fetch_one(&self.stack.pool)
        .await
        .unwrap();
        let held: i64 =
            sqlx::query_scalar("SELECT count(*) FROM inbox.held").fetch_one(&self.stack.pool).await.unwrap();
        assert_eq!((wrong, held), (0, 0), "{fault}");
        println!("{fault}: whole after {:.1} s, {versions} versions", begin.elapsed().as_secs_f32());
    }

    /// Calls the management API.
    pub(crate) async fn manage(&self, method: Method, path: &str) -> Value {
        let url = format!("{}/api/{path}", self.place.management);
        let answer = client().request(method, url).send().await;
        match answer {
            Ok(answer) => answer.json().await.unwrap_or_default(),
            Err(_) => Value::Null,
        }
    }

    /// A standby of the database's server, which follows it once it is started.
    pub(crate) async fn standby(&self) -> Postgres {
        self.servers.postgres.standby(&self.folder, ports::free()).await.unwrap()
    }

    pub(crate) async fn consumers(&self, queue: &str) -> Option<u64> {
        self.manage(Method::GET, &format!("queues/{}/{queue}", self.vhost())).await["consumers"].as_u64()
    }

    pub(crate) async fn messages(&self, queue: &str) -> Option<u64> {
        self.manage(Method::GET, &format!("queues/{}/{queue}", self.vhost())).await["messages"].as_u64()
    }

    /// How often the broker has delivered a message of the queue again.
    pub(crate) async fn redelivered(&self) -> u64 {
        let queue = self.manage(Method::GET, &format!("queues/{}/score", self.vhost())).await;
        queue["message_stats"]["redeliver"].as_u64().unwrap_or(0)
    }

    /// Closes each projector's connection by way of the management API, whose lists lag behind.
    pub(crate) async fn close_connections(&self) {
        let mut closed = 0;
        until("the connections are listed and closed", async || {
            let all = self.manage(Method::GET, "connections").await;
            for connection in all.as_array().into_iter().flatten() {
                let ours = connection["client_properties"]["connection_name"].as_str();
                if ours.is_some_and(|ours| ours.starts_with("score-projector")) {
                    let mut url: reqwest::Url = self.place.management.parse().unwrap();
                    let name = connection["name"].as_str().unwrap();
                    url.path_segments_mut().unwrap().extend(["api", "connections", name]);
                    let answer = client().delete(url).send().await.unwrap();
                    closed += usize::from(answer.status().is_success());
                }
            }
            closed >= self.programs.len()
        })
        .await;
    }
}
