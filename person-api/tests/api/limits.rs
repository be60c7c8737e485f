//! What clients may take, of time, connections and requests, and what becomes of those that take more.

use std::time::Duration;

use devstack::testing::DEADLINE;
use outbox::Waker;
use person_api::{
    api::Api,
    store::{Connections, Store},
};
use poem::http::Method;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};
use web::front::ConcurrencyLimit;

use crate::{
    outage::{DEBT, PERSON, lock},
    support::{App, Database, Program, answer, exchange, plain, post, post_request, until},
};

/// A request without a body, on a connection that stays open.
fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n")
}

#[tokio::test]
async fn a_client_that_is_slow_is_cut_off() {
    let database = Database::new().await;
    let settings = ["--header-timeout", "500ms", "--body-timeout", "500ms", "--idle-timeout", "1h"];
    let program = Program::start_with(&database.url(None), &settings).await;
    let mut shown = String::new();
    let head = "POST /person HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n";
    for (name, request) in [
        ("nothing", String::new()),
        ("half a head", head.to_owned()),
        ("half a body", format!("{head}content-length: 100\r\n\r\n{{\"cpf\"")),
        ("half a body in chunks", format!("{head}transfer-encoding: chunked\r\n\r\n5\r\n{{\"cpf\r\n")),
    ] {
        shown += &format!("## {name}\n{}\n", answer(program.send(&request).await).await);
    }
    // A client that drips is no better than one that stops.
    let mut slow = program.send("GET /li").await;
    let cut_off = async {
        while slow.write_all(b"v").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, cut_off).await.expect("it is cut off");
    // Idle after a response; and with half a request behind it.
    let settings = ["--header-timeout", "1h", "--idle-timeout", "500ms"];
    let program = Program::start_with(&database.url(None), &settings).await;
    for (name, more) in [("nothing more", ""), ("half a request more", "GET /li")] {
        let kept = answer(program.send(&(get("/live") + more)).await).await;
        shown += &format!("## {name}\n{kept}\n");
    }
    insta::assert_snapshot!(shown);
}

