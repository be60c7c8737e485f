//! `Idempotency-Key`: a request that is sent again gets the first answer again, and writes nothing.

use std::{sync::Arc, time::Duration};

use outbox::Waker;
use person_api::store::{Connections, idempotency};
use poem::{Request, Response, http::Method};

use crate::support::{App, Database, Redactions, exchange, plain, post, with};

const PERSON: &str = r#"{"cpf": 11111, "name": "abc", "date_of_birth": "2019-06-15"}"#;
const DEBT: &str = r#"{"value": 1}"#;

fn keyed(path: &str, body: &str, key: &str) -> Request {
    with(post(path, body), "idempotency-key", key)
}

/// Everything of an answer, but for the request's own id.
async fn whole(mut response: Response) -> String {
    response.headers_mut().remove("x-request-id").unwrap();
    let (status, headers) = (response.status(), format!("{:?}", response.headers()));
    format!("{status} {headers} {}", response.into_body().into_string().await.unwrap())
}

#[tokio::test]
async fn the_first_answer_comes_again() {
    let database = Database::new().await;
    let app = database.app();
    let mut shown = String::new();
    let mut redactions = Redactions::default();
    let mut say = async |name, request| {
        shown += &redactions.apply(&exchange(&app, name, request).await);
        shown.lines().count()
    };
    say("a person", keyed("/person", PERSON, "\"k-1\"")).await;
    say("again, instead of 409; the key without its quotation marks", keyed("/person", PERSON, "k-1")).await;
    say("a debt", keyed("/person/11111/debt", DEBT, "k-1")).await;
    say("again, by another spelling of the path", keyed("/person/0011111/debt", DEBT, "k-1")).await;
    say("another body", keyed("/person/11111/debt", r#"{"value": 2}"#, "k-1")).await;
    say("another spelling of the body", keyed("/person/11111/debt", r#"{"value":1}"#, "k-1")).await;
    say("another person", keyed("/person", &PERSON.replace("11111", "22222"), "k-1")).await;
    say("another path", keyed("/person/11111/asset", r#"{"type": "t", "value": 1}"#, "k-1")).await;
    say("without a key", post("/person/11111/debt", DEBT)).await;
    say("what failed is not kept", keyed("/person/33333/debt", DEBT, "k-2")).await;
    app.create("/person", &PERSON.replace("11111", "33333")).await;
    say("so it may succeed", keyed("/person/33333/debt", DEBT, "k-2")).await;
    say("nor is what exists", keyed("/person", PERSON, "k-3")).await;
    say("so it may be another one", keyed("/person", &PERSON.replace("11111", "44444"), "k-3")).await;
    say("nor is what is wrong", keyed("/person/44444/debt", "{}", "k-4")).await;
    say("so it may be right", keyed("/person/44444/debt", DEBT, "k-4")).await;
    say("an empty key", keyed("/person/11111/debt", DEBT, "\"\"")).await;
    say("a key with a space", keyed("/person/11111/debt", DEBT, "a b")).await;
    say("a key that is too long", keyed("/person/11111/debt", "{}", &"k".repeat(256))).await;
    say("two keys", with(keyed("/person/11111/debt", DEBT, "a"), "idempotency-key", "b")).await;
    shown += &redactions.apply(&database.events().await);
    insta::assert_snapshot!(shown);
}

/// A retry that would fail by now finds its key first.
#[tokio::test]
async fn a_retry_does_not_fail_for_what_came_later() {
    let database = Database::new().await;
    let app = database.app();
    app.create("/person", PERSON).await;
    let first = whole(app.call(keyed("/person/11111/debt", DEBT, "k")).await).await;
    let patch = crate::support::raw_request(
        Method::PATCH,
        "/person/11111",
        Some("application/json"),
        r#"{"status": "inactive"}"#,
    );
    app.call(patch).await;
    assert_eq!(whole(app.call(keyed("/person/11111/debt", DEBT, "k")).await).await, first);
    assert_eq!(app.call(post("/person/11111/debt", DEBT)).await.status().as_u16(), 409);
    // But for erasure: nothing of the answer is left but that its key was used.
    app.call(plain(Method::DELETE, "/person/11111")).await;
    assert_eq!(app.call(keyed("/person/11111/debt", DEBT, "k")).await.status().as_u16(), 410);
}

/// What was deleted is not created again by a client that did not hear the first answer.
#[tokio::test]
async fn a_key_creates_nothing_again_after_its_person_was_deleted() {
    let database = Database::new().await;
    let app = database.app();
    let retries = [
        ("the person", "/person", PERSON, "of-the-person"),
        (
            "the person, with another body",
            "/person",
            r#"{"cpf": 11111, "name": "x", "date_of_birth": "2019-06-15"}"#,
            "of-the-person",
        ),
        ("a debt", "/person/11111/debt", DEBT, "of-a-debt"),
        ("a debt, by another spelling of the path", "/person/011111/debt", DEBT, "of-a-debt"),
    ];
    app.call(keyed("/person", PERSON, "of-the-person")).await;
    app.call(keyed("/person/11111/debt", DEBT, "of-a-debt")).await;
    app.call(keyed("/person", &PERSON.replace("11111", "22222"), "of-another")).await;
    app.call(plain(Method::DELETE, "/person/11111")).await;
    let mut shown = String::new();
    let mut redactions = Redactions::default();
    for (name, path, body, key) in retries {
        shown += &redactions.apply(&exchange(&app, name, keyed(path, body, key)).await);
    }
    insta::assert_snapshot!("a_key_of_a_deleted_person", shown);
    // Nor in another life of the cpf, whose own keys are its own.
    app.call(keyed("/person", PERSON, "of-the-next-life")).await;
    for (name, path, body, key) in retries {
        assert_eq!(app.call(keyed(path, body, key)).await.status().as_u16(), 410, "{name}");
    }
    for (path, body, key) in [
        ("/person", &*PERSON.replace("11111", "22222"), "of-another"),
        ("/person", PERSON, "of-the-next-life"),
        ("/person/11111/debt", DEBT, "a-new-one"),
    ] {
        assert_eq!(app.call(keyed(path, body, key)).await.status().as_u16(), 201, "{key}");
    }
    let persons = "SELECT count(*) FROM person.person";
    assert_eq!(sqlx::query_scalar::<_, i64>(persons).fetch_one(&database.admin).await.unwrap(), 2);
    // A day later nobody knows the keys any more.
    let old = "UPDATE person.idempotency SET created_at = created_at - interval '25 hours' WHERE route = ''";
    sqlx::query(old).execute(&database.admin).await.unwrap();
    let role = Connections::new(database.url(None).parse().unwrap(), 1);
    assert_eq!(idempotency::remove_old(&role).await.unwrap(), 2);
    app.call(plain(Method::DELETE, "/person/11111")).await;
    assert_eq!(app.call(keyed("/person", PERSON, "of-the-person")).await.status().as_u16(), 201);
}

#[tokio::test]
async fn a_key_belongs_to_its_caller() {
    use poem::{EndpointExt, endpoint::BoxEndpoint};
    use web::front::{Caller, Keys, guarded};

    let database = Database::new().await;
    let api = database.api(Duration::from_secs(30), Waker::new());
    let of = |name: &str| -> BoxEndpoint<'static, Response> {
        guarded(poem::Route::new().nest("/", api.routes().data(Caller::new(name))), Keys::default()).boxed()
    };
    let mut answers = Vec::new();
    for (caller, cpf) in [("ana", "11111"), ("zé", "22222"), ("ana", "11111"), ("zé", "22222")] {
        let request = keyed("/person", &PERSON.replace("11111", cpf), "k");
        answers.push(whole(poem::Endpoint::call(&of(caller), request).await.unwrap()).await);
    }
    assert!(answers.iter().all(|answer| answer.starts_with("201")), "{answers:#?}");
    assert_eq!(answers[..2], answers[2..]);
}

/// A retry's answer is there already, so it waits for no writer.
#[tokio::test]
async fn a_retry_does_not_wait_for_writers() {
    let database = Database::new().await;
    let app = database.app();
    let requests = [("/person", PERSON), ("/person/11111/debt", DEBT)];
    let ask = async || {
        let mut answers = Vec::new();
        for (path, body) in requests {
            answers.push(whole(app.call(keyed(path, body, "k")).await).await);
        }
        answers
    };
    let first = ask().await;
    let mut holder = database.admin.begin().await.unwrap();
    sqlx::query("LOCK TABLE person.person IN EXCLUSIVE MODE").execute(&mut *holder).await.unwrap();
    assert_eq!(ask().await, first);
    holder.rollback().await.unwrap();
}

/// Whoever hung up before the answer finds out by asking again what became of it: here, all of it.
#[tokio::test]
async fn a_retry_finds_what_became_of_a_request_that_was_given_up() {
    let database = Database::new().await;
    let app = Arc::new(database.app());
    app.create("/person", PERSON).await;
    let mut holder = database.admin.begin().await.unwrap();
    sqlx::query("SELECT FROM person.person FOR UPDATE").execute(&mut *holder).await.unwrap();
    let ask = || {
        let app = Arc::clone(&app);
        tokio::spawn(async move { whole(app.call(keyed("/person/11111/debt", DEBT, "k")).await).await })
    };
    let given_up = ask();
    database.until_blocked(1).await;
    given_up.abort();
    let retry = ask();
    database.until_blocked(2).await;
    holder.rollback().await.unwrap();
    let answer = retry.await.unwrap();
    assert!(answer.starts_with("201") && answer.contains("\"version\":2}"), "{answer}");
    assert_eq!(database.events().await.lines().count(), 2, "the person and one debt");
}

/// A key that somebody is just taking for another body is waited for, also where nothing else is waited for.
#[tokio::test]
async fn a_key_that_is_being_taken_is_waited_for() {
    let database = Database::new().await;
    let app = Arc::new(database.app());
    app.create("/person", PERSON).await;
    let mut holder = database.admin.begin().await.unwrap();
    sqlx::query(
        "INSERT INTO person.idempotency
         SELECT 'anonymous', '/person', 'k', 'another body', id, '', '', '' FROM person.person",
    )
    .execute(&mut *holder)
    .await
    .unwrap();
    let waiting = tokio::spawn({
        let app = Arc::clone(&app);
        async move { whole(app.call(keyed("/person", &PERSON.replace("11111", "22222"), "k")).await).await }
    });
    database.until_blocked(1).await;
    holder.commit().await.unwrap();
    let answer = waiting.await.unwrap();
    assert!(answer.starts_with("422") && answer.contains("key-reused"), "{answer}");
    assert_eq!(database.events().await.lines().count(), 1, "nobody else was created");
}

async fn race(app: &Arc<App>, requests: impl Iterator<Item = Request>) -> Vec<String> {
    let mut clients = tokio::task::JoinSet::new();
    for request in requests {
        let app = Arc::clone(app);
        clients.spawn(async move { whole(app.call(request).await).await });
    }
    let mut answers = clients.join_all().await;
    answers.sort();
    answers.dedup();
    answers
}

/// Whoever comes with the same key at the same time waits, and gets the same answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_with_one_key_are_one() {
    let database = Database::new().await;
    let app = Arc::new(database.app());
    let answers = race(&app, (0..100).map(|_| keyed("/person", PERSON, "k"))).await;
    assert_eq!(answers.len(), 1, "{answers:#?}");
    let answers = race(&app, (0..100).map(|_| keyed("/person/11111/debt", DEBT, "k"))).await;
    assert_eq!(answers.len(), 1, "{answers:#?}");
    // The same key with a hundred bodies: one is stored, and the others are told.
    let bodies = (0..100).map(|n| format!(r#"{{"value": {n}}}"#));
    let answers = race(&app, bodies.map(|body| keyed("/person/11111/debt", &body, "k-2"))).await;
    assert_eq!(answers.iter().map(|answer| &answer[..3]).collect::<Vec<_>>(), ["201", "422"], "{answers:#?}");
    let cpfs = (1..=20).map(|cpf| PERSON.replace("11111", &cpf.to_string()));
    let answers = race(&app, cpfs.map(|body| keyed("/person", &body, "k-3"))).await;
    assert_eq!(answers.iter().map(|answer| &answer[..3]).collect::<Vec<_>>(), ["201", "422"], "{answers:#?}");

    let versions: Vec<String> =
        database.events().await.lines().map(|line| line.split(" {").next().unwrap().to_owned()).collect();
    assert_eq!(versions, ["1 person.new", "2 debt.new", "3 debt.new", "1 person.new"]);
    let rows = database.rows().await;
    let count = |table: &str| rows.lines().filter(|row| row.starts_with(table)).count();
    assert_eq!((count("person.person"), count("person.debt"), count("person.idempotency")), (2, 2, 4));
}

#[tokio::test]
async fn what_is_older_than_a_day_is_removed() {
    let database = Database::new().await;
    let app = database.app();
    app.call(keyed("/person", PERSON, "new")).await;
    sqlx::raw_sql(
        "INSERT INTO person.idempotency
         SELECT caller, route, 'old ' || n, request, person_id, location, etag, body, now() - interval '24 hours 1 minute'
         FROM person.idempotency, generate_series(1, 2500) n;
         INSERT INTO person.idempotency
         SELECT caller, route, 'of today', request, person_id, location, etag, body, now() - interval '23 hours 59 minutes'
         FROM person.idempotency WHERE key = 'new'",
    )
    .execute(&database.admin)
    .await
    .unwrap();
    let role = Connections::new(database.url(None).parse().unwrap(), 1);
    assert_eq!(idempotency::remove_old(&role).await.unwrap(), 2500);
    let left: Vec<String> = sqlx::query_scalar("SELECT key FROM person.idempotency ORDER BY 1")
        .fetch_all(&database.admin)
        .await
        .unwrap();
    assert_eq!(left, ["new", "of today"]);
}

#[tokio::test]
async fn the_program_removes_what_is_old_by_itself() {
    let database = Database::new().await;
    database.app().call(keyed("/person", PERSON, "k")).await;
    let old = "UPDATE person.idempotency SET created_at = now() - interval '25 hours'";
    sqlx::query(old).execute(&database.admin).await.unwrap();
    let _program = crate::support::Program::start(&database.url(None)).await;
    crate::support::until("it is removed", async || {
        let count = "SELECT count(*) FROM person.idempotency";
        sqlx::query_scalar::<_, i64>(count).fetch_one(&database.admin).await.unwrap() == 0
    })
    .await;
}
