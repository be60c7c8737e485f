//! Clients as bad as they come, against the real programs: well-behaved clients are served all the while, memory stays
//! bounded, every connection ends, and nothing that is sent is a 500.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a panic in a test is the report")]

use std::{fmt::Write, net::SocketAddr, time::Duration};

use devstack::{folder::Folder, ports, program::Program};
use sqlx::{Connection, PgConnection};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

/// How long anything may take on a busy machine.
const DEADLINE: Duration = Duration::from_mins(2);
/// Clients that connect and say nothing: far more than may.
const IDLE: usize = 10_000;
/// Of each other kind of bad client.
const EACH: usize = 20;
/// Of clients that ask for the largest response and read nothing of it.
const RELUCTANT: usize = 150;
/// What the well-behaved client asks for at least while the others are at it.
const REQUESTS: usize = 50;
/// The most memory that a program may ever have had, in KiB: what a debug build begins with, 100 KiB for each
/// connection, and an unread response of up to 700 KiB for each client that reads nothing.
const MEMORY: u64 = 32 * 1024 + 1024 * 100 + (RELUCTANT + EACH) as u64 * 700;

/// A program under attack.
struct Victim {
    program: Program,
    address: SocketAddr,
    /// Somebody's, whom it knows.
    path: &'static str,
    /// Where it takes bodies, or would.
    post: &'static str,
    /// Where its largest answer is.
    large: &'static str,
    _folder: Folder,
}

impl Victim {
    async fn person() -> Self {
        let (folder, url) = (Folder::temporary().unwrap(), devstack::testing::database("hostile").await);
        let relay = Program::new(&folder, "outbox", "outbox-relay", ports::free()).unwrap();
        let migrate = ["migrate", "--source", "person"];
        relay.command(&migrate, &[("DATABASE_URL", &url)]).await.unwrap();
        let mut this = Self::start("person-api", folder, &url, &["migrate"]).await;
        (this.path, this.post, this.large) = ("/person/11111", "/person", "/person/22222");
        let body = r#"{"cpf": 11111, "name": "abc", "date_of_birth": "2019-06-15"}"#;
        let request = post("/person", "connection: close\r\n", body);
        assert_eq!(ask(this.address, &request).await, [201]);
        let mut conn = PgConnection::connect(&url).await.unwrap();
        for sql in [
            "INSERT INTO person.person (id, cpf, name, date_of_birth) VALUES (outbox.uuid7(), 22222, 'n', now())",
            "INSERT INTO person.income (id, person_id, type, value)
             SELECT outbox.uuid7(), id, repeat('é', 100), 1 FROM person.person, generate_series(1, 1000)
             WHERE cpf = 22222",
            "INSERT INTO person.asset (id, person_id, type, value)
             SELECT outbox.uuid7(), person_id, type, value FROM person.income",
        ] {
            sqlx::query(sql).execute(&mut conn).await.unwrap();
        }
        this
    }

    async fn score() -> Self {
        let (folder, url) = (Folder::temporary().unwrap(), devstack::testing::database("hostile").await);
        let projector = Program::new(&folder, "model", "score-projector", ports::free()).unwrap();
        projector.command(&["migrate"], &[("DATABASE_URL", &url)]).await.unwrap();
        let mut conn = PgConnection::connect(&url).await.unwrap();
        let person = "INSERT INTO score.person (id, cpf, created_at, version, total)
                      VALUES (gen_random_uuid(), 11111, now(), 1, 0)";
        sqlx::query(person).execute(&mut conn).await.unwrap();
        let mut this = Self::start("score-api", folder, &url, &[]).await;
        let entries = "INSERT INTO score.entry (id, person_id, type, value, score, created_at)
                       SELECT gen_random_uuid(), id, 'asset', 20, 1, now() FROM score.person, generate_series(1, 1000)";
        sqlx::query(entries).execute(&mut conn).await.unwrap();
        (this.path, this.post) = ("/11111/score", "/11111/score");
        this.large = "/11111/score/entries?limit=1000";
        this
    }

    async fn start(name: &str, folder: Folder, url: &str, migrate: &[&str]) -> Self {
        let port = ports::free();
        let mut program = Program::new(&folder, name, name, port)
            .unwrap()
            .env("DATABASE_URL", url)
            .env("LOG", "warn")
            // Shorter than by default, so that bad clients come and go while the test runs.
            .env("HEADER_TIMEOUT", "2s")
            .env("BODY_TIMEOUT", "2s")
            .env("ANSWER_TIMEOUT", "2s")
            .env("IDLE_TIMEOUT", "2s");
        if name == "score-api" {
            // Each of them is one more connection, and fewer would wait until one ends.
            program = program.env("MAX_WAITERS", "100");
        }
        if !migrate.is_empty() {
            program.command(migrate, &[("DATABASE_URL", url)]).await.unwrap();
        }
        program.start().await.unwrap();
        program.ready(DEADLINE).await.unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        Self { program, address, path: "", post: "", large: "", _folder: folder }
    }

