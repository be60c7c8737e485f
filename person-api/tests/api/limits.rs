//! What clients may take, of time and of places, and what becomes of those who take more.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    outage::{DEBT, PERSON, lock},
    support::{Database, Program, Redactions, answer, post_request, until},
};

/// A request without a body, on a connection that stays open.
fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: person\r\n\r\n")
}

/// Reads until an answer has begun, and says its status; none when the connection ended without one.
async fn status(stream: &mut TcpStream) -> Option<u16> {
    let mut text = [0; 12];
    let read = async {
        stream.read_exact(&mut text).await.ok()?;
        std::str::from_utf8(&text).unwrap().strip_prefix("HTTP/1.1 ")?.parse().ok()
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), read).await.expect("an answer or an end")
}

#[tokio::test]
async fn a_client_that_is_slow_is_cut_off() {
    let database = Database::new().await;
    let settings = ["--header-timeout", "100ms", "--body-timeout", "100ms", "--idle-timeout", "100ms"];
    let program = Program::start_with(&database.url(None), &settings).await;
    let mut shown = String::new();
    let head = "POST /person HTTP/1.1\r\nhost: person\r\ncontent-type: application/json\r\n";
    for (name, request) in [
        ("nothing", String::new()),
        ("half a head", head.to_owned()),
        ("half a body", format!("{head}content-length: 100\r\n\r\n{{\"cpf\"")),
        ("half a body in chunks", format!("{head}transfer-encoding: chunked\r\n\r\n5\r\n{{\"cpf\r\n")),
    ] {
        shown += &format!("## {name}\n{}\n", answer(program.send(&request).await).await);
    }
    // One that has had its answer, and asks nothing more.
    let kept = answer(program.send(&get("/live")).await).await;
    shown += &format!("## nothing more\n{kept}\n");
    // One who drips is no better than one who stops.
    let mut slow = program.send("GET /li").await;
    while slow.write_all(b"v").await.is_ok() {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    insta::assert_snapshot!(shown);
}

#[tokio::test]
async fn what_is_too_large_is_refused_and_the_answer_arrives() {
    let database = Database::new().await;
    let program = Program::start(&database.url(None)).await;
    let mut shown = String::new();
    let padding = "x".repeat(16 * 1024);
    let head = format!("GET /live HTTP/1.1\r\nhost: person\r\nx-padding: {padding}\r\n\r\n");
    shown += &format!("## a head\n{}\n", answer(program.send(&head).await).await);
    // Sent whole before anything is read: a connection that is closed too early would take the answer away.
    let body = post_request("/person", &" ".repeat(200_000));
    shown += &format!("## a body\n{}\n", answer(program.send(&body).await).await);
    insta::assert_snapshot!(shown);
}

#[tokio::test]
async fn at_the_bound_who_is_waited_for_makes_place_and_nobody_else() {
    let database = Database::new().await;
    let program =
        Program::start_with(&database.url(None), &["--max-connections", "2", "--header-timeout", "5m"]).await;
    program.post("/person", PERSON).await;
    let mut asked = program.send(&get("/live")).await;
    assert_eq!(status(&mut asked).await, Some(200));
    let mut half = program.send("GET /liv").await;

    let holder = lock(&database).await;
    let first = program.send(&post_request("/person/11111/debt", DEBT)).await;
    database.until_blocked(1).await;
    let mut rest = Vec::new();
    asked.read_to_end(&mut rest).await.expect("the one that was waited for longest has made place");
    half.write_all(b"e HTTP/1.1\r\nhost: person\r\n\r\n").await.unwrap();
    assert_eq!(status(&mut half).await, Some(200), "the other one is still there");
    let second = program.send(&post_request("/person/11111/debt", DEBT)).await;
    database.until_blocked(2).await;
    half.read_to_end(&mut rest).await.expect("now it has made place");

    // Nobody is waited for any more.
    insta::assert_snapshot!(program.get("/person/11111").await);
    for path in ["/live", "/ready", "/metrics"] {
        let answer = program.get(path).await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\n"), "{path}: {answer}");
        assert!(answer.contains("connection: close"), "{answer}");
    }
    holder.rollback().await.unwrap();
    for working in [first, second] {
        let answer = answer(working).await;
        assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    }
    until("there is room again", async || program.get("/person/11111").await.contains(" 200 OK")).await;
}

#[tokio::test]
async fn more_requests_than_the_database_can_take_are_told_to_come_again() {
    let database = Database::new().await;
    let program = Program::start_with(&database.url(None), &["--max-in-flight", "2"]).await;
    program.post("/person", PERSON).await;
    let holder = lock(&database).await;
    let mut working = Vec::new();
    for blocked in 1..=2 {
        working.push(program.send(&post_request("/person/11111/debt", DEBT)).await);
        database.until_blocked(blocked).await;
    }
    let mut shown = String::new();
    shown += &program.get("/person/11111").await;
    shown += &program.post("/person/11111/debt", DEBT).await;
    insta::assert_snapshot!(shown);
    for path in ["/live", "/ready", "/metrics", "/openapi.json"] {
        let answer = program.get(path).await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\n"), "{path}: {answer}");
    }
    // What is refused for itself needs no database.
    assert!(program.post("/person/11111/debt", "{}").await.starts_with("HTTP/1.1 422"));
    holder.rollback().await.unwrap();
    for working in working {
        let answer = Redactions::default().apply(&answer(working).await);
        assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    }
    assert!(program.get("/person/11111").await.starts_with("HTTP/1.1 200"));
    assert!(program.get("/metrics").await.contains("http_overloaded_total 2\n"));
}
