//! A relay process, its database and its virtual host, under roles that may do no more than they must.

use std::{
    collections::HashMap,
    path::PathBuf,
    process::{ExitStatus, Output, Stdio},
};

use devstack::{
    ports,
    testing::{self, DEADLINE, Place, client, is_progress},
};
use futures_util::StreamExt;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, Consumer, ExchangeKind,
    message::Delivery,
    options::{BasicConsumeOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions},
    types::FieldTable,
};
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::{Child, Command},
    sync::{Mutex, watch},
};
use uuid::Uuid;

pub(crate) const EXCHANGE: &str = "event_dispatcher";
/// What a relay's user may configure, write and read, as `rabbitmq.sh` beside it grants it.
const RIGHTS: &str = include_str!("../../../deploy/permissions/relay");
/// What a relay's user may that declares the exchanges.
pub(crate) const DECLARING: &str = include_str!("../../../deploy/permissions/declaring-relay");
/// To be found in no log and in no message.
pub(crate) const DATABASE_PASSWORD: &str = "dbs3cretdbs3cret";
pub(crate) const BROKER_PASSWORD: &str = "mqs3cretmqs3cret";

/// In the words of RabbitMQ 3.10. Newer ones say which access they refuse, and to a user who may not make it they refuse
/// a queue that does not exist.
#[must_use]
pub(crate) fn as_of_3_10(said: &str) -> String {
    let said = ["configure", "write", "read"].iter().fold(said.to_owned(), |said, access| {
        said.replace(&format!("ACCESS_REFUSED - {access} access to "), "ACCESS_REFUSED - access to ")
    });
    let mut missing =
        said.replace("ACCESS-REFUSED: ACCESS_REFUSED - access to queue ", "NOT-FOUND: NOT_FOUND - no queue ");
    while let Some((before, (_user, after))) = missing
        .split_once(" refused for user '")
        .and_then(|(before, rest)| Some((before, rest.split_once('\'')?)))
    {
        missing = format!("{before}{after}");
    }
    missing
}

