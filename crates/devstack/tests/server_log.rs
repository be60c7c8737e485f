//! Nothing personal gets into PostgreSQL's log by a program's role, whatever fails and however much an operator has
//! the server log.

use std::process::Command;

use devstack::{binary::find, folder::Folder, postgres::Postgres};
use sqlx::{Connection, Executor, PgConnection};
use tokio_util::sync::CancellationToken;

/// As somebody has it who looks for what is wrong.
const SETTINGS: &[&str] = &[
    "shared_preload_libraries=auto_explain",
    "auto_explain.log_min_duration=0",
    "auto_explain.log_verbose=on",
    "log_min_duration_statement=0",
    "log_error_verbosity=verbose",
    "log_min_messages=debug1",
    "log_parameter_max_length_on_error=-1",
    "log_lock_waits=on",
    "deadlock_timeout=10ms",
];

const PASSWORD: &str = "secret";
const SECRETS: [&str; 4] = ["Brunhilde", "Rheingold", "Nibelungenhort", "918273645"];

/// What fails, by what it would show. `$1` is a personal text, and `$2` a number.
const FAILS: [(&str, &str); 12] = [
    ("the key of a unique violation", "INSERT INTO person.person (id, cpf, name, date_of_birth)
        SELECT gen_random_uuid(), $2, $1, now() FROM generate_series(1, 2)"),
    ("the row of a check", "INSERT INTO person.person (id, cpf, name, date_of_birth, status)
        VALUES (gen_random_uuid(), $2, $1, now(), $1)"),
    ("the row of a missing value", "INSERT INTO person.person (id, cpf, name, address, date_of_birth)
        VALUES (gen_random_uuid(), $2, $1, $1, NULL)"),
    ("the key of a foreign key", "INSERT INTO person.income (id, person_id, type, value)
        VALUES (gen_random_uuid(), ('00000000-0000-0000-0000-' || lpad($2::bigint::text, 12, '0'))::uuid, $1, $2)"),
    ("the number of a check", "INSERT INTO person.debt (id, person_id, value)
        VALUES (gen_random_uuid(), gen_random_uuid(), $2::bigint * -1) RETURNING $1"),
    ("a value that is no number", "SELECT $1::text::bigint + $2"),
    ("a value that is no id", "SELECT $1::text::uuid, $2"),
    ("a value that is no time", "SELECT $1::text::timestamptz, $2"),
    ("a value that is no JSON, and where it stands", "SELECT ('{\"name\": \"' || $1 || '\" ' || $2 || '}')::json"),
    ("JSON that no text can hold", "SELECT ('{\"name\": \"' || $1 || $2::bigint || '\\u0000\"}')::json ->> 'name'"),
    ("a value that is out of range", "SELECT ($2::bigint::text || $2::bigint::text || $2::bigint::text)::bigint, $1"),
    ("what a function of the database is given", "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
        VALUES ('person', 'x', $2::bigint * -1, 'person.new', to_json($1))"),
];

#[tokio::test]
async fn what_fails_or_is_slow_is_logged_without_what_is_personal() {
    let folder = Folder::temporary().unwrap();
    let port = devstack::ports::free();
    let mut server = Postgres::new(&folder, port, false).await.unwrap().with(SETTINGS);
    server.start().await.unwrap();
    let url = format!("{}/postgres", server.url());
    for (program, options) in [("person-api", &[][..]), ("outbox-relay", &["--source", "person"])] {
        let mut command = Command::new(find(program).unwrap());
        let output = command.arg("migrate").args(options).env("DATABASE_URL", &url).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let mut admin = PgConnection::connect(&url).await.unwrap();
    devstack::roles::make(&mut admin, &[], PASSWORD).await.unwrap();

    let (_, host) = url.rsplit_once('@').unwrap();
    let mut role = PgConnection::connect(&format!("postgres://person_api:{PASSWORD}@{host}")).await.unwrap();
    for (what, sql) in FAILS {
        let failed = sqlx::query(sql).bind("Brunhilde Rheingold Nibelungenhort").bind(918_273_645_i64);
        failed.execute(&mut role).await.expect_err(what);
    }
    role.execute("DO $$ BEGIN RAISE EXCEPTION 'nobody logs what a function says'; END $$").await.unwrap_err();
    // Slow ones, as a plan that was made for the value, and with it.
    sqlx::query(
        "INSERT INTO person.person (id, cpf, name, date_of_birth) VALUES (gen_random_uuid(), $2, $1, now())",
    )
    .bind("Brunhilde")
    .bind(918_273_645_i64)
    .execute(&mut role)
    .await
    .unwrap();
    for _ in 0..3 {
        sqlx::query("SELECT pg_sleep(0.01), cpf FROM person.person WHERE name = $1 AND cpf <> $2")
            .persistent(false)
            .bind("Brunhilde")
            .bind(1_i64)
            .execute(&mut role)
            .await
            .unwrap();
    }
    // A wait for a lock, with its context.
    let mut holder = admin.begin().await.unwrap();
    holder.execute("SELECT FROM person.person FOR UPDATE").await.unwrap();
    let waits = sqlx::query("UPDATE person.person SET name = $1 WHERE cpf = $2")
        .bind("Rheingold")
        .bind(918_273_645_i64);
    role.execute("SET lock_timeout = '200ms'").await.unwrap();
    waits.execute(&mut role).await.expect_err("it is locked");
    holder.rollback().await.unwrap();

    // Others are logged as the server is told, which also shows that this test would find it.
    admin.execute("SELECT 'Grimgerde'::bigint").await.unwrap_err();
    let fails = sqlx::query(FAILS[1].1).bind("Waltraute").bind(1_i64);
    fails.execute(&mut admin).await.unwrap_err();
    server.stop(&CancellationToken::new()).await;

    let log = std::fs::read_to_string(folder.path().join("log/postgres.log")).unwrap();
    for found in [
        "invalid input syntax for type bigint: \"Grimgerde\"",
        "Waltraute",
        "FROM person.person WHERE name = $1",
    ] {
        assert!(log.contains(found), "the log has {found}: {log}");
    }
    assert!(log.contains("still waiting for"), "what the server says of itself is logged: {log}");
    for secret in SECRETS {
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(secret)).collect();
        assert!(lines.is_empty(), "the log has {secret}: {lines:#?}");
    }
}
