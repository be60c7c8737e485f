//! The real binary.

use std::{
    net::SocketAddr,
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    process::{Child, Command},
    time::timeout,
};

/// How long anything of the program may take before the test fails.
const LIMIT: Duration = devstack::testing::DEADLINE;

/// A running `person-api run`.
pub(crate) struct Program {
    child: Child,
    pub(crate) address: SocketAddr,
    log: tokio::task::JoinHandle<()>,
    lines: Arc<Mutex<String>>,
}

/// `person-api` with these arguments and a clean environment.
pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_person-api"));
    command.args(args).env_clear().env("LOG_FORMAT", "json").kill_on_drop(true);
    command
}

/// Runs it to its end: exit code, standard output, standard error without log lines.
pub(crate) async fn finished(command: &mut Command) -> (Option<i32>, String, String) {
    let output = timeout(LIMIT, command.output()).await.expect("the program ends").unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let error =
        text(output.stderr).lines().filter(|line| !line.starts_with('{')).collect::<Vec<_>>().join("\n");
    (output.status.code(), text(output.stdout), error)
}

impl Program {
    /// Starts it on a free port, which its log tells.
    pub(crate) async fn start(database_url: &str) -> Self {
        Self::start_with(database_url, &[]).await
    }

    /// With more settings.
    pub(crate) async fn start_with(database_url: &str, settings: &[&str]) -> Self {
        Self::start_command(command(&[]).env("DATABASE_URL", database_url), settings).await
    }

    /// With the URL of the database in a file.
    pub(crate) async fn start_at(url_file: &str, settings: &[&str]) -> Self {
        Self::start_command(command(&[]).env("DATABASE_URL_FILE", url_file), settings).await
    }

    async fn start_command(command: &mut Command, settings: &[&str]) -> Self {
        let mut child = command
            .args(["run", "--listen", "127.0.0.1:0"])
            .args(settings)
            .env("DRAIN_TIMEOUT", "20s")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut log = String::new();
        let address = loop {
            let line = timeout(LIMIT, lines.next_line()).await.expect("the program starts").unwrap();
            let line = line.unwrap_or_else(|| panic!("the program ended: {log}"));
            log += &line;
            log.push('\n');
            if let Some((_, rest)) = line.split_once("socket://") {
                break rest.split('"').next().unwrap().parse().unwrap();
            }
        };
        let written = Arc::new(Mutex::new(log));
        let to = Arc::clone(&written);
        let log = tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                let mut log = to.lock().unwrap();
                *log += &line;
                log.push('\n');
            }
        });
        Self { child, address, log, lines: written }
    }

    /// What it has logged so far.
    pub(crate) fn logged(&self) -> String {
        self.lines.lock().unwrap().clone()
    }

    /// Opens a connection and sends the bytes as they are.
    pub(crate) async fn send(&self, request: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        stream
    }

    /// Status line, headers and body as they came over the socket.
    pub(crate) async fn get(&self, path: &str) -> String {
        let stream =
            self.send(&format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")).await;
        answer(stream).await
    }

    pub(crate) async fn post(&self, path: &str, body: &str) -> String {
        answer(self.send(&post_request(path, body)).await).await
    }

    /// Ends it as a crash does.
    pub(crate) async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    pub(crate) fn terminate(&self) {
        let pid = self.child.id().unwrap().to_string();
        assert!(std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    }

    /// The exit code and the whole log.
    pub(crate) async fn ended(mut self) -> (Option<i32>, String) {
        let status = timeout(LIMIT, self.child.wait()).await.expect("the program ends").unwrap();
        self.log.await.unwrap();
        let log = self.lines.lock().unwrap().clone();
        (status.code(), log)
    }
}

pub(crate) fn post_request(path: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Reads to the end.
async fn raw_answer(mut stream: TcpStream) -> String {
    let mut text = String::new();
    timeout(LIMIT, stream.read_to_string(&mut text)).await.expect("the program answers").unwrap();
    text
}

/// Reads to the end; the date and the request's id change, so they are left out.
pub(crate) async fn answer(stream: TcpStream) -> String {
    let text = raw_answer(stream).await;
    text.split_inclusive('\n')
        .filter(|line| !line.starts_with("date: ") && !line.starts_with("x-request-id: "))
        .collect::<String>()
        .replace('\r', "")
}