/// Asserts a snapshot in which times, processes, ids and rates are the same on every run.
macro_rules! assert_told {
    ($name:expr, $said:expr) => {{
        let said = $said;
        insta::with_settings!({filters => vec![
            (r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?( UTC|Z)", "TIME"),
            (r"\b\d+(\.\d)? (s|min)\b", "SPAN"),
            (r"\b(pid|session) \d+", "$1 PID"),
            (r#""pid": \d+"#, r#""pid": PID"#),
            (r"(led by|last was) [^ ,]+:\d+", "$1 HOST:PID"),
            (r#""identity": "[^"]+""#, r#""identity": "HOST:PID""#),
            (r#"(seconds|per_second)": [\d.]+"#, r#"$1": N"#),
            (r"PostgreSQL [\d.]+", "PostgreSQL VERSION"),
            (r"127\.0\.0\.1:\d+", "ADDRESS"),
            (r": [^ ,]+:\d+, heartbeat", ": HOST:PID, heartbeat"),
            (r"reach up to position \d+", "reach up to position N"),
            (r"[\d.]+ (published|appended)/s", "N $1/s"),
            (r"\b[a-z_]+_[0-9a-f]{32}", "DATABASE"),
        ]}, {
            insta::assert_snapshot!($name, said);
        });
    }};
}

/// Asks until there is an answer.
pub(crate) async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    testing::eventually(what, async || ask().await.ok_or_else(|| "nothing".to_owned())).await
}

/// A database with an outbox of the source `person`, and a virtual host.
pub(crate) struct Stack {
    /// A superuser's connections.
    pub(crate) admin: PgPool,
    /// Connections of a role that may append events, and nothing else.
    pub(crate) writer: PgPool,
    /// As the relay connects: what `deploy/permissions/roles.sql` grants.
    pub(crate) database_url: String,
    /// As a service connects that appends events.
    pub(crate) writer_url: String,
    /// As the relay connects: it may write to the exchange, and nothing else.
    pub(crate) amqp_url: String,
    /// The virtual host, also the name of the relay's user there.
    pub(crate) vhost: String,
    place: Place,
    amqp: String,
    connection: Mutex<Connection>,
}

impl Stack {
    /// With the exchange declared.
    pub(crate) async fn new(name: &str) -> Self {
        let stack = Self::without_exchange(name).await;
        stack.declare_exchange(ExchangeKind::Topic).await;
        stack
    }

    pub(crate) async fn without_exchange(name: &str) -> Self {
        Self::on(Place::around(), name).await
    }

    /// On these servers, without an exchange.
    pub(crate) async fn on(place: Place, name: &str) -> Self {
        let url = place.database(name).await;
        let (_, host) = url.rsplit_once('@').unwrap();
        let (_, database) = url.rsplit_once('/').unwrap();
        let admin = PgPool::connect(&url).await.unwrap();
        outbox::install(&mut admin.acquire().await.unwrap(), "person").await.unwrap();
        let (writer, relay) = (format!("{database}_writer"), format!("{database}_relay"));
        let names = [("writer", &*writer), ("outbox_relay", &*relay)];
        devstack::roles::make(&mut admin.acquire().await.unwrap(), &names, DATABASE_PASSWORD).await.unwrap();

        let amqp = place.virtual_host(name).await;
        let (_, address) = amqp.rsplit_once('@').unwrap();
        let (_, vhost) = address.rsplit_once('/').unwrap();
        let writer_url = format!("postgres://{writer}:{DATABASE_PASSWORD}@{host}");
        let stack = Self {
            admin,
            writer: PgPool::connect(&writer_url).await.unwrap(),
            writer_url,
            database_url: format!("postgres://{relay}:{DATABASE_PASSWORD}@{host}"),
            amqp_url: format!("amqp://{vhost}:{BROKER_PASSWORD}@{address}"),
            vhost: vhost.to_owned(),
            place,
            connection: Mutex::new(connect(&amqp).await),
            amqp,
        };
        stack.add_user().await;
        stack
    }

    /// The relay's user, who may write to the exchange.
    pub(crate) async fn add_user(&self) {
        let (user, path) =
            (json!({"password": BROKER_PASSWORD, "tags": ""}), format!("users/{}", self.vhost));
        self.manage(reqwest::Method::PUT, &path, Some(user)).await;
        self.permit(RIGHTS.lines().next().unwrap()).await;
    }

    /// Lets the relay's user declare what matches `configure`.
    pub(crate) async fn permit(&self, configure: &str) {
        let [_, write, read] = RIGHTS.lines().collect::<Vec<_>>()[..] else { panic!("{RIGHTS}") };
        self.permit_all(&[configure, write, read].join("\n")).await;
    }

    /// Gives the relay's user these rights: what it may configure, write and read, a line each.
    pub(crate) async fn permit_all(&self, rights: &str) {
        let [configure, write, read] = rights.lines().collect::<Vec<_>>()[..] else { panic!("{rights}") };
        let rights = json!({"configure": configure, "write": write, "read": read});
        let path = format!("permissions/{0}/{0}", self.vhost);
        self.manage(reqwest::Method::PUT, &path, Some(rights)).await;
    }

    /// Asks RabbitMQ's management API.
    pub(crate) async fn manage(&self, method: reqwest::Method, path: &str, body: Option<Value>) -> Value {
        self.try_manage(method, path, body).await.unwrap()
    }

    /// Asks RabbitMQ's management API, which may refuse.
    pub(crate) async fn try_manage(
        &self,
        method: reqwest::Method,
        path: &str,
        body: Option<Value>,
    ) -> reqwest::Result<Value> {
        let url = format!("{}/api/{path}", self.place.management);
        let mut request = client().request(method, url);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let answer = request.send().await?.error_for_status()?.text().await?;
        Ok(serde_json::from_str(&answer).unwrap_or_default())
    }

    /// The management API's URL for a user who may look, and do nothing.
    pub(crate) async fn management_url(&self) -> String {
        let (user, none) =
            (format!("{}_monitor", self.vhost), json!({"configure": "^$", "write": "^$", "read": "^$"}));
        let tagged = json!({"password": BROKER_PASSWORD, "tags": "management"});
        self.manage(reqwest::Method::PUT, &format!("users/{user}"), Some(tagged)).await;
        self.manage(reqwest::Method::PUT, &format!("permissions/{}/{user}", self.vhost), Some(none)).await;
        let (_, address) = self.place.management.rsplit_once('@').unwrap();
        format!("http://{user}:{BROKER_PASSWORD}@{address}")
    }

    pub(crate) async fn channel(&self) -> Channel {
        let mut connection = self.connection.lock().await;
        if let Ok(channel) = connection.create_channel().await {
            return channel;
        }
        *connection = connect(&self.amqp).await;
        connection.create_channel().await.unwrap()
    }

    pub(crate) async fn declare_exchange(&self, kind: ExchangeKind) {
        let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
        let channel = self.channel().await;
        channel.exchange_declare(EXCHANGE.into(), kind, options, FieldTable::default()).await.unwrap();
    }

    /// Declares a queue and binds it.
    pub(crate) async fn bind(&self, queue: &str, key: &str, arguments: FieldTable) {
        let channel = self.channel().await;
        let options = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare(queue.into(), options, arguments).await.unwrap();
        let options = QueueBindOptions::default();
        channel
            .queue_bind(queue.into(), EXCHANGE.into(), key.into(), options, FieldTable::default())
            .await
            .unwrap();
    }

    /// Receives what comes to a queue.
    pub(crate) async fn consume(&self, queue: &str) -> Subscriber {
        let channel = self.channel().await;
        let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
        let consumer =
            channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await.unwrap();
        Subscriber { consumer, messages: Vec::new() }
    }

    /// A queue, bound, and its subscriber.
    pub(crate) async fn subscribe(&self, key: &str) -> Subscriber {
        self.bind(key, key, FieldTable::default()).await;
        self.consume(key).await
    }

    /// Appends the events `numbers` in one transaction, in turn of each of the `types`, and in turn to
    /// each of `aggregates`, whose versions go on from call to call. The body is `{"n": number}`.
    pub(crate) async fn append(&self, numbers: std::ops::Range<i64>, aggregates: i64, types: &[&str]) {
        sqlx::query(
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
             SELECT 'thing', id, row_number() OVER (PARTITION BY id ORDER BY n)
                        + coalesce((SELECT a.version FROM outbox.aggregate a
                                    WHERE a.aggregate_type = 'thing' AND a.aggregate_id = new.id), 0),
                    ($4::text[])[n % cardinality($4) + 1], json_build_object('n', n)
             FROM (SELECT n, 'a' || n % $3 AS id FROM generate_series($1, $2 - 1) n) AS new ORDER BY n",
        )
        .bind(numbers.start)
        .bind(numbers.end)
        .bind(aggregates)
        .bind(types)
        .execute(&self.writer)
        .await
        .unwrap();
    }

    /// The program with a command, and no settings but where the servers are. And a long lease: a machine
    /// on which many tests run may well be silent for two seconds.
    pub(crate) fn command(&self, command: &str) -> Command {
        let mut program = program();
        program
            .arg(command)
            .env("DATABASE_URL", &self.database_url)
            .env("AMQP_URL", &self.amqp_url)
            .env("LEASE", "10s");
        program
    }

    /// Waits until the relay's stored progress is at `position`, with nothing open.
    pub(crate) async fn settled(&self, name: &str, position: i64) {
        let what = format!("{name} settles everything up to {position}");
        eventually(&what, async || {
            let sql = "SELECT low_water = $2 AND open = '{}' FROM outbox.relay WHERE name = $1";
            let row = sqlx::query_scalar(sql).bind(name).bind(position).fetch_optional(&self.admin).await;
            (row.unwrap() == Some(true)).then_some(())
        })
        .await;
    }
}

async fn connect(amqp: &str) -> Connection {
    Connection::connect(amqp, ConnectionProperties::default()).await.unwrap()
}

/// The program, without any settings.
pub(crate) fn program() -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_outbox-relay"));
    program.env_clear().stdin(Stdio::null()).kill_on_drop(true);
    program
}

/// What a program says at a terminal at which somebody types this once it asks, and its exit code.
pub(crate) async fn at_terminal(program: &Command, arguments: &str, typed: &str) -> (Option<i32>, String) {
    let program = program.as_std();
    let command = format!("{} {arguments}", program.get_program().to_str().unwrap());
    // A pseudo-terminal.
    let mut terminal = Command::new("script");
    terminal.args(["--quiet", "--return", "--command", &command, "/dev/null"]);
    terminal.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let mut terminal =
        terminal.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let mut keys = terminal.stdin.take().unwrap();
    let mut screen = terminal.stdout.take().unwrap();
    let mut said = String::new();
    while !said.contains("[y/N]") {
        let mut some = [0; 1_000];
        let read = screen.read(&mut some).await.unwrap();
        assert!(read > 0, "{said}");
        said.push_str(std::str::from_utf8(&some[..read]).unwrap());
    }
    keys.write_all(typed.as_bytes()).await.unwrap();
    screen.read_to_string(&mut said).await.unwrap();
    (terminal.wait().await.unwrap().code(), said)
}

/// Runs to the end and returns what there is to see, none of it secret.
pub(crate) async fn output(program: &mut Command) -> String {
    let Ok(ended) = tokio::time::timeout(DEADLINE, program.output()).await else {
        panic!("the program goes on, with {:?}", program.as_std());
    };
    let Output { status, stdout, stderr } = ended.unwrap();
    let (stdout, stderr) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
    for secret in [DATABASE_PASSWORD, BROKER_PASSWORD] {
        assert!(!stdout.contains(secret) && !stderr.contains(secret), "a password: {stdout}{stderr}");
    }
    // The log is not what a user reads here: the last word is.
    let stderr: Vec<&str> =
        stderr.lines().filter(|line| !line.starts_with('{') && !is_progress(line)).collect();
    let code = status.code().map_or("none".to_owned(), |code| code.to_string());
    [format!("exit code: {code}"), stdout.trim_end().to_owned(), stderr.join("\n")]
        .into_iter()
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join("\n")
}

/// A relay that runs; killed when dropped.
pub(crate) struct Relay {
    child: Child,
    address: String,
    log: PathBuf,
    http: reqwest::Client,
}

impl Relay {
    /// Starts it and waits until it lives.
    pub(crate) async fn start(program: &mut Command) -> Self {
        let http = client();
        loop {
            let address = format!("127.0.0.1:{}", ports::free());
            let log =
                PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("relay-{}.log", Uuid::new_v4()));
            let stderr = std::fs::File::create(&log).unwrap();
            let child = program.env("LISTEN", &address).stderr(stderr).spawn().unwrap();
            let mut relay = Self { child, address, log, http: http.clone() };
            let lives = eventually("the relay lives", async || match relay.child.try_wait().unwrap() {
                Some(_) => Some(false),
                None => relay.get("live").await.map(|_| true),
            });
            if lives.await {
                return relay;
            }
            // Between choosing the port and taking it, somebody else may have taken it.
            assert!(relay.log().contains("cannot listen on"), "the relay ended: {}", relay.log());
        }
    }

    /// Starts it and waits until it is ready.
    pub(crate) async fn ready(program: &mut Command) -> Self {
        let relay = Self::start(program).await;
        relay.is_ready().await;
        relay
    }

    pub(crate) async fn get(&self, path: &str) -> Option<(u16, String)> {
        let answer = self.http.get(format!("http://{}/{path}", self.address)).send().await.ok()?;
        Some((answer.status().as_u16(), answer.text().await.ok()?))
    }

    pub(crate) async fn is_ready(&self) {
        eventually("the relay is ready", async || (self.get("ready").await?.0 == 200).then_some(())).await;
    }

    /// With one connection it is ready; this waits for all of them.
    pub(crate) async fn is_ready_with_all_connections(&self) {
        eventually("all connections can publish", async || {
            let (status, body) = self.get("ready").await?;
            (status == 200 && !body.contains("cannot publish")).then_some(())
        })
        .await;
    }

    /// Waits until it is not ready for a reason that contains `reason`, and returns all it says.
    pub(crate) async fn waits(&self, reason: &str) -> String {
        eventually(&format!("the relay waits: {reason}"), async || {
            let (status, body) = self.get("ready").await?;
            let body: Value = serde_json::from_str(&body).ok()?;
            let said: Vec<String> = body["waiting"]
                .as_array()?
                .iter()
                .map(|w| format!("{}: {}", w["part"].as_str().unwrap(), w["reason"].as_str().unwrap()))
                .collect();
            // A lane that has only begun is nobody's reason.
            let begun = !said.iter().any(|s| s == "broker: connecting");
            (status == 503 && begun && said.iter().any(|s| s.contains(reason))).then(|| said.join("\n"))
        })
        .await
    }

    /// A metric's value; none before the relay knows its source. Of several series, the first.
    pub(crate) async fn metric(&self, name: &str) -> Option<String> {
        let (_, text) = self.get("metrics").await.unwrap();
        text.lines().find_map(|line| {
            let labels = line.strip_prefix(name)?;
            let (_, value) = labels.strip_prefix('{')?.rsplit_once("} ")?;
            Some(value.to_owned())
        })
    }

    /// What was counted as published, and as dropped.
    pub(crate) async fn counted(&self) -> (String, String) {
        let value = async |name| self.metric(name).await.unwrap_or_else(|| "0".to_owned());
        (value("outbox_relay_published_total").await, value("outbox_relay_dropped_total").await)
    }

    /// How many it has published and dropped, once that is so: it counts an event after its database knows.
    pub(crate) async fn counts(&self, published: u64, dropped: u64) {
        let wanted = (published.to_string(), dropped.to_string());
        let what = format!("{wanted:?} are counted");
        eventually(&what, async || (self.counted().await == wanted).then_some(())).await;
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) async fn signal(&self, signal: &str) {
        let id = self.child.id().unwrap().to_string();
        let sent = Command::new("kill").args([&format!("-{signal}"), &id]).status().await.unwrap();
        assert!(sent.success(), "SIG{signal} was not sent");
    }

    /// SIGTERM, and how it ended.
    pub(crate) async fn terminate(&mut self) -> ExitStatus {
        self.signal("TERM").await;
        tokio::time::timeout(DEADLINE, self.child.wait()).await.unwrap().unwrap()
    }

    /// SIGKILL.
    pub(crate) async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let from = log.char_indices().rev().nth(5_000).map_or(0, |(at, _)| at);
            eprintln!("the relay's log ends with:\n{}", &log[from..]);
        }
        let _ = std::fs::remove_file(&self.log);
    }
}

