//! A read model with known rows, the program that serves it, and a wire between the two to cut.

use std::{net::SocketAddr, process::Stdio, sync::LazyLock, time::Duration};

use devstack::testing::{Document, Roles};
use reqwest::{
    Method, StatusCode,
    header::{HeaderMap, HeaderName, HeaderValue},
};
use rustix::process::{Pid, Signal};
use sqlx::{AssertSqlSafe, Connection, PgConnection, postgres::PgConnectOptions};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    task::{JoinHandle, JoinSet},
};

pub(crate) use devstack::testing::DEADLINE;

/// A database with the schemas `score` and `inbox`, and a role that has what the API is granted and no more.
pub(crate) struct Database {
    pub(crate) admin: PgConnection,
    url: String,
    pub(crate) role: String,
    pub(crate) options: PgConnectOptions,
}

impl Database {
    /// Without the schemas.
    pub(crate) async fn empty() -> Self {
        let url = devstack::testing::database("score_api").await;
        let mut admin = PgConnection::connect(&url).await.unwrap();
        let options: PgConnectOptions = url.parse().unwrap();
        let role = Roles::of(&url).name("score_api");
        sqlx::query(AssertSqlSafe(format!("CREATE ROLE {role} LOGIN PASSWORD 'test'")))
            .execute(&mut admin)
            .await
            .unwrap();
        Self { admin, url, role, options }
    }

    pub(crate) async fn migrated() -> Self {
        let mut this = Self::empty().await;
        this.migrate().await;
        this.grant().await;
        this
    }

    pub(crate) async fn migrate(&mut self) {
        for schema in score_api::schemas() {
            schema.migrator.run(&mut self.admin).await.unwrap();
        }
    }

    pub(crate) async fn grant(&mut self) {
        Roles::make(&self.url).await;
    }

    /// For the role of the API.
    pub(crate) fn url(&self) -> String {
        self.url_through(&format!("{}:{}", self.options.get_host(), self.options.get_port()))
    }

    pub(crate) fn url_through(&self, address: &str) -> String {
        format!("postgres://{}:test@{address}/{}", self.role, self.options.get_database().unwrap())
    }

    /// A person as the projector would store it. `life` and `day` are digits of its id and its time.
    pub(crate) async fn person(&mut self, cpf: i64, life: u32, day: u8, version: i64, total: &str) {
        let id = id(life);
        let sql = format!(
            "INSERT INTO score.person (id, cpf, created_at, version, total, updated_at)
             VALUES ('{id}', {cpf}, '2026-01-{day:02}', {version}, {total}, '2026-02-01 12:00:00.123456+00')"
        );
        sqlx::query(AssertSqlSafe(sql)).execute(&mut self.admin).await.unwrap();
    }

    /// Brings lives to their versions, as the projector does: inbox and read model in one transaction.
    /// The cpf is the life's number, and the score its version; without one, the person has ended.
    pub(crate) async fn apply(&mut self, lives: impl IntoIterator<Item = (u32, i64, bool)>) {
        apply(&mut self.admin, lives).await;
    }

    /// What the projector sends after its commits.
    pub(crate) async fn notify(&mut self) {
        sqlx::query("NOTIFY score_model").execute(&mut self.admin).await.unwrap();
    }

    /// How far the inbox is with a person.
    pub(crate) async fn inbox(&mut self, consumer: &str, source: &str, type_: &str, life: u32, version: i64) {
        sqlx::query(
            "INSERT INTO inbox.aggregate
                 (consumer, source, aggregate_type, aggregate_id, version, last_event_id)
             VALUES ($1, $2, $3, $4, $5, CASE WHEN $5 > 0 THEN gen_random_uuid() END)",
        )
        .bind(consumer)
        .bind(source)
        .bind(type_)
        .bind(id(life))
        .bind(version)
        .execute(&mut self.admin)
        .await
        .unwrap();
    }
}

/// The id of a person.
pub(crate) fn id(life: u32) -> String {
    format!("0198c0de-0000-7000-8000-{life:012}")
}

