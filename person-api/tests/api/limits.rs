//! What clients may take, of time and of places, and what becomes of those who take more.

use std::time::Duration;

use outbox::Waker;
use person_api::{api::Api, store::Store};
use poem::http::Method;
use service::{config::database::pool, front::Gate};
use tokio::io::AsyncWriteExt;

use crate::{
    outage::{DEBT, PERSON, lock},
    support::{App, Database, Program, answer, exchange, plain, post, post_request},
};

/// A request without a body, on a connection that stays open.
fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: person\r\n\r\n")
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
    let cut_off = async {
        while slow.write_all(b"v").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), cut_off).await.expect("who drips is cut off");
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
async fn more_requests_than_the_database_can_take_are_told_to_come_again() {
    let database = Database::new().await;
    let store = Store::new(pool(database.url(None).parse().unwrap(), 4)).behind(Gate::new(2));
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