/// A message as it was received.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub(crate) key: String,
    pub(crate) properties: BasicProperties,
    pub(crate) body: String,
}

impl From<Delivery> for Message {
    fn from(delivery: Delivery) -> Self {
        Self {
            key: delivery.routing_key.to_string(),
            properties: delivery.properties,
            body: String::from_utf8(delivery.data).unwrap(),
        }
    }
}

impl Message {
    /// The number that [`Stack::append`] gave it.
    pub(crate) fn number(&self) -> i64 {
        serde_json::from_str::<Value>(&self.body).unwrap()["n"].as_i64().unwrap()
    }

    pub(crate) fn header(&self, name: &str) -> String {
        use lapin::types::AMQPValue::{Boolean, LongLongInt, LongString};
        match self.properties.headers().as_ref().unwrap().inner().get(name).unwrap() {
            LongString(text) => String::from_utf8(text.as_bytes().to_vec()).unwrap(),
            LongLongInt(number) => number.to_string(),
            Boolean(value) => value.to_string(),
            other => panic!("{name}: {other:?}"),
        }
    }
}

/// Receives messages, and keeps them.
pub(crate) struct Subscriber {
    consumer: Consumer,
    pub(crate) messages: Vec<Message>,
}

impl Subscriber {
    /// Receives until `enough` of all that came so far.
    pub(crate) async fn until(&mut self, mut enough: impl FnMut(&[Message]) -> bool) -> &[Message] {
        let end = tokio::time::Instant::now() + DEADLINE;
        while !enough(&self.messages) {
            let next = tokio::time::timeout_at(end, self.consumer.next()).await;
            let delivery = next
                .unwrap_or_else(|_| panic!("nothing more came after {} messages", self.messages.len()))
                .unwrap()
                .unwrap();
            self.messages.push(delivery.into());
        }
        &self.messages
    }