/// See [`Database::apply`]. The flag says whether the person lives.
pub(crate) async fn apply(conn: &mut PgConnection, lives: impl IntoIterator<Item = (u32, i64, bool)>) {
    let (mut ids, mut cpfs, mut versions, mut alive) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (life, version, lives) in lives {
        ids.push(id(life));
        cpfs.push(i64::from(life));
        versions.push(version);
        alive.push(lives);
    }
    let mut tx = conn.begin().await.unwrap();
    sqlx::query(
        "INSERT INTO inbox.aggregate AS a
             (consumer, source, aggregate_type, aggregate_id, version, last_event_id)
         SELECT 'score', 'person', 'person', new.id, new.version, gen_random_uuid()
         FROM unnest($1::text[], $2::bigint[]) AS new (id, version)
         ON CONFLICT (consumer, source, aggregate_type, aggregate_id)
         DO UPDATE SET version = excluded.version, updated_at = now()",
    )
    .bind(&ids)
    .bind(&versions)
    .execute(&mut *tx)
    .await
    .unwrap();
    sqlx::query(
        "INSERT INTO score.person AS p (id, cpf, created_at, version, total)
         SELECT new.id::uuid, new.cpf, '2026-01-01', new.version, new.version
         FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::bool[]) AS new (id, cpf, version, alive)
         WHERE new.alive
         ON CONFLICT (id) DO UPDATE SET version = excluded.version, total = excluded.total",
    )
    .bind(&ids)
    .bind(&cpfs)
    .bind(&versions)
    .bind(&alive)
    .execute(&mut *tx)
    .await
    .unwrap();
    sqlx::query(
        "DELETE FROM score.person p USING unnest($1::text[], $2::bool[]) AS new (id, alive)
         WHERE p.id = new.id::uuid AND NOT new.alive",
    )
    .bind(&ids)
    .bind(&alive)
    .execute(&mut *tx)
    .await
    .unwrap();
    tx.commit().await.unwrap();
}

/// The command, with nothing in its environment that the test did not put there.
pub(crate) fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_score-api"));
    command.args(arguments).env_clear().stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// A running `score-api run`.
pub(crate) struct Program {
    pub(crate) child: Child,
    pub(crate) address: SocketAddr,
    /// Keeps reading the log, so that the program never blocks on a full pipe. The lines since it listens.
    log: JoinHandle<Vec<serde_json::Value>>,
}

impl Program {
    /// Started, whether or not it is ready.
    pub(crate) async fn start(database_url: &str) -> Self {
        Self::start_with(database_url, &[]).await
    }

    pub(crate) async fn start_with(database_url: &str, settings: &[&str]) -> Self {
        let command = command(&[&["run", "--listen", "127.0.0.1:0"], settings].concat());
        Self::spawn(command, database_url).await
    }

    /// With a limit that the shell sets before.
    pub(crate) async fn start_limited(limit: &str, database_url: &str) -> Self {
        let mut command = Command::new("sh");
        let run = format!("{limit}; exec {} run --listen 127.0.0.1:0", env!("CARGO_BIN_EXE_score-api"));
        command.args(["-c", &run]).env_clear().stdin(Stdio::null()).kill_on_drop(true);
        Self::spawn(command, database_url).await
    }

    async fn spawn(mut command: Command, database_url: &str) -> Self {
        let mut child = command
            .env("DATABASE_URL", database_url)
            .env("LOG_FORMAT", "json")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let listening = async {
            loop {
                let line = lines.next_line().await.unwrap().expect("it ended before it listened");
                let line: serde_json::Value = serde_json::from_str(&line).unwrap();
                if line["message"] == "listening" {
                    let address = line["addr"].as_str().unwrap();
                    break address.trim_start_matches("socket://").parse().unwrap();
                }
            }
        };
        let address = tokio::time::timeout(DEADLINE, listening).await.expect("it listens");
        let log = tokio::spawn(async move {
            let mut log = Vec::new();
            while let Ok(Some(line)) = lines.next_line().await {
                // An error that ends the program is a line of text.
                log.push(serde_json::from_str(&line).unwrap_or(serde_json::Value::String(line)));
            }
            log
        });
        Self { child, address, log }
    }

    pub(crate) async fn ready(database_url: &str) -> Self {
        Self::ready_with(database_url, &[]).await
    }

    pub(crate) async fn ready_with(database_url: &str, settings: &[&str]) -> Self {
        let program = Self::start_with(database_url, settings).await;
        program.until_ready().await;
        program
    }

    pub(crate) async fn until_ready(&self) {
        self.until("/ready", 200).await;
    }