/// A client with a small buffer: what it does not read stays with the program.
async fn reluctant(program: &Program, request: &str) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(program.address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

async fn cut(program: &Program) -> bool {
    program.get("/metrics").await.contains("http_connections_cut_total{reason=\"slow\"}")
}

#[tokio::test]
async fn a_client_that_reads_drop_by_drop_is_cut_off() {
    let database = Database::new().await;
    let program = Program::start_with(&database.url(None), &["--answer-timeout", "300ms"]).await;
    let mut slow = reluctant(&program, &get("/docs").repeat(20)).await;
    let drops = async {
        while slow.read(&mut [0; 512]).await.is_ok_and(|read| read > 0) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        () = drops => {}
        () = until("it is cut off", async || cut(&program).await) => {}
    }
    assert!(cut(&program).await);
}

/// The limit is on reading nothing, and not on the whole response.
#[tokio::test]
async fn a_client_that_reads_slowly_gets_all_of_it() {
    let database = Database::new().await;
    let program = Program::start_with(&database.url(None), &["--answer-timeout", "3s"]).await;
    let page = program.get("/docs").await.len();
    let mut slow = reluctant(&program, &get("/docs")).await;
    let (mut taken, began) = (0, std::time::Instant::now());
    while taken < page {
        // As fast as to be done in twice the time, most of which is waited for more.
        let due = Duration::from_secs(6) * u32::try_from(taken * 1000 / page).unwrap() / 1000;
        tokio::time::sleep(due.saturating_sub(began.elapsed())).await;
        let read = slow.read(&mut vec![0; 16 * 1024]).await.unwrap();
        assert!(read > 0, "cut off after {taken} of {page} bytes");
        taken += read;
    }
}

/// hyper refuses what is no HTTP; a wrong `Host` is a problem.
#[tokio::test]
async fn what_is_no_request_is_refused() {
    let database = Database::new().await;
    let program = Program::start(&database.url(None)).await;
    let mut shown = String::new();
    let close = "connection: close\r\n\r\n";
    for (name, request) in [
        ("a quotation mark", format!("GET /person/1?after=\"x\" HTTP/1.1\r\nhost: localhost\r\n{close}")),
        ("no HTTP", "\u{16}\u{3}\u{1}\r\n\r\n".to_owned()),
        (
            "two lengths",
            format!(
                "POST /person HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\ncontent-length: 3\r\n{close}{{}}"
            ),
        ),
        ("no host", format!("GET /live HTTP/1.1\r\n{close}")),
        ("two hosts", format!("GET /live HTTP/1.1\r\nhost: a\r\nhost: b\r\n{close}")),
        ("no host's name", format!("GET /live HTTP/1.1\r\nhost: a b\r\n{close}")),
        ("a request, and none behind it", format!("{}nothing\r\n\r\n", get("/person/1"))),
    ] {
        shown += &format!("## {name}\n{}\n", answer(program.send(&request).await).await);
    }
    insta::assert_snapshot!(shown);
}

/// A connection on which a part of a body is still to come ends, and the response says so.
#[tokio::test]
async fn an_answer_before_the_body_says_that_the_connection_ends() {
    let database = Database::new().await;
    let program = Program::start(&database.url(None)).await;
    for (method, path, media_type) in [
        ("POST", "/person", "text/plain"),
        ("POST", "/nowhere", "application/json"),
        ("PUT", "/person", "application/json"),
        ("GET", "/live", "application/json"),
    ] {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {media_type}\r\ncontent-length: 2\r\n\r\n"
        );
        let mut stream = program.send(&head).await;
        let answer = answer_head(&mut stream).await;
        assert!(answer.contains("\r\nconnection: close\r\n"), "{method} {path}: {answer}");
    }
    // Of one that was read, there is a next request.
    let body = "POST /person HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n";
    let mut stream = program.send(body).await;
    stream.write_all(b"{}").await.unwrap();
    let answer = answer_head(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 422 ") && !answer.contains("connection:"), "{answer}");
}

/// The head of the next answer.
async fn answer_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

#[tokio::test]
async fn the_program_has_as_many_requests_in_flight_as_it_is_told() {
    let database = Database::new().await;
    let program = Program::start_with(&database.url(None), &["--max-in-flight", "1"]).await;
    program.post("/person", PERSON).await;
    let holder = lock(&database).await;
    let working = program.send(&post_request("/person/11111/debt", DEBT)).await;
    database.until_blocked(1).await;
    let refused = program.get("/person/11111").await;
    assert!(refused.starts_with("HTTP/1.1 503 ") && refused.contains("\nretry-after: 1\n"), "{refused}");
    assert!(refused.contains("/problems/overloaded"), "{refused}");
    // Health needs no turn.
    for path in ["/live", "/metrics"] {
        assert!(program.get(path).await.starts_with("HTTP/1.1 200 "), "{path}");
    }
    holder.rollback().await.unwrap();
    assert!(answer(working).await.starts_with("HTTP/1.1 201 "));
}

#[tokio::test]
async fn what_is_too_large_is_refused_and_the_answer_arrives() {
    let database = Database::new().await;
    let program = Program::start(&database.url(None)).await;
    let mut shown = String::new();
    let padding = "x".repeat(16 * 1024);
    let head = format!("GET /live HTTP/1.1\r\nhost: localhost\r\nx-padding: {padding}\r\n\r\n");
    shown += &format!("## a head\n{}\n", answer(program.send(&head).await).await);
    // Sent whole before anything is read: a connection that is closed too early would take the answer away.
    let body = post_request("/person", &" ".repeat(200_000));
    shown += &format!("## a body\n{}\n", answer(program.send(&body).await).await);
    insta::assert_snapshot!(shown);
}

#[tokio::test]
async fn more_requests_than_the_database_can_take_are_told_to_come_again() {
    let database = Database::new().await;
    let store = Store::new(Connections::new(database.url(None).parse().unwrap(), 4))
        .limited_by(ConcurrencyLimit::new(2));
    let app = App::new(&Api::new(store, Waker::new()));
    app.create("/person", PERSON).await;
    let holder = lock(&database).await;
    let working = async || app.create("/person/11111/debt", DEBT).await;
    let mut shown = String::new();
    let refused = async {
        database.until_blocked(2).await;
        shown += &exchange(&app, "a read", plain(Method::GET, "/person/11111")).await;
        shown += &exchange(&app, "a write", post("/person/11111/debt", DEBT)).await;
        // What is refused for itself needs no database.
        assert_eq!(app.call(post("/person/11111/debt", "{}")).await.status().as_u16(), 422);
        assert_eq!(app.call(plain(Method::GET, "/live")).await.status().as_u16(), 200);
        holder.rollback().await.unwrap();
    };
    tokio::join!(working(), working(), refused);
    insta::assert_snapshot!(shown);
    assert_eq!(app.call(plain(Method::GET, "/person/11111")).await.status().as_u16(), 200);
}
