//! A person with very much is gone for everybody at once, and the rest is removed step by step, whatever happens.

use std::time::Duration;

use outbox::Waker;
use person_api::store::{Connections, erase};
use poem::http::Method;

use crate::support::{Database, Program, answer, plain, post, until, with};

const CPF: &str = "52998224725";
const PERSONAL: [&str; 4] = [CPF, "Brunhilde", "Rheingold", "Nibelungenhort"];
const PERSON: &str =
    r#"{"cpf": 52998224725, "name": "Brunhilde", "address": "Rheingold 7", "date_of_birth": "1899-07-08"}"#;
const ANOTHER: &str = r#"{"cpf": 22222, "name": "another", "date_of_birth": "2000-01-01"}"#;

/// Gives the person `items` items of each kind, as many kept answers, and `events` events.
async fn fill(database: &Database, items: i32, events: i32) {
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
        "INSERT INTO person.income SELECT outbox.uuid7(), id, 'Nibelungenhort', 1
         FROM person.person, generate_series(1, {items}) WHERE cpf = {CPF};
         INSERT INTO person.asset SELECT outbox.uuid7(), id, 'Nibelungenhort', 1
         FROM person.person, generate_series(1, {items}) WHERE cpf = {CPF};
         INSERT INTO person.debt SELECT outbox.uuid7(), id, 1
         FROM person.person, generate_series(1, {items}) WHERE cpf = {CPF};
         INSERT INTO person.idempotency
         SELECT 'anonymous', '/person/{CPF}/debt', 'key-' || n, '', id, '/person/{CPF}/debt/1', '', '{{}}'
         FROM person.person, generate_series(1, {items}) n WHERE cpf = {CPF};
         INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
         SELECT 'person', id::text, version + n, 'person.changed', json_build_object('id', id, 'name', 'Brunhilde')
         FROM person.person, generate_series(1, {events}) n WHERE cpf = {CPF} ORDER BY n;
         UPDATE person.person SET version = version + {events} WHERE cpf = {CPF}"
    )))
    .execute(&database.admin)
    .await
    .unwrap();
}

/// Where something personal stands, in tables.
async fn stands(database: &Database) -> Vec<String> {
    let mut found = Vec::new();
    for text in PERSONAL {
        for table in devstack::testing::tables_with(&database.admin_url, text).await {
            found.push(format!("{table}: {text}"));
        }
    }
    found
}

async fn count(database: &Database, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(&database.admin).await.unwrap()
}

const READABLE: &str = "SELECT count(*) FROM outbox.readable WHERE payload::text LIKE '%Brunhilde%'";
const EMPTIED: &str = "SELECT count(*) FROM person.person WHERE cpf IS NULL";
const ITEMS: &str = "SELECT (SELECT count(*) FROM person.income) + (SELECT count(*) FROM person.asset)
                            + (SELECT count(*) FROM person.debt)";