    pub(crate) async fn until(&self, path: &str, status: u16) {
        let reached = async {
            while self.request("GET", path, &[]).await.status != status {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(DEADLINE, reached)
            .await
            .unwrap_or_else(|_| panic!("{path} never became {status}"));
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.request("GET", path, &[]).await
    }

    pub(crate) async fn request(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
        request(self.address, method, path, headers).await
    }

    /// A request that waits for its answer while the test goes on.
    pub(crate) fn asks(&self, path: String) -> JoinHandle<Answer> {
        tokio::spawn(get(self.address, path))
    }

    /// The value of a metric, as it stands in the program's answer; 0 where it is not there yet.
    pub(crate) async fn metric(&self, name: &str) -> u64 {
        let metrics = self.get("/metrics").await.body;
        let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(0, |value| value.parse().unwrap())
    }

    /// Waits until so many reads wait.
    pub(crate) async fn until_waiting(&self, count: u64) {
        let reached = async {
            while self.metric("score_api_waiters").await != count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(DEADLINE, reached)
            .await
            .unwrap_or_else(|_| panic!("there were never {count} waiters"));
    }

    /// Open files, and KiB of memory.
    pub(crate) fn footprint(&self) -> (usize, u64) {
        let proc = format!("/proc/{}", self.child.id().unwrap());
        let status = std::fs::read_to_string(format!("{proc}/status")).unwrap();
        let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let memory = memory.trim().trim_end_matches(" kB").parse().unwrap();
        (std::fs::read_dir(format!("{proc}/fd")).unwrap().count(), memory)
    }

    pub(crate) fn signal(&self) {
        let pid = self.child.id().unwrap().try_into().unwrap();
        rustix::process::kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
    }

    /// The lines of one that has ended.
    pub(crate) async fn log(self) -> Vec<serde_json::Value> {
        self.log.await.unwrap()
    }

    pub(crate) async fn ended(&mut self) -> std::process::ExitStatus {
        tokio::time::timeout(DEADLINE, self.child.wait()).await.expect("it ends").unwrap()
    }
}

pub(crate) async fn get(address: SocketAddr, path: String) -> Answer {
    request(address, "GET", &path, &[]).await
}

async fn request(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
    let mut request = format!("{method} {path} HTTP/1.1\r\nHost: score.localhost\r\nConnection: close\r\n");
    request.extend(headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")));
    request += "\r\n";
    let exchange = async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut stream, request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let answer = tokio::time::timeout(DEADLINE, exchange).await.expect("an answer in time");
    check(method, path, &answer);
    Answer::parse(&format!("{method} {path}"), &answer)
}

/// Every response is one that the document names.
fn check(method: &str, path: &str, answer: &str) {
    static DOCUMENT: LazyLock<Document> = LazyLock::new(|| {
        Document::new(web::documentation::json(include_str!("../../openapi.yaml")).as_bytes())
    });
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    let (status, headers) = head.split_once("\r\n").unwrap();
    let header = |line: &str| {
        let (name, value) = line.split_once(": ").unwrap();
        (name.parse::<HeaderName>().unwrap(), value.parse::<HeaderValue>().unwrap())
    };
    let headers: HeaderMap = headers.split("\r\n").map(header).collect();
    let status: StatusCode = status.split(' ').nth(1).unwrap().parse().unwrap();
    let method: Method = method.parse().unwrap();
    DOCUMENT.check(&method, path.split('?').next().unwrap(), status, &headers, body.as_bytes());
}

/// What came back, byte for byte but for the date.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
    shown: String,
}

impl Answer {
    fn parse(request: &str, answer: &str) -> Self {
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
        let mut lines: Vec<_> = head.split("\r\n").collect();
        let all = lines.len();
        let id = lines.iter().find_map(|line| line.strip_prefix("x-request-id: ")).unwrap_or_default();
        lines.retain(|line| !line.starts_with("date: ") && !line.starts_with("x-request-id: "));
        assert_eq!(lines.len(), all - 2, "one date, one id");
        let status = lines[0].split(' ').nth(1).unwrap().parse().unwrap();
        lines.remove(0);
        lines.sort_unstable();
        let (mut lines, mut body_shown) = (lines.join("\n"), body.replace(id, "[request id]"));
        // Times, and with them the length, differ each time.
        if let Ok(json) = serde_json::from_str::<serde_json::Value>(body) {
            for name in ["waited_ms", "last_applied_ms_ago"] {
                if let Some(time) = json[name].as_u64() {
                    body_shown =
                        body_shown.replace(&format!("\"{name}\":{time}"), &format!("\"{name}\":[ms]"));
                    lines = lines.replace(&format!("content-length: {}", body.len()), "content-length: [n]");
                }
            }
        }
        let shown = format!("> {request}\n{status}\n{lines}\n\n{body_shown}");
        Self { status, body: body.to_owned(), shown }
    }
}

impl Answer {
    /// A header's value.
    pub(crate) fn header(&self, name: &str) -> &str {
        let line = self.shown.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.unwrap_or_else(|| panic!("no {name}"))
    }
}

impl std::fmt::Display for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.shown)
    }
}

/// A TCP wire to the database that can be cut and mended.
pub(crate) struct Wire {
    pub(crate) address: SocketAddr,
    to: String,
    task: JoinHandle<()>,
}

impl Wire {
    pub(crate) async fn to(database: &Database) -> Self {
        let to = format!("{}:{}", database.options.get_host(), database.options.get_port());
        // None of those that the system gives to outgoing connections: it is to be had again after a cut.
        let address = SocketAddr::from(([127, 0, 0, 1], devstack::ports::free()));
        let listener = TcpListener::bind(address).await.unwrap();
        let task = tokio::spawn(forward(listener, to.clone()));
        Self { address, to, task }
    }

    /// Ends every connection; new ones are refused.
    pub(crate) async fn cut(&mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }

    pub(crate) async fn mend(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        self.task = tokio::spawn(forward(listener, self.to.clone()));
    }
}

async fn forward(listener: TcpListener, to: String) {
    let mut connections = JoinSet::new();
    while let Ok((mut near, _)) = listener.accept().await {
        let to = to.clone();
        connections.spawn(async move {
            if let Ok(mut far) = TcpStream::connect(to).await {
                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
            }
        });
    }
}
