//! Starting, waiting and ending.

use std::time::Duration;

use tokio::{io::AsyncReadExt, io::AsyncWriteExt, net::TcpStream};

use crate::support::{DEADLINE, Database, Program, Wire, command};

/// Runs to its end: exit code, standard output and error.
async fn output(arguments: &[&str], environment: &[(&str, &str)]) -> String {
    let run = command(arguments).envs(environment.iter().copied()).output();
    let output = tokio::time::timeout(DEADLINE, run).await.expect("it ends").unwrap();
    let code = output.status.code().expect("an exit code");
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (out, error) = (text(output.stdout), text(output.stderr));
    // The log has times in it; the last word counts.
    let error: Vec<_> = error.lines().filter(|line| !line.starts_with('{')).collect();
    format!("exit code {code}\n{out}{}", error.join("\n"))
}

#[tokio::test]
async fn help() {
    insta::assert_snapshot!("help", output(&["--help"], &[]).await);
    insta::assert_snapshot!("help_run", output(&["run", "--help"], &[]).await);
    insta::assert_snapshot!("help_health", output(&["health", "--help"], &[]).await);
}

#[tokio::test]
async fn bad_settings_are_named() {
    let run = ["run", "--listen", "127.0.0.1:0"];
    insta::assert_snapshot!(output(&run, &[]).await, @r"
    exit code 2
    score-api: DATABASE_URL (or DATABASE_URL_FILE): is not set; it should look like postgres://user:password@host:5432/database
    ");
    let secret = [("DATABASE_URL", "mysql://root:secret@db/score")];
    let refused = output(&run, &secret).await;
    assert!(refused.starts_with("exit code 2\nscore-api: DATABASE_URL: "), "{refused}");
    assert!(!refused.contains("secret"), "{refused}");
    let database = [("DATABASE_URL", "postgres://127.0.0.1:1/score")];
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = listener.local_addr().unwrap().to_string();
    let refused = output(&["run", "--listen", &taken], &database).await.replace(&taken, "[taken]");
    insta::assert_snapshot!(refused, @r"
    exit code 1
    score-api: LISTEN: cannot listen on [taken]: Address already in use (os error 98)
    ");
    insta::assert_snapshot!(output(&["run", "--listen", "everywhere"], &database).await, @r"
    exit code 2
    error: invalid value 'everywhere' for '--listen <ADDRESS>': invalid socket address syntax

    For more information, try '--help'.
    ");
}

#[tokio::test]
async fn a_schema_that_is_not_there_ends_it_with_the_command_that_helps() {
    let mut database = Database::empty().await;
    let run = ["run", "--listen", "127.0.0.1:0"];
    let url = database.url();
    let environment = [("DATABASE_URL", url.as_str())];
    insta::assert_snapshot!(output(&run, &environment).await, @r"
    exit code 1
    score-api: the task readiness failed: the schema score is missing in this database; run: score-projector migrate
    ");

    database.migrate().await;
    insta::assert_snapshot!(output(&run, &environment).await, @r"
    exit code 1
    score-api: the task readiness failed: this role may not read score.migration; connect as a role that may, or run: score-projector migrate, with the option that grants it
    ");

    database.grant().await;
    sqlx::query("UPDATE score.migration SET success = false").execute(&mut database.admin).await.unwrap();
    insta::assert_snapshot!(output(&run, &environment).await, @r"
    exit code 1
    score-api: the task readiness failed: the schema score is not current in this database; run: score-projector migrate
    ");

    sqlx::query("UPDATE score.migration SET success = true, checksum = ''")
        .execute(&mut database.admin)
        .await
        .unwrap();
    insta::assert_snapshot!(output(&run, &environment).await, @r"
    exit code 1
    score-api: the task readiness failed: migration 1 of the schema score is not the one this program was built with; the database belongs to another build, or a migration was edited after it landed
    ");
}

#[tokio::test]
async fn it_starts_without_its_database_and_survives_its_absence() {
    let mut database = Database::migrated().await;
    database.person(11111, 1, 1, 4, "4970").await;
    let mut wire = Wire::to(&database).await;
    wire.cut().await;

    let program = Program::start(&database.url_through(&wire.address.to_string())).await;
    assert_eq!(program.get("/live").await.status, 200);
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

    wire.mend().await;
    program.until_ready().await;
    assert_eq!(program.get("/11111/score").await.status, 200);
    let listen = program.address.to_string();
    let health = output(&["health", "--listen", &listen], &[]).await;
    insta::with_settings!({filters => vec![(r#""database":"[0-9a-f]{16}""#, r#""database":"[digest]""#)]}, {
        insta::assert_snapshot!(health, @r#"
    exit code 0
    {"process":{"database":"[digest]","program":"score-api"},"ready":true,"waiting":[]}
    "#);
    });

    wire.cut().await;
    assert_eq!(program.get("/11111/score").await.status, 503);
    program.until("/ready", 503).await;
    // First it may be the connection that it had.
    while !program.get("/ready").await.body.contains("no connection in time") {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let health = output(&["health", "--listen", &listen], &[]).await;
    let filters = vec![
        (r#""seconds":\d+"#, r#""seconds":[n]"#),
        (r#""database":"[0-9a-f]{16}""#, r#""database":"[digest]""#),
    ];
    insta::with_settings!({filters => filters}, {
        insta::assert_snapshot!(health, @r#"
        exit code 1
        score-api: not ready: {"process":{"database":"[digest]","program":"score-api"},"ready":false,"waiting":[{"part":"database","reason":"the database does not answer: no connection in time","seconds":[n]}]}
        "#);
    });

    wire.mend().await;
    program.until_ready().await;
    assert_eq!(program.get("/11111/score").await.status, 200);
}

#[tokio::test]
async fn sigterm_does_not_wait_for_a_database_that_is_away() {
    let database = Database::migrated().await;
    let mut wire = Wire::to(&database).await;
    wire.cut().await;
    // In its first look at the database, which lasts as long as the pool waits for a connection.
    let mut program = Program::start(&database.url_through(&wire.address.to_string())).await;
    program.signal();
    assert_eq!(program.ended().await.code(), Some(0));
    // If the end waited for the look, the look would say that it was in vain.
    let log = program.log().await;
    let messages: Vec<_> = log.iter().filter_map(|line| line["message"].as_str()).collect();
    let (_, since) =
        messages.split_at(messages.iter().position(|message| message.starts_with("draining")).unwrap());
    assert!(!since.contains(&"waiting"), "{since:?}");
}

#[tokio::test]
async fn sigterm_ends_it_at_once_when_nothing_is_under_way() {
    let database = Database::migrated().await;
    // A connection that is kept open without a request must not hold the end back. Nothing else ends it for an hour.
    let mut program =
        Program::ready_with(&database.url(), &["--drain-timeout", "1h", "--idle-timeout", "1h"]).await;
    let mut idle = TcpStream::connect(program.address).await.unwrap();
    idle.write_all(b"GET /live HTTP/1.1\r\nHost: score.localhost\r\n\r\n").await.unwrap();
    assert_ne!(idle.read(&mut [0; 1024]).await.unwrap(), 0);

    program.signal();
    assert_eq!(program.ended().await.code(), Some(0));
    let listen = program.address.to_string();
    let health = output(&["health", "--listen", &listen], &[]).await;
    assert!(
        health.starts_with("exit code 1\nscore-api: no program responds at http://127.0.0.1:"),
        "{health}"
    );
}

#[tokio::test]
async fn sigterm_lets_a_request_end() {
    use sqlx::Connection;
    let mut database = Database::migrated().await;
    database.person(11111, 1, 1, 4, "4970").await;
    let mut program = Program::ready(&database.url()).await;
    let mut waits = sqlx::PgConnection::connect_with(&database.options).await.unwrap();
    let mut lock = database.admin.begin().await.unwrap();
    sqlx::query("LOCK TABLE score.person IN ACCESS EXCLUSIVE MODE").execute(&mut *lock).await.unwrap();

    let mut request = TcpStream::connect(program.address).await.unwrap();
    request.write_all(b"GET /11111/score HTTP/1.1\r\nHost: score.localhost\r\n\r\n").await.unwrap();
    let blocked = "SELECT count(*) FROM pg_stat_activity
                   WHERE datname = current_database() AND usename = $1 AND wait_event_type = 'Lock'";
    while sqlx::query_scalar::<_, i64>(blocked).bind(&database.role).fetch_one(&mut waits).await.unwrap() == 0
    {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    program.signal();
    // It takes nothing new any more, and so has heard the signal.
    while TcpStream::connect(program.address).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    lock.rollback().await.unwrap();
    let mut answer = String::new();
    request.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    assert_eq!(program.ended().await.code(), Some(0));
}
