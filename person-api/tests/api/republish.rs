//! Everybody's state once more: complete, at its version, once, beside writers, and after a crash.

use std::{process::Stdio, sync::Arc};

use events::PersonEvent;
use tokio::{io::AsyncWriteExt, process::Command};
use tokio_util::sync::CancellationToken;

use crate::support::{Database, Redactions, command, finished, until};

/// Persons whose ids are in the order of their cpfs, from 1 on.
async fn persons(database: &Database, count: i64) {
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
        "INSERT INTO person.person (id, cpf, name, date_of_birth)
         SELECT ('01890000-0000-7000-8000-' || lpad(n::text, 12, '0'))::uuid, n, 'n', now() FROM generate_series(1, {count}) n;
         INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
         SELECT 'person', id, 1, 'person.new', '{{}}' FROM person.person"
    )))
    .execute(&database.admin)
    .await
    .unwrap();
}

fn republish(database: &Database, arguments: &str) -> Command {
    let mut command = command(&["republish"]);
    command
        .args(arguments.split_whitespace())
        .env("DATABASE_URL", database.url(None))
        .env("USER", "operator");
    command
}

/// What it says, as a user sees it, with its exit code.
pub(crate) async fn said(database: &Database, arguments: &str, input: &str) -> String {
    let mut program = republish(database, arguments);
    program.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = program.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).await.unwrap();
    let output = child.wait_with_output().await.unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    let error: Vec<&str> = error.lines().filter(|line| !line.starts_with('{')).collect();
    let (code, out) = (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap());
    format!("$ person-api republish {arguments}\n{out}{}\nexit {code}\n\n", error.join("\n"))
}

/// How many baselines each person has: the least and the most.
async fn baselines(database: &Database) -> (i64, i64) {
    let sql = "SELECT coalesce(min(n), 0), coalesce(max(n), 0)
               FROM (SELECT count(e.id) AS n FROM person.person p
                     LEFT JOIN outbox.event e ON e.aggregate_id = p.id::text AND e.type = 'person.baseline'
                     GROUP BY p.id) counted";
    sqlx::query_as(sql).fetch_one(&database.admin).await.unwrap()
}

