//! A read model with known rows, the program that serves it, and a wire between the two to cut.

use std::{net::SocketAddr, process::Stdio, time::Duration};

use sqlx::{AssertSqlSafe, Connection, PgConnection, postgres::PgConnectOptions};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    task::{JoinHandle, JoinSet},
};

pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// A database with the schema `score`, and a role that has what `score.grant_api` gives and no more.
pub(crate) struct Database {
    pub(crate) admin: PgConnection,
    pub(crate) role: String,
    pub(crate) options: PgConnectOptions,
}

impl Database {
    /// Without the schema.
    pub(crate) async fn empty() -> Self {
        let url = devstack::testing::database("score_api").await;
        let mut admin = PgConnection::connect(&url).await.unwrap();
        let options: PgConnectOptions = url.parse().unwrap();
        let role = options.get_database().unwrap().to_owned();
        sqlx::query(AssertSqlSafe(format!("CREATE ROLE {role} LOGIN PASSWORD 'test'")))
            .execute(&mut admin)
            .await
            .unwrap();
        Self { admin, role, options }
    }

    pub(crate) async fn migrated() -> Self {
        let mut this = Self::empty().await;
        score_api::schema().migrator.run(&mut this.admin).await.unwrap();
        sqlx::query("SELECT score.grant_api($1::regrole)")
            .bind(&this.role)
            .execute(&mut this.admin)
            .await
            .unwrap();
        this
    }

    /// For the role of the API.
    pub(crate) fn url(&self) -> String {
        self.url_through(&format!("{}:{}", self.options.get_host(), self.options.get_port()))
    }

    pub(crate) fn url_through(&self, address: &str) -> String {
        format!("postgres://{}:test@{address}/{}", self.role, self.options.get_database().unwrap())
    }

    /// A person as the projector would store it. `life` and `day` are digits of its id and its time.
    pub(crate) async fn person(&mut self, cpf: i64, life: u8, day: u8, version: i64, total: &str) {
        let sql = format!(
            "INSERT INTO score.person (id, cpf, created_at, version, total, updated_at)
             VALUES ('0198c0de-0000-7000-8000-0000000000{life:02}', {cpf}, '2026-01-{day:02}', {version},
                     {total}, '2026-02-01 12:00:00.123456+00')"
        );
        sqlx::query(AssertSqlSafe(sql)).execute(&mut self.admin).await.unwrap();
    }
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
    /// Keeps reading the log, so that the program never blocks on a full pipe.
    _log: JoinHandle<()>,
}

impl Program {
    /// Started, whether or not it is ready.
    pub(crate) async fn start(database_url: &str) -> Self {
        let mut child = command(&["run", "--listen", "127.0.0.1:0"])
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
        let log = tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Self { child, address, _log: log }
    }

    pub(crate) async fn ready(database_url: &str) -> Self {
        let program = Self::start(database_url).await;
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
        let mut request =
            format!("{method} {path} HTTP/1.1\r\nHost: score.localhost\r\nConnection: close\r\n");
        request.extend(headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")));
        request += "\r\n";
        let exchange = async {
            let mut stream = TcpStream::connect(self.address).await.unwrap();
            tokio::io::AsyncWriteExt::write_all(&mut stream, request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer
        };
        let answer = tokio::time::timeout(DEADLINE, exchange).await.expect("an answer in time");
        Answer::parse(&format!("{method} {path}"), &answer)
    }

    pub(crate) async fn signal(&self) {
        let pid = self.child.id().unwrap().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().await.unwrap().success());
    }

    pub(crate) async fn ended(&mut self) -> std::process::ExitStatus {
        tokio::time::timeout(DEADLINE, self.child.wait()).await.expect("it ends").unwrap()
    }
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
        let dates = lines.len();
        lines.retain(|line| !line.starts_with("date: "));
        assert_eq!(lines.len(), dates - 1, "one date");
        let status = lines[0].split(' ').nth(1).unwrap().parse().unwrap();
        lines.remove(0);
        lines.sort_unstable();
        let shown = format!("> {request}\n{status}\n{}\n\n{body}", lines.join("\n"));
        Self { status, body: body.to_owned(), shown }
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
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
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