    /// The most memory that it has had, in KiB.
    fn memory(&mut self) -> u64 {
        let pid = self.program.process().unwrap().pid();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        peak.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// A request that behaves well.
    fn get(&self) -> String {
        get(self.path, "connection: close\r\n")
    }

    async fn metrics(&self) -> String {
        let metrics = read(self.address, &get("/metrics", "connection: close\r\n")).await;
        String::from_utf8(metrics).unwrap()
    }

    /// Waits until no connection is open but the one that asks.
    async fn until_all_are_gone(&self) {
        let gone = async {
            while !self.metrics().await.contains("\nhttp_connections 1\n") {
                sleep(Duration::from_millis(100)).await;
            }
        };
        timeout(DEADLINE, gone).await.expect("every connection ends");
    }

    /// No request was a 500.
    async fn has_no_defect(&self) {
        let metrics = self.metrics().await;
        assert!(metrics.contains("http_requests_total"), "{metrics}");
        let defect = metrics.lines().find(|line| line.contains("status=\"500\"") && !line.ends_with(" 0"));
        assert_eq!(defect, None);
    }
}

fn get(path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n")
}

fn post(path: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n{headers}\r\n{body}"
    )
}

/// Everything that comes back until the connection ends.
async fn read(address: SocketAddr, request: &str) -> Vec<u8> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        let mut answer = Vec::new();
        let (mut reads, mut writes) = stream.split();
        // It may be answered before it has sent everything.
        let (_, read) = tokio::join!(writes.write_all(request.as_bytes()), reads.read_to_end(&mut answer));
        read.map(|_| answer)
    };
    timeout(DEADLINE, exchange).await.expect("an answer or an end in time").unwrap_or_default()
}

/// The statuses of all answers to what is sent on one connection.
async fn ask(address: SocketAddr, request: &str) -> Vec<u16> {
    let answer = read(address, request).await;
    let text = String::from_utf8_lossy(&answer);
    text.split("HTTP/1.").skip(1).map(|answer| answer[2..5].parse().unwrap()).collect()
}