#[tokio::test]
async fn one_person_is_told_as_it_is_stored() {
    let database = Database::new().await;
    let app = database.app();
    app.create("/person", include_str!("../../../payloads/new_person.json")).await;
    app.create("/person/11111/income", r#"{"type": "renting", "value": 1000}"#).await;
    app.create("/person/11111/income", r#"{"type": "farm \"é\"", "value": 0.5}"#).await;
    app.create("/person/11111/debt", r#"{"value": 999999999999999.9999}"#).await;
    let id: uuid::Uuid =
        sqlx::query_scalar("SELECT id FROM person.person").fetch_one(&database.admin).await.unwrap();
    let mut shown = String::new();
    for (arguments, input) in [
        ("--cpf-stdin --dry-run", "11111\n"),
        ("--cpf-stdin", "11111\n"),
        ("--cpf-stdin", "22222"),
        ("--cpf-stdin", "Maria"),
        (&*format!("--person {id} --json"), ""),
        ("--person 01890000-0000-7000-8000-000000000001", ""),
        ("", ""),
        ("--all --cpf-stdin", ""),
        ("--cpf-stdin --restart", ""),
    ] {
        shown += &said(&database, arguments, input).await;
    }
    let event: (String, i64, String, String) = sqlx::query_as(
        "SELECT type, version, headers::text, payload::text FROM outbox.event
         WHERE type = 'person.baseline' ORDER BY position LIMIT 1",
    )
    .fetch_one(&database.admin)
    .await
    .unwrap();
    PersonEvent::parse(&event.0, event.3.as_bytes()).unwrap();
    shown += &format!("{} {} {}\n{}", event.0, event.1, event.2, event.3);
    assert!(!shown.contains("22222") && !shown.contains("Maria"), "{shown}");
    insta::assert_snapshot!(Redactions::default().apply(&shown));
}

/// It waits for a writer and then tells what the writer left, not what was there before.
#[tokio::test]
async fn a_baseline_contains_what_it_waited_for() {
    let database = Database::new().await;
    persons(&database, 4).await;
    let mut writer = database.admin.begin().await.unwrap();
    sqlx::raw_sql(
        "UPDATE person.person SET version = version + 1 WHERE cpf = 3;
         INSERT INTO person.debt (id, person_id, value) SELECT outbox.uuid7(), id, 7 FROM person.person WHERE cpf = 3;
         INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
         SELECT 'person', id, version, 'debt.new', '{}' FROM person.person WHERE cpf = 3",
    )
    .execute(&mut *writer)
    .await
    .unwrap();
    let mut program = republish(&database, "--all");
    let (ended, ()) = tokio::join!(finished(&mut program), async {
        database.until_blocked(1).await;
        // Nobody else waits with it: who was in the same batch is told, and free.
        until("the second person is told", async || {
            let sql = "SELECT version = 2 FROM person.person WHERE cpf = 2 FOR UPDATE NOWAIT";
            matches!(sqlx::query_scalar(sql).fetch_one(&database.admin).await, Ok(true))
        })
        .await;
        writer.commit().await.unwrap();
    });
    assert_eq!(ended.0, Some(0), "{ended:?}");
    let told: (i64, i32) = sqlx::query_as(
        "SELECT e.version, json_array_length(payload->'debts') FROM outbox.event e
         JOIN person.person p ON p.id::text = e.aggregate_id WHERE p.cpf = 3 AND e.type = 'person.baseline'",
    )
    .fetch_one(&database.admin)
    .await
    .unwrap();
    assert_eq!(told, (3, 1));
}

/// Beside writers: versions without holes, and each baseline is the state at its version.
#[tokio::test(flavor = "multi_thread")]
async fn beside_writers() {
    let database = Database::new().await;
    persons(&database, 30).await;
    let (app, stop) = (Arc::new(database.app()), CancellationToken::new());
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..4_u64 {
        let (app, stop) = (Arc::clone(&app), stop.clone());
        writers.spawn(async move {
            let mut n = writer;
            while !stop.is_cancelled() {
                n += 7;
                app.create(&format!("/person/{}/debt", n % 30 + 1), r#"{"value": 1}"#).await;
            }
        });
    }
    for _ in 0..5 {
        let ended = finished(&mut republish(&database, "--all --rate 100000")).await;
        assert_eq!((ended.0, &*ended.1), (Some(0), "30 persons republished\n"), "{ended:?}");
    }
    stop.cancel();
    while let Some(done) = writers.join_next().await {
        done.unwrap();
    }
    assert_eq!(baselines(&database).await, (5, 5));
    let holes: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM (
             SELECT FROM outbox.event e JOIN person.person p ON p.id::text = e.aggregate_id
             GROUP BY p.id HAVING (min(e.version), max(e.version), count(*)) <> (1, p.version, p.version)) hole",
    )
    .fetch_one(&database.admin)
    .await
    .unwrap();
    let wrong: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM outbox.event b
         WHERE b.type = 'person.baseline'
           AND ARRAY(SELECT debt->>'id' FROM json_array_elements(b.payload->'debts') debt ORDER BY 1)
            <> ARRAY(SELECT e.payload->>'id' FROM outbox.event e
                     WHERE e.aggregate_id = b.aggregate_id AND e.version < b.version AND e.type = 'debt.new'
                     ORDER BY 1)",
    )
    .fetch_one(&database.admin)
    .await
    .unwrap();
    assert_eq!((holes, wrong), (0, 0));
}

/// Killed, interrupted, and run again: everybody once, and nobody left out.
#[tokio::test]
async fn killed_interrupted_and_continued() {
    let database = Database::new().await;
    persons(&database, 400).await;
    let done = async || -> i64 {
        let sql = "SELECT count(*) FROM outbox.event WHERE type = 'person.baseline'";
        sqlx::query_scalar(sql).fetch_one(&database.admin).await.unwrap()
    };
    let mut killed = republish(&database, "--all --rate 40").spawn().unwrap();
    until("it has begun", async || done().await > 20).await;
    let mut shown = said(&database, "--all", "").await;
    killed.kill().await.unwrap();

    let mut program = republish(&database, "--all --rate 40");
    let program = program.stdout(Stdio::piped());
    let before = done().await;
    // The server notices the end of a connection a little later than everybody else.
    let interrupted = loop {
        let mut child = program.spawn().unwrap();
        until("it goes on, or is told that it may not", async || {
            done().await > before + 20 || child.try_wait().unwrap().is_some()
        })
        .await;
        if child.try_wait().unwrap().is_none() {
            break child;
        }
    };
    let pid = interrupted.id().unwrap().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().await.unwrap().success());
    let output = interrupted.wait_with_output().await.unwrap();
    assert_eq!(output.status.code(), Some(3));
    shown += &format!("interrupted\n{}\n", String::from_utf8(output.stdout).unwrap());
    // Who comes and who goes meanwhile has told it already.
    persons_come_and_go(&database).await;
    for arguments in
        ["--all --dry-run", "--all --rate 100000", "--all --dry-run --json", "--all --json --rate 100000"]
    {
        shown += &said(&database, arguments, "").await;
    }
    let come: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM outbox.event e JOIN person.person p ON p.id::text = e.aggregate_id
         WHERE p.cpf > 400 AND e.type = 'person.baseline'",
    )
    .fetch_one(&database.admin)
    .await
    .unwrap();
    // Only the second time round are they among those who were there when it began.
    assert_eq!(come, 5);
    sqlx::raw_sql("DELETE FROM person.person WHERE cpf > 400").execute(&database.admin).await.unwrap();
    assert_eq!(baselines(&database).await, (2, 2));
    insta::with_settings!({filters => vec![
        (r"operator@\S+", "operator@HOST"),
        (r"\b\d+ of 400", "N of 400"),
        (r"\b\d+ of them", "N of them"),
        (r"\b\d+ persons would be republished; the others", "N persons would be republished; the others"),

    ]}, {
        insta::assert_snapshot!(shown);
    });
}