    /// Receives until there are `count` messages in all.
    pub(crate) async fn count(&mut self, count: usize) -> &[Message] {
        self.until(|messages| messages.len() >= count).await
    }

    /// Receives until each of the events `0..count` came at least once, and asserts that the first
    /// delivery of each was in its aggregate's order.
    pub(crate) async fn complete(&mut self, count: usize) -> &[Message] {
        let (mut seen, mut from) = (std::collections::HashSet::new(), 0);
        self.until(|messages| {
            seen.extend(messages[from..].iter().map(Message::number));
            from = messages.len();
            seen.len() >= count
        })
        .await;
        assert!(
            (0..i64::try_from(count).unwrap()).all(|n| seen.contains(&n)),
            "numbers that were not appended"
        );
        self.assert_order();
        &self.messages
    }

    /// Each aggregate's first deliveries are its versions 1, 2, 3, … without a hole.
    pub(crate) fn assert_order(&self) {
        let mut versions: HashMap<String, i64> = HashMap::new();
        for message in &self.messages {
            let version: i64 = message.header("aggregate_version").parse().unwrap();
            let last = versions.entry(message.header("aggregate_id")).or_default();
            assert!(
                version <= *last + 1,
                "{} jumps from {last} to {version}",
                message.header("aggregate_id")
            );
            *last = version.max(*last);
        }
    }
}

