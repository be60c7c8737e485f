//! A server that answers, and cannot store anything: its disk is full.

use sqlx::Executor;

use crate::{
    outage::{DEBT, PERSON},
    support::{Database, Program, until},
};

/// Every insert of an event fails as it does when the file cannot be extended.
const FULL: &str = "
CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'could not extend file \"base/1/2\": No space left on device' USING ERRCODE = '53100';
END $$;
CREATE TRIGGER full_disk BEFORE INSERT ON outbox.event FOR EACH STATEMENT EXECUTE FUNCTION full_disk()";

#[tokio::test]
async fn it_is_not_ready_and_says_what_it_is() {
    let database = Database::new().await;
    let program = Program::start(&database.url(None)).await;
    let ready = async || program.get("/ready").await.contains("\"ready\":true");
    until("it is ready", &ready).await;
    assert!(program.post("/person", PERSON).await.starts_with("HTTP/1.1 201 "));

    let before = database.rows().await;
    database.admin.execute(sqlx::raw_sql(FULL)).await.unwrap();
    let refused = program.post("/person/11111/debt", DEBT).await;
    insta::assert_snapshot!(refused);
    until("it is not ready", async || !ready().await).await;
    let said = program.get("/ready").await;
    assert!(said.contains("SQLSTATE 53100: the server's disk is full") && !said.contains("base/1"), "{said}");
    assert!(program.get("/person/11111").await.starts_with("HTTP/1.1 200 "), "reading goes on");
    assert_eq!(database.rows().await, before, "something was stored");

    // Nothing is sent to it any more, and still it notices.
    database.admin.execute("DROP TRIGGER full_disk ON outbox.event").await.unwrap();
    until("it is ready again", &ready).await;
    assert_eq!(database.rows().await, before, "a trial was stored");
    assert!(program.post("/person/11111/debt", DEBT).await.starts_with("HTTP/1.1 201 "));
}
