//! The command line, and what the program says when it does not start.

use sqlx::{AssertSqlSafe, PgPool};

use crate::support::{Database, Program, answer, command, empty_database, finished, until};

#[tokio::test]
async fn help_names_every_setting() {
    let mut shown = String::new();
    for args in [
        &["--help"][..],
        &["run", "--help"],
        &["migrate", "--help"],
        &["republish", "--help"],
        &["health", "--help"],
    ] {
        let (code, out, error) = finished(command(args).env_remove("LOG_FORMAT")).await;
        assert_eq!((code, error.as_str()), (Some(0), ""));
        shown += &format!("$ person-api {}\n{out}\n", args.join(" "));
    }
    insta::assert_snapshot!(shown);
}

#[tokio::test]
async fn it_does_not_start_on_a_schema_that_is_missing_or_not_current() {
    let (url, mut conn) = empty_database().await;
    let mut shown = String::new();
    let mut run = async |when: &str| {
        let (code, _, error) =
            finished(command(&["run", "--listen", "127.0.0.1:0"]).env("DATABASE_URL", &url)).await;
        shown += &format!("{when}\nexit {code:?}: {error}\n\n");
    };
    run("an empty database").await;
    person_api::schema::migrator().run(&mut conn).await.unwrap();
    run("without the outbox").await;
    outbox::install(&mut conn, "person").await.unwrap();
    sqlx::raw_sql("DELETE FROM person.migration").execute(&mut conn).await.unwrap();
    run("a migration is missing").await;
    insta::assert_snapshot!(shown);
}

#[tokio::test]
async fn wrong_settings_are_named_and_never_shown() {
    let mut shown = String::new();
    for (when, url) in [
        ("no database", None),
        ("not a URL", Some("secret")),
        ("another scheme", Some("mysql://u:secret@h/d")),
    ] {
        let mut command = command(&["run", "--listen", "127.0.0.1:0"]);
        url.map(|url| command.env("DATABASE_URL", url));
        let (code, _, error) = finished(&mut command).await;
        shown += &format!("{when}\nexit {code:?}: {error}\n\n");
    }
    assert!(!shown.contains("secret"), "{shown}");
    insta::assert_snapshot!(shown);
}

#[tokio::test]
async fn migrate_creates_grants_and_can_be_repeated() {
    let (url, mut conn) = empty_database().await;
    let role = devstack::testing::Roles::of(&url).name("person_api");
    sqlx::query(AssertSqlSafe(format!("CREATE ROLE {role}"))).execute(&mut conn).await.unwrap();
    let mut shown = String::new();
    for args in
        [&["migrate"][..], &["migrate", "--grant-to", &role], &["migrate", "--grant-to", "nobody_there"]]
    {
        let (code, out, error) = finished(command(args).env("DATABASE_URL", &url)).await;
        shown += &format!("$ person-api {}\n{out}{error}\nexit {code:?}\n\n", args.join(" "));
    }
    insta::assert_snapshot!(shown.replace(&role, "person_api"));
    let granted: Vec<String> = sqlx::query_scalar(
        "SELECT table_name || ' ' || string_agg(privilege_type, ' ' ORDER BY privilege_type)
         FROM information_schema.role_table_grants
         WHERE grantee = $1 AND table_schema = 'person' GROUP BY table_name ORDER BY 1",
    )
    .bind(&role)
    .fetch_all(&mut conn)
    .await
    .unwrap();
    let all = "DELETE INSERT SELECT UPDATE";
    assert_eq!(
        granted,
        [
            format!("asset {all}"),
            format!("debt {all}"),
            format!("idempotency {all}"),
            format!("income {all}"),
            "migration SELECT".into(),
            format!("person {all}"),
            "republish INSERT SELECT UPDATE".into(),
        ]
    );
}