impl Subscriber {
    /// Nothing came twice, and each aggregate's events of a type in their order, whatever lies between.
    pub(crate) fn assert_rising(&self) {
        let mut last: HashMap<(String, &str), i64> = HashMap::new();
        for message in &self.messages {
            let number = message.number();
            let before = last.insert((message.header("aggregate_id"), &message.key), number);
            assert!(before.is_none_or(|before| before < number), "{before:?} before {number}");
        }
    }
}

/// A TCP proxy before a server, whose connections can be cut, left hanging, or held up for a while.
pub(crate) struct Proxy {
    port: u16,
    server: watch::Sender<String>,
    hanging: watch::Sender<bool>,
    held_up: watch::Sender<bool>,
}

impl Proxy {
    pub(crate) async fn new(url: &str) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (server, target) = watch::channel(host(url).to_owned());
        let (hanging, hangs) = watch::channel(false);
        let (held_up, held) = watch::channel(false);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = target.borrow().clone();
                tokio::spawn(forward(client, server, hangs.clone(), held.clone()));
            }
        });
        Self { port, server, hanging, held_up }
    }

    /// From now on another server is behind it. Cuts all connections.
    pub(crate) fn switch(&self, url: &str) {
        self.server.send_replace(host(url).to_owned());
        self.cut();
    }

    /// The URL with the proxy in place of the server.
    pub(crate) fn url(&self, url: &str) -> String {
        url.replace(host(url), &format!("127.0.0.1:{}", self.port))
    }

    /// Cuts all connections; new ones work.
    pub(crate) fn cut(&self) {
        self.hanging.send_replace(false);
    }

    /// From now on nothing passes, and nobody is told.
    pub(crate) fn hang(&self) {
        self.hanging.send_replace(true);
    }

    /// From now on nothing passes, until it is let go; nothing of it is lost.
    pub(crate) fn hold_up(&self, held_up: bool) {
        self.held_up.send_replace(held_up);
    }
}

