//! A database with a role of its own, a virtual host, and events published by hand.

use std::{
    fmt::Write,
    process::{Child, Command, Stdio},
    sync::Mutex,
};

use devstack::{
    testing::{Place, Roles, is_progress},
    users::Rights,
};
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions},
    types::{AMQPValue, FieldTable},
};
use serde_json::{Value, json};
use sqlx::{PgPool, postgres::PgConnectOptions};
use uuid::Uuid;

pub(crate) use devstack::testing::{DEADLINE, client, until};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_score-projector");

/// As whom events are published: the administrator of the private servers.
pub(crate) const PUBLISHER: &str = "devstack";

pub(crate) struct Stack {
    /// As the administrator, who publishes the events.
    pub(crate) amqp: String,
    /// As the program's own user.
    pub(crate) broker: String,
    /// As the superuser, to look.
    pub(crate) pool: PgPool,
    /// As the superuser, who owns the schemas.
    pub(crate) admin: String,
    /// As the program's own role.
    pub(crate) database: String,
    channel: Channel,
    connection: Connection,
    /// What was published, to be published again.
    log: Mutex<Vec<Message>>,
}

#[derive(Clone)]
struct Message {
    properties: BasicProperties,
    body: String,
}

/// A running program, killed when it is dropped.
pub(crate) struct Program(pub(crate) Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a command said, but for how far it was: on a slow machine there is something of that.
pub(crate) fn said(output: std::process::Output) -> String {
    let [mut said, error] = [output.stdout, output.stderr].map(|said| String::from_utf8(said).unwrap());
    said.extend(error.split_inclusive('\n').filter(|line| !is_progress(line.trim_end())));
    said
}

/// Runs a command of the program to its end.
pub(crate) fn command(arguments: &[&str], database: &str) -> std::process::Output {
    Command::new(PROGRAM).args(arguments).env("DATABASE_URL", database).output().unwrap()
}

impl Stack {
    pub(crate) async fn new(name: &str) -> Self {
        Self::on(&Place::around(), name).await
    }

    pub(crate) async fn on(place: &Place, name: &str) -> Self {
        let admin = place.database(name).await;
        let options: PgConnectOptions = admin.parse().unwrap();
        let pool = PgPool::connect_with(options.clone()).await.unwrap();
        let migrated = command(&["migrate"], &admin);
        assert!(migrated.status.success(), "{}", String::from_utf8_lossy(&migrated.stderr));
        outbox::install(&mut pool.acquire().await.unwrap(), "score").await.unwrap();
        let database = Roles::make(&admin).await.url("score_projector");

        let amqp = place.virtual_host(name).await;
        let connection = Connection::connect(&amqp, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        let broker = place.broker_user(&amqp, "projector", Rights::Subscriber("score")).await;
        Self { amqp, broker, pool, admin, database, channel, connection, log: Mutex::default() }
    }

    /// Starts the program; it has declared its queue when it is ready.
    pub(crate) async fn start(&self) -> Program {
        self.start_with("").await
    }

    /// One that sleeps before each commit, if it has failpoints: it is not done before somebody has looked.
    pub(crate) async fn start_slow(&self) -> Program {
        self.start_with("apply=sleep(100)").await
    }

    async fn start_with(&self, failpoints: &str) -> Program {
        let listen = format!("127.0.0.1:{}", devstack::ports::free());
        let program = Program(
            Command::new(PROGRAM)
                .args(["run", "--listen", &listen])
                .env("DATABASE_URL", &self.database)
                .env("AMQP_URL", &self.broker)
                .env("SOURCE", format!("person={PUBLISHER}"))
                .env("FAILPOINTS", failpoints)
                .stderr(Stdio::null())
                .spawn()
                .unwrap(),
        );
        until("the program is ready", async || {
            let answer = client().get(format!("http://{listen}/ready")).send().await;
            answer.is_ok_and(|answer| answer.status().is_success())
        })
        .await;
        program
    }

    pub(crate) async fn publish(&self, type_: &str, person: Uuid, version: i64, body: &Value) {
        self.send(type_, person, version, body).await;
        self.confirmed().await;
    }

    /// In the incarnation `number` of the source, which follows the first one; with these flags.
    pub(crate) async fn publish_in(
        &self,
        number: i64,
        flags: &[&str],
        (type_, person, version, body): (&str, Uuid, i64, Value),
    ) {
        let properties = properties(Uuid::now_v7(), type_, person, version, &body);
        let mut headers = properties.headers().clone().unwrap();
        headers.insert("source_parent".into(), AMQPValue::LongLongInt(1));
        for flag in flags {
            headers.insert((*flag).into(), AMQPValue::Boolean(true));
        }
        let properties = properties.with_headers(headers).with_app_id(format!("person~{number}").into());
        let message = Message { properties, body: body.to_string() };
        self.log.lock().unwrap().push(message.clone());
        deliver(&self.channel, "event_dispatcher", type_, message).await;
        self.confirmed().await;
    }

    /// Leaves what was published so far out of a replay, as an outbox that was restored does.
    pub(crate) fn forget_all(&self) {
        self.log.lock().unwrap().clear();
    }

    /// As fast as the broker takes them.
    pub(crate) async fn publish_all(&self, events: &[(&str, Uuid, i64, Value)]) {
        for (type_, person, version, body) in events {
            self.send(type_, *person, *version, body).await;
        }
        self.confirmed().await;
    }

    /// What is no event, past all exchanges.
    pub(crate) async fn publish_to_queue(&self, queue: &str, body: &str) {
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let properties = BasicProperties::default();
        let published =
            self.channel.basic_publish("".into(), queue.into(), options, body.as_bytes(), properties);
        published.await.unwrap();
        self.confirmed().await;
    }

    /// Waits until the broker has what was sent, and a queue for each.
    async fn confirmed(&self) {
        let returned = self.channel.wait_for_confirms().await.unwrap();
        assert!(returned.is_empty(), "no queue takes {} of them", returned.len());
    }

    async fn send(&self, type_: &str, person: Uuid, version: i64, body: &Value) {
        let properties = properties(Uuid::now_v7(), type_, person, version, body);
        let message = Message { properties, body: body.to_string() };
        self.log.lock().unwrap().push(message.clone());
        deliver(&self.channel, "event_dispatcher", type_, message).await;
    }

    /// Publishes everything again, to one queue alone.
    pub(crate) async fn replay(&self, queue: &str) {
        let messages = self.log.lock().unwrap().clone();
        // Beside whoever publishes and waits for confirms.
        let channel = self.connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        for message in messages {
            deliver(&channel, "", queue, message).await;
        }
        assert!(channel.wait_for_confirms().await.unwrap().is_empty());
    }

    /// Leaves the message that was published last out of a replay.
    pub(crate) fn forget_last(&self) {
        self.log.lock().unwrap().pop();
    }

    /// A command of the schemas' owner: its exit code and what it says.
    pub(crate) fn owner(&self, arguments: &[&str]) -> (i32, String) {
        let mut command = Command::new(PROGRAM);
        command.args(arguments).env("DATABASE_URL", &self.admin).env("AMQP_URL", &self.broker);
        let output = command.env("RUST_LOG", "off").output().unwrap();
        (output.status.code().unwrap(), said(output))
    }

    /// The virtual host's queues.
    pub(crate) async fn queues(&self) -> Vec<String> {
        let vhost = self.amqp.rsplit('/').next().unwrap();
        let url = format!("{}/api/queues/{vhost}", devstack::testing::Place::around().management);
        let queues: Value = client().get(url).send().await.unwrap().json().await.unwrap();
        let mut names: Vec<String> =
            queues.as_array().unwrap().iter().map(|q| q["name"].as_str().unwrap().to_owned()).collect();
        names.sort();
        names
    }

    /// Waits until the read model contains `version` of the person.
    pub(crate) async fn until_version(&self, person: Uuid, version: i64) {
        until(&format!("version {version} is projected"), async || {
            sqlx::query_scalar("SELECT version FROM score.person WHERE id = $1")
                .bind(person)
                .fetch_optional(&self.pool)
                .await
                .unwrap()
                == Some(version)
        })
        .await;
    }

    /// The read model, and the events that the score service publishes.
    pub(crate) async fn state(&self) -> String {
        let mut text = String::new();
        let sections = [
            (
                "score.person",
                "SELECT concat_ws(' ', p.id, cpf, created_at, 'version', p.version, 'total', total,
                                  'score', coalesce(c.version, 0))
                 FROM score.person p LEFT JOIN outbox.aggregate c ON c.aggregate_id = p.id::text ORDER BY p.id",
            ),
            (
                "score.entry",
                "SELECT concat_ws(' ', id, person_id, type, value, score, created_at) FROM score.entry ORDER BY id",
            ),
            (
                "outbox.event",
                "SELECT concat_ws(' ', type, aggregate_type || '/' || aggregate_id, version, payload, headers)
                 FROM outbox.event ORDER BY position",
            ),
            (
                "inbox.held",
                "SELECT concat_ws(' ', version, type, reason, error) FROM inbox.held ORDER BY aggregate_id, version",
            ),
        ];
        for (title, sql) in sections {
            let rows: Vec<String> = sqlx::query_scalar(sql).fetch_all(&self.pool).await.unwrap();
            writeln!(text, "{title}").unwrap();
            for row in rows {
                writeln!(text, "  {row}").unwrap();
            }
        }
        text
    }
}

async fn deliver(channel: &Channel, exchange: &str, key: &str, message: Message) {
    let options = BasicPublishOptions { mandatory: true, ..Default::default() };
    let (exchange, key, body) = (exchange.into(), key.into(), message.body.as_bytes());
    channel.basic_publish(exchange, key, options, body, message.properties).await.unwrap();
}

/// What an event carries beside its body.
pub(crate) fn properties(id: Uuid, type_: &str, person: Uuid, version: i64, body: &Value) -> BasicProperties {
    let mut headers = FieldTable::default();
    headers.insert("aggregate_type".into(), AMQPValue::LongString("person".into()));
    headers.insert("aggregate_id".into(), AMQPValue::LongString(person.to_string().into()));
    headers.insert("aggregate_version".into(), AMQPValue::LongLongInt(version));
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    headers.insert("traceparent".into(), AMQPValue::LongString(trace.into()));
    if type_ == "person.baseline" {
        headers.insert("baseline".into(), AMQPValue::Boolean(true));
    }
    if body.get("erased").is_some() {
        headers.insert("erased".into(), AMQPValue::Boolean(true));
    }
    BasicProperties::default()
        .with_message_id(id.to_string().into())
        .with_type(type_.into())
        .with_app_id("person".into())
        .with_user_id(PUBLISHER.into())
        .with_timestamp(1_767_225_600)
        .with_delivery_mode(2)
        .with_headers(headers)
}

/// The id of the n-th record of a test.
pub(crate) fn id(n: u128) -> Uuid {
    Uuid::from_u128(0x0198_c0de_0000_7000_8000_0000_0000_0000 + n)
}

/// The person of the samples.
pub(crate) fn person(id: Uuid, cpf: i64) -> Value {
    json!({
        "id": id, "cpf": cpf, "name": "abc", "address": "abc",
        "date_of_birth": "2019-06-15T22:23:55+00:00", "created_at": "2026-01-01T00:00:00.123456+00:00",
    })
}

/// One of their items. The value is JSON text, since a float would not do.
pub(crate) fn item(item: Uuid, person_id: Uuid, cpf: i64, value: &str) -> Value {
    let value: Value = serde_json::from_str(value).unwrap();
    json!({
        "id": item, "person_id": person_id, "type": "renting", "value": value,
        "created_at": "2026-01-01T00:00:01+00:00", "person": person(person_id, cpf),
    })
}