#[tokio::test]
async fn the_role_of_the_api_cannot_touch_positions_or_published_events() {
    let database = Database::new().await;
    let role = PgPool::connect(&database.url(None)).await.unwrap();
    for sql in [
        "INSERT INTO outbox.event (position, aggregate_type, aggregate_id, version, type, payload)
         VALUES (1, 'person', 'x', 1, 'person.new', '{}')",
        "SELECT nextval('outbox.position')",
        "SELECT setval('outbox.position', 1000)",
        "UPDATE outbox.event SET payload = '{}'",
        "DELETE FROM outbox.event",
        "TRUNCATE person.person",
        "CREATE TABLE person.mine ()",
    ] {
        let error = sqlx::query(AssertSqlSafe(sql)).execute(&role).await.expect_err(sql);
        assert_eq!(error.as_database_error().unwrap().code().unwrap(), "42501", "{sql}");
    }
}

#[tokio::test]
async fn health_and_metrics_of_the_running_program() {
    let database = Database::new().await;
    let program = Program::start(&database.url(None)).await;
    until("it is ready", async || program.get("/ready").await.contains("\"ready\":true")).await;
    let address = program.address.to_string();
    let (code, out, error) = finished(&mut command(&["health", "--listen", &address])).await;
    let identity = out.split_once("\"database\":\"").unwrap().1.split_once('"').unwrap().0;
    assert!(identity.len() == 16 && identity.bytes().all(|byte| byte.is_ascii_hexdigit()), "{out}");
    let out = out.replace(identity, "[digest]");
    let process = r#"{"process":{"database":"[digest]","program":"person-api"},"ready":true,"waiting":[]}"#;
    assert_eq!((code, out.trim_end(), &*error), (Some(0), process, ""));
    // None of them takes anything, and they say so.
    for path in ["/live", "/ready", "/metrics"] {
        let answer = program.post(path, "{}").await;
        assert!(answer.starts_with("HTTP/1.1 405 ") && answer.contains("\nallow: GET, HEAD\n"), "{answer}");
    }

    program.post("/person", r#"{"cpf": 11111, "name": "abc", "date_of_birth": "2019-06-15"}"#).await;
    program.post("/person/11111/debt", r#"{"value": 1}"#).await;
    program.get("/person/11111").await;
    program.get("/person/77777").await;
    program.get("/somewhere").await;
    let metrics = program.get("/metrics").await;
    let counts: Vec<&str> = {
        let mut lines: Vec<_> = metrics
            .lines()
            .filter(|line| line.starts_with("http_requests_total") && !line.contains("/ready"))
            .collect();
        lines.sort_unstable();
        lines
    };
    insta::assert_snapshot!(counts.join("\n"));
    assert!(metrics.contains(
        r#"http_request_duration_seconds_bucket{method="POST",route="/person/:cpf/debt",le="0.001"}"#
    ));
    assert!(!metrics.contains("11111") && !metrics.contains("77777"), "a cpf in a label");
}

#[tokio::test]
async fn it_looks_at_check_digits_when_told() {
    let database = Database::new().await;
    let program = Program::start_with(&database.url(None), &["--cpf-check", "strict"]).await;
    let person = |cpf: &str| format!(r#"{{"cpf": {cpf}, "name": "abc", "date_of_birth": "2019-06-15"}}"#);
    for (cpf, status) in [("11111", 422), ("52998224725", 201)] {
        let answer = program.post("/person", &person(cpf)).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
}

#[tokio::test]
async fn a_body_that_is_too_large_is_refused_also_in_chunks() {
    let database = Database::new().await;
    let program = Program::start(&database.url(None)).await;
    let before = database.rows().await;
    // Just over the limit, so that nothing is left unread when the answer comes.
    let chunk = format!("10001\r\n{}\r\n", " ".repeat(0x10001));
    let request = format!(
        "POST /person HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n\
         transfer-encoding: chunked\r\n\r\n{chunk}0\r\n\r\n"
    );
    insta::assert_snapshot!(answer(program.send(&request).await).await);
    assert_eq!(database.rows().await, before, "something was written");
}