/// What is odd about each, and the request; all of them end their connection.
fn oddities(path: &str, post_path: &str) -> Vec<(String, String)> {
    let close = "connection: close\r\n";
    let mut all: Vec<(String, String)> = Vec::new();
    let mut add = |name: &str, request: String| all.push((name.to_owned(), request));
    for odd in [
        "//",
        "/.",
        "/..",
        "/../..",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/%00",
        "/%",
        "/%zz",
        "/%ff%fe",
        "/;x=1",
        "/*",
        "*",
        "/person/%31%31%31%31%31",
        "/person/11111/",
        "/person//income",
        "/11111//score",
        "/person/11111%00",
        "/person/-1",
        "/person/0",
        "/person/99999999999",
        "/person/100000000000",
        "/person/18446744073709551616",
        "/99999999999/score",
        "/100000000000/score",
        "/-1/score",
        "/1e3/score",
        "/%D9%A1/score",
        "/person/11111/income?limit=0",
        "/person/11111/income?limit=1001",
        "/person/11111/income?limit=2147483648",
        "/person/11111/income?limit=-9223372036854775808",
        "/person/11111/income?limit=1&limit=1",
        "/person/11111/income/00000000-0000-0000-0000-000000000000",
        "/11111/score?after=01980000-0000-7000-8000-000000000000.9223372036854775807",
        "/11111/score?after=01980000-0000-7000-8000-000000000000.9223372036854775808",
        "/11111/score?after=01980000-0000-7000-8000-000000000000.-1",
        "/11111/score?after=01980000-0000-7000-8000-000000000000.1&wait=18446744073709551615ms",
        "http://elsewhere/person/11111",
    ] {
        add(odd, get(odd, close));
    }
    add("a path of 8 KiB", get(&format!("/{}", "a".repeat(8192)), close));
    add("a path of 60 KiB", get(&format!("/{}", "a".repeat(61_440)), close));
    add("a header of 1 MiB", get(path, &format!("x: {}\r\n{close}", "x".repeat(1 << 20))));
    add("a thousand headers", get(path, &format!("{}{close}", "x: y\r\n".repeat(1000))));
    add("a header that is no UTF-8 name", get(path, &format!("\u{e9}: y\r\n{close}")));
    add("two hosts", get(path, &format!("host: elsewhere\r\n{close}")));
    add("no host", format!("GET {path} HTTP/1.1\r\n{close}\r\n"));
    add("HTTP/1.0", format!("GET {path} HTTP/1.0\r\n\r\n"));
    add("HTTP/2.0", format!("GET {path} HTTP/2.0\r\n\r\n"));
    add("HTTP/2 at once", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned());
    add("no HTTP", "\u{16}\u{3}\u{1}\r\n\r\n".to_owned());
    add("two lengths", post(post_path, &format!("content-length: 3\r\n{close}"), "{}"));
    add(
        "a length and chunks",
        post(post_path, &format!("transfer-encoding: chunked\r\n{close}"), "0\r\n\r\n"),
    );
    let chunked = |body: &str| {
        format!(
            "POST {post_path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{close}\
             transfer-encoding: chunked\r\n\r\n{body}"
        )
    };
    add("a chunk of no size", chunked("x\r\n{}\r\n0\r\n\r\n"));
    add("an enormous chunk", chunked("ffffffffffffffff\r\n{}\r\n0\r\n\r\n"));
    add("a chunk beyond all numbers", chunked("fffffffffffffffff1\r\n{}\r\n0\r\n\r\n"));
    add(
        "an endless extension of a chunk",
        chunked(&format!("2;{}\r\n{{}}\r\n0\r\n\r\n", "x".repeat(100_000))),
    );
    add("endless trailers", chunked(&format!("2\r\n{{}}\r\n0\r\n{}\r\n", "x: y\r\n".repeat(20_000))));
    add("a negative length", post(post_path, close, "{}").replace("length: 2", "length: -1"));
    add(
        "a length beyond all numbers",
        post(post_path, close, "{}").replace("length: 2", "length: 99999999999999999999"),
    );
    add("a body that is announced and too large", post(post_path, close, &" ".repeat(1 << 20)));
    add(
        "a body that was not asked for",
        format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n{close}content-length: 2\r\n\r\n{{}}"),
    );
    let keys = "idempotency-key: a\r\nidempotency-key: b\r\n";
    add(
        "two keys",
        post(
            post_path,
            &format!("{keys}{close}"),
            r#"{"cpf": 1, "name": "a", "date_of_birth": "2019-06-15"}"#,
        ),
    );
    let matches = "if-match: \"a\"\r\nif-match: \"b\"\r\n";
    add("two states", format!("DELETE {path} HTTP/1.1\r\nhost: localhost\r\n{matches}{close}\r\n"));
    add("two conditions", get(path, &format!("if-none-match: \"a\"\r\nif-none-match: *\r\n{close}")));
    add("an upgrade", get(path, "connection: upgrade\r\nupgrade: websocket\r\nconnection: close\r\n"));
    add("CONNECT", format!("CONNECT elsewhere:443 HTTP/1.1\r\nhost: localhost\r\n{close}\r\n"));
    add(
        "a method of 4 KiB",
        format!("{} {path} HTTP/1.1\r\nhost: localhost\r\n{close}\r\n", "M".repeat(4096)),
    );
    add("fifty at once", get(path, "").repeat(49) + &get(path, close));
    all
}

async fn odd_requests(victim: &Victim) -> String {
    let mut shown = String::new();
    for (name, request) in oddities(victim.path, victim.post) {
        let mut statuses = ask(victim.address, &request).await;
        assert!(statuses.iter().all(|status| *status != 500), "{name}: {statuses:?}");
        let count = statuses.len();
        statuses.dedup();
        let times = if count > 1 { format!(" x {count}") } else { String::new() };
        writeln!(shown, "{name}: {statuses:?}{times}").unwrap();
    }
    victim.has_no_defect().await;
    shown
}

#[tokio::test]
async fn odd_requests_are_answered_for_what_they_are() {
    let (person, score) = tokio::join!(Victim::person(), Victim::score());
    insta::assert_snapshot!("odd_requests_person", odd_requests(&person).await);
    insta::assert_snapshot!("odd_requests_score", odd_requests(&score).await);
}

/// Again and again until it is told to end, whatever comes of each time.
fn forever<F: Future<Output = std::io::Result<()>> + Send>(
    crowd: &mut JoinSet<Vec<TcpStream>>,
    stop: &CancellationToken,
    attack: impl Fn() -> F + Send + 'static,
) {
    let stop = stop.clone();
    crowd.spawn(async move {
        while !stop.is_cancelled() {
            let _ = stop.run_until_cancelled(attack()).await;
            let _ = stop.run_until_cancelled(sleep(Duration::from_millis(20))).await;
        }
        Vec::new()
    });
}