#[tokio::test]
async fn who_has_very_much_is_gone_at_once_and_the_rest_goes_in_steps() {
    let database = Database::new().await;
    // The limit of a statement is one that the whole would exceed by far.
    let api = database.api(Duration::from_secs(10), Waker::new());
    let app = crate::support::App::new(&api);
    app.call(with(post("/person", PERSON), "idempotency-key", "k")).await;
    app.create("/person", ANOTHER).await;
    fill(&database, 30_000, 40_000).await;
    let path = format!("/person/{CPF}");

    let deleted = app.call(plain(Method::DELETE, &path)).await;
    assert_eq!(deleted.status().as_u16(), 200);
    for gone in [path.clone(), format!("{path}/debt")] {
        assert_eq!(app.call(plain(Method::GET, &gone)).await.status().as_u16(), 404);
    }
    assert_eq!(app.call(post(&format!("{path}/debt"), r#"{"value": 1}"#)).await.status().as_u16(), 404);
    assert_eq!(count(&database, READABLE).await, 0, "a relay gets the erased form at once");
    assert_eq!(count(&database, EMPTIED).await, 1, "not everything is removed yet");
    assert!(!stands(&database).await.is_empty());

    // Another life of the cpf takes nothing of what is left, and gets no answer of before.
    app.create("/person", &PERSON.replace("Brunhilde", "Grimgerde").replace("Rheingold", "Walhall")).await;
    for (path, body, key) in
        [("/person", PERSON, "k"), (&*format!("{path}/debt"), r#"{"value": 1}"#, "key-29999")]
    {
        let again = app.call(with(post(path, body), "idempotency-key", key)).await;
        assert_eq!(again.status().as_u16(), 410, "{path}");
    }
    let life = app.call(plain(Method::GET, &path)).await.into_body().into_string().await.unwrap();
    assert!(life.contains("\"debts\":[]") && life.contains("Grimgerde"), "{life}");
    app.call(plain(Method::DELETE, &path)).await;

    // As the program does it, under its role.
    let role = Connections::new(database.url(None).parse().unwrap(), 1);
    let mut steps = 0;
    while erase::remove(&role, 1_000).await.unwrap() > 0 {
        steps += 1;
    }
    assert!(steps >= 30, "in {steps} steps");
    assert_eq!(count(&database, EMPTIED).await, 0);
    assert_eq!(count(&database, ITEMS).await, 0);
    let step = "SELECT outbox.erase_step(1000)";
    while sqlx::query(step).execute(&database.admin).await.unwrap().rows_affected() > 0 {}
    assert_eq!(stands(&database).await, Vec::<String>::new());
    let keys = "SELECT count(*) FROM person.idempotency WHERE route = '' AND person_id IS NULL";
    assert_eq!(count(&database, keys).await, 30_001, "the keys are remembered without what they were for");
}

#[tokio::test]
async fn a_program_that_is_killed_in_between_goes_on_where_it_was() {
    let database = Database::new().await;
    let app = database.app();
    app.create("/person", PERSON).await;
    fill(&database, 20_000, 0).await;
    app.call(plain(Method::DELETE, &format!("/person/{CPF}"))).await;
    assert_eq!(count(&database, ITEMS).await, 60_000);

    // It cannot be done before it is killed.
    let mut holder = database.admin.begin().await.unwrap();
    let last = "SELECT FROM person.debt ORDER BY id DESC LIMIT 1 FOR UPDATE";
    sqlx::query(last).execute(&mut *holder).await.unwrap();
    let mut program = Program::start(&database.url(None)).await;
    until("some of it is removed", async || count(&database, ITEMS).await < 60_000).await;
    program.kill().await;
    assert!(count(&database, ITEMS).await > 0, "it was killed in between");
    holder.rollback().await.unwrap();
    let _next = Program::start(&database.url(None)).await;
    until("everything is removed", async || count(&database, EMPTIED).await == 0).await;
    assert_eq!(count(&database, ITEMS).await, 0);
}

#[tokio::test]
async fn republishing_leaves_out_who_is_being_removed() {
    let database = Database::new().await;
    let app = database.app();
    app.create("/person", PERSON).await;
    app.create("/person", ANOTHER).await;
    fill(&database, 400, 0).await;
    app.call(plain(Method::DELETE, &format!("/person/{CPF}"))).await;
    assert_eq!(count(&database, EMPTIED).await, 1);
    let mut command = crate::support::command(&["republish", "--all"]);
    let (code, said, error) = crate::support::finished(command.env("DATABASE_URL", database.url(None))).await;
    assert_eq!(code, Some(0), "{said}{error}");
    let baselines = "SELECT count(*) FROM outbox.event WHERE type = 'person.baseline'";
    assert_eq!(count(&database, baselines).await, 1, "{said}");
}

/// A lock on one person's row holds nobody else up, whoever wants to write there.
#[tokio::test(flavor = "multi_thread")]
async fn one_busy_person_takes_nobody_elses_connections() {
    let database = Database::new().await;
    let app = database.app();
    app.create("/person", PERSON).await;
    app.create("/person", ANOTHER).await;
    let program = Program::start(&database.url(None)).await;
    until("it is ready", async || program.get("/ready").await.contains("\"ready\":true")).await;

    let mut holder = database.admin.begin().await.unwrap();
    let lock = "SELECT FROM person.person WHERE cpf = 52998224725 FOR UPDATE";
    sqlx::query(lock).execute(&mut *holder).await.unwrap();
    let mut writers = tokio::task::JoinSet::new();
    for n in 0..40 {
        let path = format!("/person/{CPF}");
        let request = match n % 3 {
            0 => crate::support::post_request(&format!("{path}/debt"), r#"{"value": 1}"#),
            1 => format!("DELETE {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"),
            _ => crate::support::post_request("/person", PERSON),
        };
        let stream = program.send(&request).await;
        writers.spawn(async move { (n % 3, answer(stream).await) });
    }
    database.until_blocked(2).await;
    // They are all there, and two of them wait at the database: whoever else comes is answered meanwhile.
    let mut others = 0;
    while others < 20 {
        let written = program.post("/person/22222/debt", r#"{"value": 1}"#).await;
        assert!(written.starts_with("HTTP/1.1 201"), "{written}");
        assert!(program.get("/person/22222").await.starts_with("HTTP/1.1 200"));
        assert!(
            program.get(&format!("/person/{CPF}")).await.starts_with("HTTP/1.1 200"),
            "reads wait for nobody"
        );
        others += 1;
    }
    assert!(!writers.is_empty());
    let mut busy = 0;
    while let Some(answered) = writers.join_next().await {
        let (kind, text) = answered.unwrap();
        // One that would create a person who is there is refused by what is committed.
        if kind == 2 && text.starts_with("HTTP/1.1 409") {
            continue;
        }
        assert!(text.starts_with("HTTP/1.1 503") && text.contains("/problems/person-busy"), "{text}");
        assert!(text.contains("retry-after: 1"), "{text}");
        busy += 1;
    }
    assert!(busy >= 27, "{busy}");
    holder.rollback().await.unwrap();
    let written = program.post(&format!("/person/{CPF}/debt"), r#"{"value": 1}"#).await;
    assert!(written.starts_with("HTTP/1.1 201"), "{written}");
}