async fn persons_come_and_go(database: &Database) {
    sqlx::raw_sql(
        "INSERT INTO person.person (id, cpf, name, date_of_birth)
         SELECT outbox.uuid7(), n, 'n', now() FROM generate_series(401, 405) n;
         INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
         SELECT 'person', id, 1, 'person.new', '{}' FROM person.person WHERE cpf > 400;
         DELETE FROM person.person WHERE cpf = 400",
    )
    .execute(&database.admin)
    .await
    .unwrap();
}

/// Another incarnation of the source, or --restart, is another time.
#[tokio::test]
async fn it_begins_anew_for_a_new_incarnation_and_when_told() {
    let database = Database::new().await;
    let mut shown = said(&database, "--all", "").await;
    persons(&database, 10).await;
    let half =
        "UPDATE person.republish SET after_id = (SELECT id FROM person.person ORDER BY id OFFSET 4 LIMIT 1),
                                            persons = 5, finished_at = NULL";
    shown += &said(&database, "--all", "").await;
    for (sql, arguments) in [
        ("SELECT", "--all"),
        ("SELECT", "--all --restart"),
        ("UPDATE outbox.source SET incarnation = 2", "--all"),
    ] {
        for sql in [half, sql] {
            sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&database.admin).await.unwrap();
        }
        shown += &said(&database, arguments, "").await;
    }
    insta::assert_snapshot!(shown);
}

/// Who fits no event is named and left out, and nobody else is.
#[tokio::test]
async fn a_person_too_large_for_an_event_is_left_out() {
    let database = Database::new().await;
    persons(&database, 5).await;
    sqlx::raw_sql(
        "INSERT INTO person.income (id, person_id, type, value)
         SELECT outbox.uuid7(), id, repeat('x', 1000), 1 FROM person.person, generate_series(1, 17000) WHERE cpf = 3",
    )
    .execute(&database.admin)
    .await
    .unwrap();
    let id: uuid::Uuid = sqlx::query_scalar("SELECT id FROM person.person WHERE cpf = 3")
        .fetch_one(&database.admin)
        .await
        .unwrap();
    let mut shown = said(&database, "--all", "").await;
    shown += &said(&database, &format!("--person {id}"), "").await;
    let versions: Vec<i64> = sqlx::query_scalar("SELECT version FROM person.person ORDER BY cpf")
        .fetch_all(&database.admin)
        .await
        .unwrap();
    assert_eq!(versions, [2, 2, 1, 2, 2]);
    insta::assert_snapshot!(Redactions::default().apply(&shown));
}