/// All kinds at the same time, until `stop`. `all` says that all of them have been there. What is still open is
/// returned.
fn besiege(victim: &Victim, stop: &CancellationToken, all: CancellationToken) -> JoinSet<Vec<TcpStream>> {
    let (address, path, post_path) = (victim.address, victim.path, victim.post);
    let mut crowd = JoinSet::new();
    for _ in 0..EACH {
        // A byte of a head at a time.
        forever(&mut crowd, stop, move || async move {
            let mut stream = TcpStream::connect(address).await?;
            for byte in get(path, &"x: y\r\n".repeat(100)).bytes() {
                stream.write_all(&[byte]).await?;
                sleep(Duration::from_millis(100)).await;
            }
            Ok(())
        });
        // Half a body.
        forever(&mut crowd, stop, move || async move {
            let mut stream = TcpStream::connect(address).await?;
            let whole = post(post_path, "", &" ".repeat(60_000));
            stream.write_all(&whole.as_bytes()[..whole.len() / 2]).await?;
            stream.read_to_end(&mut Vec::new()).await.map(drop)
        });
        // Chunks without end.
        forever(&mut crowd, stop, move || async move {
            let mut stream = TcpStream::connect(address).await?;
            let head = format!(
                "POST {post_path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
                 transfer-encoding: chunked\r\n\r\n"
            );
            stream.write_all(head.as_bytes()).await?;
            loop {
                stream.write_all(format!("1000\r\n{}\r\n", " ".repeat(0x1000)).as_bytes()).await?;
                sleep(Duration::from_millis(20)).await;
            }
        });
        // Sends one request, and keeps the connection.
        forever(&mut crowd, stop, move || async move {
            let mut stream = TcpStream::connect(address).await?;
            stream.write_all(get(path, "").as_bytes()).await?;
            stream.read_to_end(&mut Vec::new()).await.map(drop)
        });
        // Asks for a large page over and over, and reads nothing.
        forever(&mut crowd, stop, move || async move {
            let mut stream = TcpStream::connect(address).await?;
            stream.write_all(get("/docs", "").repeat(20).as_bytes()).await?;
            sleep(Duration::from_secs(5)).await;
            Ok(())
        });
    }
    for _ in 0..RELUCTANT {
        let large = victim.large;
        // Asks for the largest response over and over, and reads nothing.
        forever(&mut crowd, stop, move || async move {
            let socket = TcpSocket::new_v4()?;
            socket.set_recv_buffer_size(4096)?;
            let mut stream = socket.connect(address).await?;
            stream.write_all(get(large, "").repeat(8).as_bytes()).await?;
            sleep(Duration::from_secs(15)).await;
            Ok(())
        });
    }
    let stop = stop.clone();
    crowd.spawn(async move {
        // Connects as fast as it can, sends nothing, and never closes.
        let mut idle = Vec::with_capacity(IDLE);
        while idle.len() < IDLE {
            match stop.run_until_cancelled(TcpStream::connect(address)).await {
                Some(stream) => idle.extend(stream.ok()),
                None => return Vec::new(),
            }
        }
        all.cancel();
        idle
    });
    crowd
}

/// A client that behaves well, and waits as long as it takes: every request gets its response. Goes on until `all` of
/// the others have been there.
fn behaves(victim: &Victim, all: CancellationToken) -> JoinHandle<Duration> {
    let (address, request) = (victim.address, victim.get());
    tokio::spawn(async move {
        let mut longest = Duration::ZERO;
        let mut number = 0;
        while number < REQUESTS || !all.is_cancelled() {
            number += 1;
            let asked = tokio::time::Instant::now();
            loop {
                let answer = read(address, &request).await;
                let answer = String::from_utf8_lossy(&answer);
                if answer.starts_with("HTTP/1.1 200 ") {
                    break;
                }
                // The database shares the machine with everybody here, and may take longer than it has; and so may
                // this client, before it has said what it wants.
                let busy = answer.contains("/problems/unavailable") || answer.is_empty();
                assert!(busy, "request {number}: {answer}");
                sleep(Duration::from_secs(1)).await;
            }
            longest = longest.max(asked.elapsed());
            sleep(Duration::from_millis(10)).await;
        }
        longest
    })
}

async fn siege(mut victim: Victim) {
    let before = victim.memory();
    let (stop, all) = (CancellationToken::new(), CancellationToken::new());
    let crowd = besiege(&victim, &stop, all.clone());
    let longest = behaves(&victim, all).await.expect("every request of the well-behaved is answered");
    for path in ["/live", "/ready", "/metrics"] {
        assert_eq!(ask(victim.address, &get(path, "connection: close\r\n")).await, [200], "{path}");
    }
    stop.cancel();
    // Those who never close.
    let idle = crowd.join_all().await;
    victim.until_all_are_gone().await;
    drop(idle);
    victim.has_no_defect().await;
    let after = victim.memory();
    eprintln!(
        "{}: {before} KiB before, at most {after}; the longest answer took {longest:?}",
        victim.program.name()
    );
    assert!(after < MEMORY, "{after} KiB");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_programs_stand_a_siege() {
    allow_files();
    siege(Victim::person().await).await;
    siege(Victim::score().await).await;
}

/// Each connection is a file on this side too.
fn allow_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
}
