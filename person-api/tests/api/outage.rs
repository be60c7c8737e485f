//! Bad days: the database is away, or does not answer.

use std::time::Duration;

use outbox::Waker;
use sqlx::postgres::PgListener;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::support::{
    App, Database, Program, Proxy, Redactions, answer, exchange, post, post_request, until,
};

/// How long a test waits for what should come at once.
const LIMIT: Duration = devstack::testing::DEADLINE;
pub(crate) const PERSON: &str = r#"{"cpf": 11111, "name": "abc", "date_of_birth": "2019-06-15"}"#;
pub(crate) const DEBT: &str = r#"{"value": 1}"#;

/// A lock on the person's row, as a slow transaction of somebody else holds it.
pub(crate) async fn lock(database: &Database) -> sqlx::Transaction<'static, sqlx::Postgres> {
    let mut holder = database.admin.begin().await.unwrap();
    sqlx::query("SELECT FROM person.person FOR UPDATE").execute(&mut *holder).await.unwrap();
    holder
}

fn status(answer: &str) -> &str {
    answer.lines().next().unwrap()
}

#[tokio::test]
async fn without_the_database_it_says_so_and_recovers_by_itself() {
    let database = Database::new().await;
    let mut proxy = Proxy::new(database.server()).await;
    let program = Program::start(&database.url(Some(proxy.port))).await;
    let ready = async || program.get("/ready").await.contains("\"ready\":true");
    until("it is ready", &ready).await;
    assert_eq!(status(&program.post("/person", PERSON).await), "HTTP/1.1 201 Created");

    proxy.cut().await;
    // A connection that was used a moment ago is not asked before whether it is still there: what it is used
    // for then may have reached the server.
    let mut answer = String::new();
    until("what it does not send has a clear outcome", async || {
        answer = program.post("/person/11111/debt", DEBT).await;
        !answer.contains("/problems/outcome-unknown")
    })
    .await;
    let mut shown = answer + "\n";
    shown += &program.get("/person/11111").await;
    insta::assert_snapshot!(shown);
    until("it is not ready", async || !ready().await).await;
    assert!(program.get("/ready").await.contains("the database does not answer"));
    assert_eq!(status(&program.get("/live").await), "HTTP/1.1 200 OK");
    assert_eq!(database.rows().await.lines().count(), 2, "nothing was written in between");

    proxy.resume().await;
    until("it is ready again", &ready).await;
    assert_eq!(status(&program.post("/person/11111/debt", DEBT).await), "HTTP/1.1 201 Created");
}

#[tokio::test]
async fn a_connection_lost_in_the_middle_leaves_the_outcome_open() {
    let database = Database::new().await;
    let mut proxy = Proxy::new(database.server()).await;
    let program = Program::start(&database.url(Some(proxy.port))).await;
    until("it is ready", async || program.get("/ready").await.contains("\"ready\":true")).await;
    program.post("/person", PERSON).await;
    let holder = lock(&database).await;
    let stream = program.send(&post_request("/person/11111/debt", DEBT)).await;
    database.until_blocked(1).await;
    proxy.cut().await;
    insta::assert_snapshot!(answer(stream).await);
    drop(holder);
}

#[tokio::test]
async fn a_statement_that_takes_too_long_is_given_up() {
    let database = Database::new().await;
    let app = App::new(&database.api(Duration::from_secs(2), Waker::new()));
    app.create("/person", PERSON).await;
    let before = database.rows().await;
    let holder = lock(&database).await;
    insta::assert_snapshot!(
        exchange(&app, "somebody holds the person", post("/person/11111/debt", DEBT)).await
    );
    holder.rollback().await.unwrap();
    assert_eq!(database.rows().await, before, "something was written");
}

#[tokio::test]
async fn a_client_that_hangs_up_does_not_cut_its_write_in_half() {
    let database = Database::new().await;
    let (waker, stop) = (Waker::new(), CancellationToken::new());
    tokio::spawn(waker.clone().run(database.admin.clone(), stop.clone()));
    let api = database.api(Duration::from_secs(30), waker);
    let app = App::new(&api);
    let mut notices = PgListener::connect_with(&database.admin).await.unwrap();
    notices.listen(outbox::CHANNEL).await.unwrap();
    app.create("/person", PERSON).await;
    timeout(LIMIT, notices.recv()).await.expect("the relay is woken").unwrap();

    // What the server does with the handler of a connection or stream that is gone.
    let holder = lock(&database).await;
    let handler = tokio::spawn(async move { app.call(post("/person/11111/debt", DEBT)).await.status() });
    database.until_blocked(1).await;
    handler.abort();
    assert!(handler.await.unwrap_err().is_cancelled());
    let early = timeout(Duration::from_millis(100), api.finish()).await;
    assert!(early.is_err(), "the end waits for writes without a client");
    holder.rollback().await.unwrap();

    timeout(LIMIT, api.finish()).await.expect("the write ends");
    timeout(LIMIT, notices.recv()).await.expect("the relay is woken for it too").unwrap();
    let events: i64 = sqlx::query_scalar("SELECT count(*) FROM outbox.event WHERE type = 'debt.new'")
        .fetch_one(&database.admin)
        .await
        .unwrap();
    assert_eq!(events, 1);
    stop.cancel();
}

#[tokio::test]
async fn sigterm_lets_what_is_under_way_end() {
    let database = Database::new().await;
    let program = Program::start(&database.url(None)).await;
    program.post("/person", PERSON).await;
    let holder = lock(&database).await;
    let stream = program.send(&post_request("/person/11111/debt", DEBT)).await;
    database.until_blocked(1).await;
    let income = post_request("/person/11111/income", r#"{"type": "t", "value": 1}"#);
    let given_up = program.send(&income).await;
    database.until_blocked(2).await;
    drop(given_up);

    program.terminate();
    until("nobody listens any more", async || tokio::net::TcpStream::connect(program.address).await.is_err())
        .await;
    holder.rollback().await.unwrap();
    insta::assert_snapshot!(Redactions::default().apply(&answer(stream).await));
    let (code, log) = program.ended().await;
    assert_eq!(code, Some(0), "{log}");
    let items: i64 = sqlx::query_scalar("SELECT count(*) FROM outbox.event WHERE version > 1")
        .fetch_one(&database.admin)
        .await
        .unwrap();
    assert_eq!(items, 2, "the one whose client hung up was finished too");
    assert!(!log.contains("11111") && !log.contains("abc"), "nothing personal in the log: {log}");
}

#[tokio::test]
async fn a_half_sent_request_does_not_hold_the_end_up() {
    let database = Database::new().await;
    let program = Program::start(&database.url(None)).await;
    let half = program.send("POST /person HTTP/1.1\r\nhost: localhost\r\ncontent-le").await;
    // Connections are taken in their order, so the half one is served by now.
    program.get("/live").await;
    program.terminate();
    let (code, log) = program.ended().await;
    assert_eq!(code, Some(0), "{log}");
    drop(half);
}
