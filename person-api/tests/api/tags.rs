//! `If-Match` and `If-None-Match`: a tag has one spelling, and to look whether a state is held costs one row.

use std::time::Duration;

use outbox::Waker;
use poem::http::Method;
use tokio::time::timeout;

use crate::{
    outage::{DEBT, PERSON},
    support::{App, Database, plain, post, with},
};

/// What must not be waited for ends sooner, or the test fails.
const LIMIT: Duration = devstack::testing::DEADLINE;

/// The id of the person that a tag names.
fn id(tag: &str) -> &str {
    tag.trim_matches('"').split_once('.').unwrap().0
}

#[tokio::test]
async fn another_spelling_of_a_tag_is_another_tag() {
    let database = Database::new().await;
    let app = App::new(&database.api(Duration::from_secs(30), Waker::new()));
    let (_, tag) = app.create("/person", PERSON).await;
    let id = id(&tag);
    let before = database.rows().await;
    for other in [
        format!("\"{id}.+1\""),
        format!("\"{id}.01\""),
        format!("\"{id}.1 \""),
        format!("\"urn:uuid:{id}.1\""),
        format!("\"{{{id}}}.1\""),
        format!("\"{}.1\"", id.replace('-', "")),
        format!("\"{}.1\"", id.to_uppercase()),
        format!("\"{id}.1-gzip\""),
        format!("W/\"{id}.+1\""),
    ] {
        let request = with(post("/person/11111/debt", DEBT), "if-match", &other);
        assert_eq!(app.call(request).await.status().as_u16(), 412, "If-Match: {other}");
        for path in ["/person/11111", "/person/11111/debt"] {
            let request = with(plain(Method::GET, path), "if-none-match", &other);
            assert_eq!(app.call(request).await.status().as_u16(), 200, "If-None-Match: {other}");
        }
    }
    assert_eq!(database.rows().await, before, "something was written");
    // A proxy that compresses the response weakens its tag; it still names this state alone.
    let weak = format!("W/{tag}");
    let request = with(post("/person/11111/debt", DEBT), "if-match", &weak);
    assert_eq!(app.call(request).await.status().as_u16(), 201);
    let request = with(post("/person/11111/debt", DEBT), "if-match", &weak);
    assert_eq!(app.call(request).await.status().as_u16(), 412, "it was the state before");
}

/// While the items' tables are locked, whatever would read one of them would wait.
#[tokio::test]
async fn what_needs_no_body_reads_no_items() {
    let database = Database::new().await;
    let app = App::new(&database.api(Duration::from_secs(30), Waker::new()));
    app.create("/person", PERSON).await;
    let (_, tag) = app.create("/person/11111/debt", DEBT).await;
    let mut lock = database.admin.begin().await.unwrap();
    sqlx::query("LOCK TABLE person.income, person.asset, person.debt").execute(&mut *lock).await.unwrap();
    for path in ["/person/11111", "/person/11111/debt", "/person/11111/debt?limit=1"] {
        for held in ["*", &tag, &format!("W/{tag}"), &format!("\"a\", {tag}")] {
            let request = with(plain(Method::GET, path), "if-none-match", held);
            let response = timeout(LIMIT, app.call(request)).await.expect("it reads items");
            assert_eq!(
                (response.status().as_u16(), response.header("etag")),
                (304, Some(&*tag)),
                "{path} {held}"
            );
        }
        let response = timeout(LIMIT, app.call(plain(Method::HEAD, path))).await.expect("it reads items");
        assert_eq!((response.status().as_u16(), response.header("etag")), (200, Some(&*tag)), "{path}");
        let request = with(plain(Method::GET, "/person/22222"), "if-none-match", "*");
        assert_eq!(app.call(request).await.status().as_u16(), 404);
    }
    let read = timeout(Duration::from_millis(300), app.call(plain(Method::GET, "/person/11111"))).await;
    assert!(read.is_err(), "the tables are not locked");
}