/// `host:port` of a URL.
fn host(url: &str) -> &str {
    url.rsplit_once('@').unwrap().1.split('/').next().unwrap()
}

/// Passes bytes on until one side hangs up.
async fn pass(
    mut from: tokio::net::tcp::ReadHalf<'_>,
    mut to: tokio::net::tcp::WriteHalf<'_>,
    mut held_up: watch::Receiver<bool>,
) -> std::io::Result<()> {
    let mut bytes = [0; 16 * 1024];
    loop {
        let count = from.read(&mut bytes).await?;
        if count == 0 || held_up.wait_for(|held_up| !held_up).await.is_err() {
            return Ok(());
        }
        to.write_all(&bytes[..count]).await?;
    }
}

async fn forward(
    mut client: TcpStream,
    server: String,
    mut hanging: watch::Receiver<bool>,
    held_up: watch::Receiver<bool>,
) {
    hanging.mark_unchanged();
    // A server that is not there hangs up.
    let Ok(mut server) = TcpStream::connect(server).await else { return };
    let hangs = *hanging.borrow();
    let ((from_client, to_client), (from_server, to_server)) = (client.split(), server.split());
    tokio::select! {
        _ = pass(from_client, to_server, held_up.clone()), if !hangs => {}
        _ = pass(from_server, to_client, held_up), if !hangs => {}
        _ = hanging.changed() => {}
    }
    // Open until it is cut.
    let hangs = *hanging.borrow();
    if hangs {
        let _ = hanging.changed().await;
    }
}
