//! What the API answers, byte for byte.

use std::{fmt::Write, time::Duration};

use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::support::{Answer, Database, Program};

const LIFE_1: &str = "\"0198c0de-0000-7000-8000-000000000001.4\"";

pub(crate) fn join(answers: &[Answer]) -> String {
    answers.iter().fold(String::new(), |mut all, answer| {
        writeln!(all, "{answer}").unwrap();
        all
    })
}

#[tokio::test]
async fn a_known_person_has_a_score() {
    let mut database = Database::migrated().await;
    database.person(11111, 1, 1, 4, "4970").await;
    database.person(22222, 2, 1, 1, "0").await;
    database.person(33333, 3, 1, 2, "-50").await;
    database.person(99_999_999_999, 4, 1, 1_000_000, "9999999999999999999999999999").await;
    database.person(44444, 5, 1, 1_000_000, "-9999999999999999999999999999").await;
    let program = Program::ready(&database.url()).await;
    insta::assert_snapshot!(join(&[
        program.get("/11111/score").await,
        // Without items.
        program.get("/22222/score").await,
        // With debts alone.
        program.get("/33333/score").await,
        // Wider than 64 bits and than a float.
        program.get("/99999999999/score").await,
        program.get("/44444/score").await,
        // Spellings of 11111.
        program.get("/00000011111/score").await,
        program.get("/%31%31111/score").await,
        program.get("/11111/score?").await,
        program.request("HEAD", "/11111/score", &[]).await,
    ]));
}

#[tokio::test]
async fn the_newest_life_of_a_cpf_answers() {
    let mut database = Database::migrated().await;
    database.person(11111, 9, 1, 8, "10").await;
    database.person(11111, 1, 2, 1, "20").await;
    let program = Program::ready(&database.url()).await;
    assert_eq!(
        program.get("/11111/score").await.body,
        "{\"score\":20,\"person_id\":\"0198c0de-0000-7000-8000-000000000001\",\"version\":1,\
         \"updated_at\":\"2026-02-01T12:00:00.123456Z\"}\n"
    );
    // Of two lives that began in the same microsecond, the later id.
    database.person(11111, 2, 2, 1, "30").await;
    assert!(program.get("/11111/score").await.body.contains("\"score\":30,"));
    sqlx::query("DELETE FROM score.person").execute(&mut database.admin).await.unwrap();
    assert_eq!(program.get("/11111/score").await.status, 404);
}

/// However many readers wait for the database, one query is under way, and each reader gets their own score.
#[tokio::test]
async fn readers_who_come_together_get_each_their_own() {
    let mut database = Database::migrated().await;
    for cpf in 1..=50 {
        database.person(cpf, u32::try_from(cpf).unwrap(), 1, cpf, "1").await;
    }
    let program = Program::ready(&database.url()).await;
    // Each twice, and twenty that nobody knows.
    let cpfs: Vec<i64> = (1..=70).chain(1..=50).collect();
    let mut answers = Vec::new();
    for attempt in 1.. {
        let mut lock = database.admin.begin().await.unwrap();
        sqlx::query("LOCK TABLE score.person").execute(&mut *lock).await.unwrap();
        let asked: Vec<_> = cpfs.iter().map(|cpf| program.asks(format!("/{cpf}/score"))).collect();
        // For as long as it takes the others to come.
        let (mut waited, mut looks) = (0, 0);
        while looks < 30 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            // A transaction sees the sessions as they were when it first looked.
            sqlx::query("SELECT pg_stat_clear_snapshot()").execute(&mut *lock).await.unwrap();
            let waiting: i64 = sqlx::query_scalar(
                "SELECT count(*) FROM pg_stat_activity WHERE usename = $1 AND wait_event_type = 'Lock'",
            )
            .bind(&database.role)
            .fetch_one(&mut *lock)
            .await
            .unwrap();
            assert!(waiting <= 1, "{waiting} statements wait");
            waited += waiting;
            looks += i64::from(waited > 0);
        }
        lock.rollback().await.unwrap();
        for asked in asked {
            answers.push(asked.await.unwrap());
        }
        // The program gives a statement one second, which is over on a busy machine before the lock is.
        if attempt == 20 || answers.iter().all(|answer| answer.status != 503) {
            break;
        }
        answers.clear();
    }
    for (cpf, answer) in cpfs.into_iter().zip(answers) {
        if cpf > 50 {
            assert_eq!(answer.status, 404, "{answer}");
        } else {
            assert!(answer.body.contains(&format!("\"version\":{cpf},")), "{answer}");
        }
    }
}

