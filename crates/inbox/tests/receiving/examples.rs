//! The examples that show how to write a subscriber, run as they stand: a program in Rust that uses this
//! crate, and one in Python that uses nothing of it. The same events lead both to the same book.

use std::{
    io::Read,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
};

use devstack::{testing::Place, users::Rights};
use inbox::Envelope;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueuePurgeOptions},
    types::{AMQPValue, FieldTable, ShortString},
};
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    forks::after,
    support::{from, typed, until},
};

/// A virtual host, an empty database, and events of persons.
pub(crate) struct World {
    pub(crate) amqp: String,
    /// As a subscriber's own user.
    broker: String,
    database: String,
    pool: PgPool,
    channel: Channel,
    _connection: Connection,
}

/// A running program, killed when it is dropped.
pub(crate) struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Program {
    /// Asks it to end, as a service manager does.
    async fn stop(mut self) -> ExitStatus {
        let signalled = Command::new("kill").arg(self.0.id().to_string()).status().unwrap();
        assert!(signalled.success());
        let mut ended = None;
        until("the program has ended", async || {
            ended = self.0.try_wait().unwrap();
            ended.is_some()
        })
        .await;
        ended.unwrap()
    }
}

impl World {
    pub(crate) async fn new(name: &str) -> Self {
        let amqp = devstack::testing::virtual_host(name).await;
        let connection = Connection::connect(&amqp, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        let database = devstack::testing::database(name).await;
        let pool = PgPool::connect(&database).await.unwrap();
        let queue = if name.ends_with("python") { "contacts" } else { "address-book" };
        let broker = Place::around().broker_user(&amqp, "subscriber", Rights::Subscriber(queue)).await;
        Self { amqp, broker, database, pool, channel, _connection: connection }
    }

    fn start(&self, program: &mut Command) -> Program {
        program.env("AMQP_URL", &self.broker);
        program.env("SOURCE", "others=nobody,person=nobody,person=devstack");
        self.start_into(program, Stdio::null())
    }

    /// Starts it, with its standard output there.
    pub(crate) fn start_into(&self, program: &mut Command, output: impl Into<Stdio>) -> Program {
        program.env("DATABASE_URL", &self.database);
        Program(program.stdout(output).spawn().unwrap())
    }

    /// Waits until somebody consumes from the queue.
    pub(crate) async fn until_consumed(&self, queue: &str) {
        let server = std::env::var(devstack::testing::MANAGEMENT_URL).unwrap();
        let (_, vhost) = self.amqp.rsplit_once('/').unwrap();
        let url = format!("{server}/api/queues/{vhost}/{queue}");
        until("the queue has a consumer", async || {
            let queue: Value = reqwest::get(&url).await.unwrap().json().await.unwrap();
            queue["consumers"].as_u64().unwrap_or(0) > 0
        })
        .await;
    }

    pub(crate) async fn publish(&self, envelope: &Envelope) {
        let key = envelope.routing_key.as_str().into();
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let properties = envelope.properties.clone();
        let published =
            self.channel.basic_publish("event_dispatcher".into(), key, options, &envelope.body, properties);
        let confirmed = published.await.unwrap().await.unwrap();
        assert!(confirmed.take_message().is_none(), "no queue takes it");
    }

    /// Everything that a book can meet, in an order that needs a sequencer.
    async fn publish_all(&self) {
        let (ann, bob, eve, joe) = (id(1), id(2), id(3), id(4));
        let name = |id: Uuid, name: &str| json!({"id": id, "name": name, "address": "abc", "cpf": 1});
        for event in [
            event("person.new", ann, 1, &name(ann, "Ann"), None),
            // Twice, then one that is early, one of tomorrow, and the one that both wait for.
            event("person.new", ann, 1, &name(ann, "Ann"), None),
            event("person.changed", ann, 4, &name(ann, "Ann of 4"), None),
            event("person.married", ann, 3, &json!({"what": "a type of tomorrow"}), None),
            event("person.changed", ann, 2, &name(ann, "Ann of 2"), None),
            event("person.changed", ann, 5, &json!({"id": ann, "erased": true}), Some("erased")),
            // A late subscriber begins with a baseline, which drops what was held below it.
            event("person.changed", bob, 5, &name(bob, "Bob of 5"), None),
            event("person.baseline", bob, 7, &name(bob, "Bob of 7"), Some("baseline")),
            event("person.changed", bob, 8, &name(bob, "Bob of 8"), None),
            // A deletion jumps, too, and a late event does not revive.
            event("person.new", eve, 1, &name(eve, "Eve"), None),
            event("person.deleted", eve, 4, &json!({"id": eve}), None),
            event("person.changed", eve, 2, &name(eve, "Eve of 2"), None),
            // A body that cannot be read, and one that waits behind it.
            event("person.new", joe, 1, &json!({"id": joe, "address": "abc"}), None),
            event("person.changed", joe, 2, &name(joe, "Joe of 2"), None),
            // Nobody may forge an event: a followed source by another user, by none, and a source of its own.
            from(
                event("person.baseline", ann, 9, &name(ann, "forged"), Some("baseline")),
                "others",
                "devstack",
            ),
            anonymous(event("person.deleted", ann, 9, &json!({"id": ann}), None)),
            from(event("person.changed", ann, 6, &name(ann, "forged"), None), "persons", "devstack"),
            event("person.changed", ann, 6, &name(ann, "Ann of 6"), None),
        ] {
            self.publish(&event).await;
        }
        until("everybody else is up to date", async || self.book().await.contains("Ann of 6")).await;
    }

    /// The source lost commits: it goes on as another incarnation. Returns the book then.
    async fn begins_anew(&self) -> String {
        let (ann, bob, eve) = (id(1), id(2), id(3));
        let name = |id: Uuid, name: &str| json!({"id": id, "name": name, "address": "abc", "cpf": 1});
        for event in [
            // Begins no chain: that is for the whole state to do.
            anew(event("person.changed", bob, 1, &name(bob, "Bob of 1"), None), None),
            anew(event("person.baseline", ann, 3, &name(ann, "Ann again"), Some("baseline")), None),
            // Of the lost time.
            event("person.changed", ann, 7, &name(ann, "Ann of the lost time"), None),
            anew(event("person.deleted", bob, 9, &json!({"id": bob}), None), None),
            anew(event("person.new", eve, 1, &name(eve, "Eve again"), None), Some("chain_start")),
            anew(event("person.changed", ann, 4, &name(ann, "Ann again of 4"), None), None),
        ] {
            self.publish(&event).await;
        }
        until("it is up to date", async || self.book().await.contains("Ann again of 4")).await;
        self.book().await
    }

    async fn book(&self) -> String {
        self.rows("SELECT concat_ws(' ', id, name, address) FROM contact ORDER BY id").await
    }

    async fn rows(&self, sql: &'static str) -> String {
        let rows: Vec<String> = sqlx::query_scalar(sql).fetch_all(&self.pool).await.unwrap();
        rows.join("\n")
    }
}

pub(crate) fn id(n: u128) -> Uuid {
    Uuid::from_u128(0x0198_c0de_0000_7000_8000_0000_0000_0000 + n)
}

pub(crate) fn event(type_: &str, person: Uuid, version: i64, body: &Value, flag: Option<&str>) -> Envelope {
    let flags: Vec<&str> = flag.into_iter().collect();
    let mut envelope = typed(type_, &person.to_string(), version, &body.to_string(), &flags);
    let mut headers: FieldTable = envelope.properties.headers().clone().unwrap();
    headers.insert("aggregate_type".into(), AMQPValue::LongString("person".into()));
    envelope.properties = envelope.properties.with_headers(headers);
    from(envelope, "person", "devstack")
}

/// In the incarnation that follows the first.
fn anew(mut envelope: Envelope, flag: Option<&str>) -> Envelope {
    let mut headers: FieldTable = envelope.properties.headers().clone().unwrap();
    headers.insert("source_parent".into(), AMQPValue::LongLongInt(1));
    if let Some(flag) = flag {
        headers.insert(flag.into(), AMQPValue::Boolean(true));
    }
    envelope.properties = envelope.properties.with_headers(headers);
    from(envelope, "person~1764426123456", "devstack")
}

/// Without the user that the broker verifies.
fn anonymous(mut envelope: Envelope) -> Envelope {
    let old = std::mem::take(&mut envelope.properties);
    let text = |text: &Option<ShortString>| text.clone().unwrap();
    envelope.properties = BasicProperties::default()
        .with_message_id(text(old.message_id()))
        .with_type(text(old.kind()))
        .with_app_id(text(old.app_id()))
        .with_headers(old.headers().clone().unwrap());
    envelope
}

/// A Python that has what the example needs, which crates/devstack/install sees to.
pub(crate) fn python() -> Command {
    for python in ["python3", "/usr/bin/python3"] {
        let asked = Command::new(python).args(["-c", "import pika, psycopg2"]).output();
        if asked.is_ok_and(|asked| asked.status.success()) {
            return Command::new(python);
        }
    }
    panic!("no python3 has pika and psycopg2: run crates/devstack/install tests")
}

#[tokio::test]
async fn in_python_from_the_contract_alone() {
    let world = World::new("contacts_python").await;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/examples/subscriber.py");
    let start = || world.start(python().arg(&path));
    let first = start();
    world.until_consumed("contacts").await;
    world.publish_all().await;
    assert!(first.stop().await.success());
    let follows = "SELECT concat_ws(' ', source, aggregate_type, aggregate_id, version) FROM follows ORDER BY aggregate_id";
    let held =
        "SELECT concat_ws(' ', aggregate_id, version, type, error) FROM held ORDER BY aggregate_id, version";
    let before = [world.book().await, world.rows(follows).await, world.rows(held).await];

    // The fix, here of the event, as it cannot be of the program; then a start tries once more.
    let fix = "UPDATE held SET body = convert_to(jsonb_set(convert_from(body, 'UTF8')::jsonb, '{name}', '\"Joe\"')::text, 'UTF8')
               WHERE error IS NOT NULL";
    sqlx::raw_sql(fix).execute(&world.pool).await.unwrap();
    let second = start();
    until("nothing is held", async || world.rows("SELECT id FROM held").await.is_empty()).await;
    world.until_consumed("contacts").await;
    let after = [world.book().await, world.rows(follows).await];
    let anew = [world.begins_anew().await, world.rows(follows).await, world.rows(held).await];
    assert!(second.stop().await.success());
    let said = [before.join("\n\n"), after.join("\n\n")].join("\n\n# after the fix\n\n");
    insta::assert_snapshot!([said, anew.join("\n\n")].join("\n\n# in a new incarnation\n\n"));
}

/// A subscriber that follows versions stops where the source's history is another one, however that arrives.
#[tokio::test]
async fn in_python_a_fork_stops_it() {
    let world = World::new("fork_python").await;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/examples/subscriber.py");
    let ann = id(1);
    let follows = |version: i64, previous: &str| {
        let body = json!({"id": ann, "name": format!("Ann of {version}"), "address": "abc"});
        after(event("person.changed", ann, version, &body, None), AMQPValue::LongString(previous.into()))
    };
    let of = |version| crate::support::id(&ann.to_string(), version, 0).to_string();
    let other = Uuid::from_u128(7).to_string();
    let ends = async |version: i64| {
        let mut program = world.start(python().arg(&path).stderr(Stdio::piped()));
        let mut ended = None;
        until("the program has ended", async || {
            ended = program.0.try_wait().unwrap();
            ended.is_some()
        })
        .await;
        assert!(!ended.unwrap().success());
        let mut said = String::new();
        program.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(
            said.contains(&format!("version {version} follows another event than the one applied")),
            "{said}"
        );
    };
    let first = world.start(python().arg(&path));
    world.until_consumed("contacts").await;
    for event in
        [follows(1, "no id"), follows(2, &of(1).to_ascii_uppercase()), follows(3, ""), follows(4, &of(3))]
    {
        world.publish(&event).await;
    }
    until("it is up to date", async || world.book().await.contains("Ann of 4")).await;
    assert!(first.stop().await.success());
    world.publish(&follows(5, &other)).await;
    ends(5).await;
    world.channel.queue_purge("contacts".into(), QueuePurgeOptions::default()).await.unwrap();

    // Held, and then it is next.
    world.publish(&follows(6, &other)).await;
    world.publish(&follows(5, &of(4))).await;
    ends(6).await;
    assert!(world.book().await.contains("Ann of 4"));
}

/// The example in this crate. `cargo test` builds it, unless it is told to build one test alone.
fn address_book() -> Command {
    let test = std::env::current_exe().unwrap();
    let path = test.parent().unwrap().with_file_name("examples").join("address_book");
    assert!(path.exists(), "cargo build -p inbox --examples makes {}", path.display());
    Command::new(path)
}

#[tokio::test]
async fn in_rust_with_this_crate() {
    let world = World::new("contacts_rust").await;
    let listen = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let start = || world.start(address_book().env("LISTEN", &listen));
    let until_ready = async || {
        until("it is ready", async || {
            let answer = reqwest::get(format!("http://{listen}/")).await;
            answer.is_ok_and(|answer| answer.status().is_success())
        })
        .await;
    };
    let first = start();
    until_ready().await;
    world.publish_all().await;
    assert!(first.stop().await.success());
    let said = |argument: &str| {
        let mut command = address_book();
        command.arg(argument).env("DATABASE_URL", &world.database).env("AMQP_URL", &world.amqp);
        let output = command.stderr(Stdio::inherit()).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let before = [world.book().await, said("held")];

    // The fix, here of the event, as it cannot be of the program.
    let fix = "UPDATE inbox.held SET payload = convert_to(jsonb_set(convert_from(payload, 'UTF8')::jsonb, '{name}', '\"Joe\"')::text, 'UTF8')
               WHERE reason = 'poison'";
    sqlx::raw_sql(fix).execute(&world.pool).await.unwrap();
    let second = start();
    until_ready().await;
    let after = [said("redrive"), world.book().await, said("held")];
    let anew = [world.begins_anew().await, said("held")];
    assert!(second.stop().await.success());
    let filters = vec![(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", "TIME")];
    insta::with_settings!({filters => filters}, {
        let said = [before.join("\n\n"), after.join("\n\n")].join("\n\n# after the fix\n\n");
        insta::assert_snapshot!([said, anew.join("\n\n")].join("\n\n# in a new incarnation\n\n"));
    });
}