#[tokio::test]
async fn a_score_that_the_caller_has_is_not_sent_again() {
    let mut database = Database::migrated().await;
    database.person(11111, 1, 1, 4, "4970").await;
    let program = Program::ready(&database.url()).await;
    let with = async |tags| program.request("GET", "/11111/score", &[("If-None-Match", tags)]).await;
    insta::assert_snapshot!(with(LIFE_1).await, @r#"
    > GET /11111/score
    304
    cache-control: private, no-cache
    connection: close
    etag: "0198c0de-0000-7000-8000-000000000001.4"
    "#);
    assert_eq!(with("*").await.status, 304);
    assert_eq!(with("\"another\", W/\"0198c0de-0000-7000-8000-000000000001.4\"").await.status, 304);
    assert_eq!(with("\"0198c0de-0000-7000-8000-000000000001.3\"").await.status, 200);
    assert_eq!(with("no tag").await.status, 200);
}

#[tokio::test]
async fn what_cannot_be_answered_is_a_problem() {
    let database = Database::migrated().await;
    let program = Program::ready(&database.url()).await;
    insta::assert_snapshot!(
        "refused",
        join(&[
            // Nobody has this cpf.
            program.get("/11111/score").await,
            // No cpf.
            program.get("/0/score").await,
            program.get("/100000000000/score").await,
            program.get("/000000011111/score").await,
            program.get("/abc/score").await,
            program.get("/-11111/score").await,
            program.get("/+11111/score").await,
            program.get("/11111.0/score").await,
            program.get("/%2011111/score").await,
            program.get("/111%2F11/score").await,
            program.get("/%D9%A1%D9%A1/score").await,
            program.get("/%FF/score").await,
            program.get("/%00/score").await,
            // Paths and methods.
            program.get("/").await,
            program.get("//score").await,
            program.get("/score").await,
            program.get("/11111/score/").await,
            program.get("/11111/scores").await,
            program.request("POST", "/11111/score", &[("Content-Length", "0")]).await,
            program.request("DELETE", "/abc/score", &[]).await,
            program.request("BREW", "/11111/score", &[]).await,
        ])
    );
}

#[tokio::test]
async fn a_defect_shows_nothing_of_the_inside() {
    let mut database = Database::migrated().await;
    let program = Program::ready(&database.url()).await;
    sqlx::query("ALTER TABLE score.person RENAME COLUMN total TO sum")
        .execute(&mut database.admin)
        .await
        .unwrap();
    insta::assert_snapshot!(program.get("/11111/score").await, @r#"
    > GET /11111/score
    500
    cache-control: no-store
    connection: close
    content-length: 202
    content-type: application/problem+json

    {"type":"/problems/internal","title":"Internal error","status":500,"detail":"The request could not be completed because of a defect in the service.","request_id":"[request id]"}
    "#);
}

#[tokio::test]
async fn a_stuck_database_is_a_problem_in_time() {
    let mut database = Database::migrated().await;
    let program = Program::ready(&database.url()).await;
    let mut lock = database.admin.begin().await.unwrap();
    sqlx::query("LOCK TABLE score.person IN ACCESS EXCLUSIVE MODE").execute(&mut *lock).await.unwrap();
    // It comes while the table is locked.
    insta::assert_snapshot!(program.get("/11111/score").await, @r#"
    > GET /11111/score
    503
    cache-control: no-store
    connection: close
    content-length: 153
    content-type: application/problem+json
    retry-after: 1

    {"type":"/problems/unavailable","title":"Service unavailable","status":503,"detail":"The service cannot reach its database right now. Try again later."}
    "#);
    lock.rollback().await.unwrap();
    assert_eq!(program.get("/11111/score").await.status, 404);
}

#[tokio::test]
async fn more_reads_than_the_database_can_take_are_told_to_come_again() {
    let mut database = Database::migrated().await;
    let program = Program::ready_with(&database.url(), &["--max-in-flight", "1"]).await;
    let mut lock = database.admin.begin().await.unwrap();
    sqlx::query("LOCK TABLE score.person IN ACCESS EXCLUSIVE MODE").execute(&mut *lock).await.unwrap();
    for path in ["/11111/score", "/11111/score/entries"] {
        // Whichever comes first waits for the database, and the other one for nothing.
        let (one, other) = tokio::join!(program.get(path), program.get(path));
        assert_eq!((one.status, other.status), (503, 503));
        let (mut said, mut after) = (Vec::new(), Vec::new());
        for answer in [one, other] {
            after.push(answer.header("retry-after").to_owned());
            let body: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
            said.push(body["type"].as_str().unwrap().to_owned());
        }
        said.sort_unstable();
        assert_eq!(said, ["/problems/overloaded", "/problems/unavailable"], "{path}");
        assert_eq!(after, ["1", "1"], "{path}");
    }
    lock.rollback().await.unwrap();
    assert_eq!(program.get("/11111/score").await.status, 404);
}

/// The rights that `score.grant_api` and `inbox.grant_reader` give: to read the model, and nothing else.
#[tokio::test]
async fn the_role_of_the_api_cannot_write() {
    let mut database = Database::migrated().await;
    database.person(11111, 1, 1, 4, "4970").await;
    let mut role = PgConnection::connect(&database.url()).await.unwrap();
    for statement in [
        "INSERT INTO score.person (id, cpf, created_at, version) VALUES (gen_random_uuid(), 1, now(), 1)",
        "UPDATE score.person SET total = 1",
        "DELETE FROM score.person",
        "SELECT * FROM score.person FOR UPDATE",
        "DELETE FROM score.entry",
        "UPDATE score.migration SET success = false",
        "UPDATE score.model SET consumer = 'another'",
        "UPDATE inbox.aggregate SET version = 9",
        "SELECT * FROM inbox.aggregate FOR UPDATE",
        "SELECT * FROM inbox.held",
        "TRUNCATE score.person CASCADE",
        "CREATE TABLE score.mine ()",
        "CREATE SCHEMA mine",
    ] {
        let refused = sqlx::query(AssertSqlSafe(statement)).execute(&mut role).await.expect_err(statement);
        let code = refused.as_database_error().and_then(|e| e.code().map(std::borrow::Cow::into_owned));
        assert_eq!(code.as_deref(), Some("42501"), "{statement}: {refused}");
    }
    assert_eq!(Program::ready(&database.url()).await.get("/11111/score").await.status, 200);
}

#[tokio::test]
async fn requests_are_counted_without_what_is_in_them() {
    let mut database = Database::migrated().await;
    database.person(11111, 1, 1, 4, "4970").await;
    let program = Program::ready(&database.url()).await;
    for path in ["/11111/score", "/11111/score", "/22222/score", "/abc/score", "/some/where"] {
        program.get(path).await;
    }
    program.request("BREW", "/11111/score", &[]).await;
    let metrics = program.get("/metrics").await.body;
    let counted = |line: &&str| line.contains("requests_total") && !line.contains("/ready");
    let mut requests: Vec<_> = metrics.lines().filter(counted).collect();
    requests.sort_unstable();
    insta::assert_snapshot!(requests.join("\n"), @r#"
    # HELP http_requests_total Requests, by method, route pattern and status.
    # TYPE http_requests_total counter
    http_requests_total{method="GET",route="/:cpf/score",status="200"} 2
    http_requests_total{method="GET",route="/:cpf/score",status="404"} 1
    http_requests_total{method="GET",route="/:cpf/score",status="422"} 1
    http_requests_total{method="GET",route="/:cpf/score",status="500"} 0
    http_requests_total{method="GET",route="/:cpf/score",status="503"} 0
    http_requests_total{method="GET",route="none",status="404"} 1
    http_requests_total{method="GET",route="none",status="500"} 0
    http_requests_total{method="GET",route="none",status="503"} 0
    http_requests_total{method="other",route="/:cpf/score",status="405"} 1
    http_requests_total{method="other",route="/:cpf/score",status="500"} 0
    http_requests_total{method="other",route="/:cpf/score",status="503"} 0
    "#);
    assert!(metrics.contains("http_request_duration_seconds_bucket{method=\"GET\",route=\"/:cpf/score\""));
    let mut labels = metrics.lines().filter_map(|line| line.split_once('}')).map(|(labels, _)| labels);
    assert!(labels.all(|l| !l.contains("11111") && !l.contains("22222")), "a cpf is in a label");
}
