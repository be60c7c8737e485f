//! What our programs rely on is what they set themselves: with hostile defaults of the database and of every role
//! everything works, and what they cannot change themselves is named at `/ready`.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

mod support;

use std::time::Duration;

use devstack::{
    binary::find,
    folder::Folder,
    ports,
    program::Program,
    roles,
    servers::Setup,
    stack::Stack,
    testing::{DEADLINE, eventually},
};
use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use support::payload;
use tokio::{process::Command, task::JoinSet};
use tokio_util::sync::CancellationToken;

/// Defaults that somebody may have set for other programs, each the worst of its kind.
const HOSTILE: [(&str, &str); 18] = [
    ("standard_conforming_strings", "off"),
    ("search_path", "''"),
    ("DateStyle", "'SQL, DMY'"),
    ("IntervalStyle", "sql_standard"),
    ("TimeZone", "'Asia/Kathmandu'"),
    ("bytea_output", "escape"),
    ("extra_float_digits", "-5"),
    ("client_encoding", "LATIN1"),
    ("default_transaction_deferrable", "on"),
    ("lock_timeout", "'5ms'"),
    ("statement_timeout", "'3s'"),
    ("idle_session_timeout", "'400ms'"),
    ("idle_in_transaction_session_timeout", "'400ms'"),
    ("synchronous_commit", "off"),
    ("plan_cache_mode", "force_custom_plan"),
    ("enable_indexscan", "off"),
    ("jit_above_cost", "0"),
    ("xmloption", "document"),
];

/// Every program's role, and the superuser, who migrates.
const ROLES: [&str; 5] = ["postgres", "person_api", "outbox_relay", "score_projector", "score_api"];
/// Concurrent writes to one person.
const WRITES: usize = 40;

/// The servers, with the roles, and without a program.
async fn servers() -> Stack {
    let folder = Folder::temporary().unwrap();
    Box::pin(Stack::prepare(folder, Setup::QUIET)).await.unwrap_or_else(|error| panic!("{error:#}"))
}

/// The test's own connection has no limit of time, whatever the defaults.
async fn admin(stack: &Stack, database: &str) -> PgConnection {
    let url = format!("{}/{database}?options=-c%20statement_timeout%3D0", stack.servers.postgres.url());
    PgConnection::connect(&url).await.unwrap()
}

/// Of every role.
fn password(stack: &Stack) -> String {
    let url = stack.servers.postgres.url();
    let (login, _) = url.rsplit_once('@').unwrap();
    login.rsplit_once(':').unwrap().1.to_owned()
}

async fn run(conn: &mut PgConnection, sql: String) {
    let shown = sql.clone();
    conn.execute(AssertSqlSafe(sql)).await.unwrap_or_else(|error| panic!("{shown}: {error}"));
}

/// Two databases of these names whose schemas are made under `settings`, as defaults of the database and of each role.
async fn databases(stack: &Stack, names: [&str; 2], settings: &[(&str, &str)]) {
    let mut conn = admin(stack, "postgres").await;
    for name in names {
        run(&mut conn, format!("CREATE DATABASE {name}")).await;
        for (setting, value) in settings {
            run(&mut conn, format!("ALTER DATABASE {name} SET {setting} = {value}")).await;
            for role in ROLES {
                run(&mut conn, format!("ALTER ROLE {role} IN DATABASE {name} SET {setting} = {value}")).await;
            }
        }
    }
    let [person, score] = names.map(|name| format!("{}/{name}", stack.servers.postgres.url()));
    let commands: [(&Program, &[&str], &str); 4] = [
        (&stack.person_api, &["migrate"], &person),
        (&stack.person_relay, &["migrate", "--source", "person"], &person),
        (&stack.score_projector, &["migrate"], &score),
        (&stack.score_relay, &["migrate", "--source", "score"], &score),
    ];
    for (program, args, url) in commands {
        program.command(args, &[("DATABASE_URL", url)]).await.unwrap();
    }
    for name in names {
        let mut conn = admin(stack, name).await;
        roles::make(&mut conn, &[], &password(stack)).await.unwrap();
    }
}

async fn start(programs: &mut [Program]) {
    for program in &mut *programs {
        program.start().await.unwrap();
    }
    for program in programs {
        program.ready(DEADLINE).await.unwrap_or_else(|error| panic!("{error:#}"));
    }
}

async fn stop(programs: &mut [Program]) {
    for program in programs {
        program.stop(&CancellationToken::new()).await;
    }
}

/// A command of the relay: how it ended, and what it printed.
async fn relay(args: &[&str], url: &str) -> (bool, String) {
    let relay = find("outbox-relay").unwrap();
    let output = Command::new(relay).args(args).env("DATABASE_URL", url).output().await.unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

/// Concurrent writes to one person, each of which is accepted and arrives at the score.
async fn writes_arrive(person: &str, score: &str) {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let post = async |path: &str, body: String| {
        let request = client.post(format!("{person}{path}")).header("Content-Type", "application/json");
        request.body(body).send().await.unwrap()
    };
    assert_eq!(post("/person", payload("person")).await.status(), 201);
    let mut writes = JoinSet::new();
    for _ in 0..WRITES {
        let (client, url) = (client.clone(), format!("{person}/person/11111/income"));
        writes.spawn(async move {
            loop {
                let request = client.post(&url).header("Content-Type", "application/json");
                let response = request.body(payload("income")).send().await.unwrap();
                let (status, body) = (response.status().as_u16(), response.text().await.unwrap());
                // A limit of the service's own, and no failure of the database.
                if !body.contains("/problems/person-busy") {
                    return (status, body);
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
    }
    for (status, body) in writes.join_all().await {
        assert_eq!(status, 201, "{body}");
    }
    let sum = i64::try_from(WRITES).unwrap() * 20;
    eventually(&format!("the score {sum}"), async || {
        let response = client.get(format!("{score}/11111/score")).send().await.unwrap();
        let text = response.text().await.unwrap();
        let found: Value = serde_json::from_str(&text).unwrap();
        if found["score"].as_i64() == Some(sum) { Ok(()) } else { Err(text) }
    })
    .await;
    let item = client.get(format!("{person}/person/11111")).send().await.unwrap().text().await.unwrap();
    let item: Value = serde_json::from_str(&item).unwrap();
    assert_eq!(item["date_of_birth"], "2019-06-15T22:23:55+00:00", "{item}");
}

#[tokio::test]
async fn hostile_defaults_change_nothing() {
    let stack = servers().await;
    for isolation in ["repeatable read", "serializable"] {
        let number = isolation.len();
        let (person, score) = (format!("person_{number}"), format!("score_{number}"));
        let level = format!("'{isolation}'");
        let mut settings = HOSTILE.to_vec();
        settings.push(("default_transaction_isolation", level.as_str()));
        databases(&stack, [&person, &score], &settings).await;
        let vhost = "%2f";
        let [api, relay_of_person, projector, relay_of_score, reader] =
            stack.programs_on([&person, &score], vhost).unwrap();
        // So that partitions have to be made at once.
        let small = |relay: Program| relay.env("PARTITION_SIZE", "2000000");
        let mut programs = [api, small(relay_of_person), projector, small(relay_of_score), reader];
        start(&mut programs).await;
        writes_arrive(&programs[0].url(), &programs[4].url()).await;

        // Every partition has its bounds, and the relay has made some.
        let url = format!("{}/{person}", stack.servers.postgres.url());
        let mut conn = admin(&stack, &person).await;
        eventually("partitions ahead", async || {
            let ahead: (i64, i64) =
                sqlx::query_as("SELECT count(*), count(upper) FROM outbox.partition WHERE NOT is_default")
                    .fetch_one(&mut conn)
                    .await
                    .map_err(|error| error.to_string())?;
            if ahead.0 >= 3 && ahead.0 == ahead.1 { Ok(()) } else { Err(format!("{ahead:?}")) }
        })
        .await;
        let (healthy, said) = relay(&["doctor"], &url).await;
        assert!(healthy && said.contains("partitions reach up to position"), "{said}");
        let inbox = format!("{}/{score}", stack.servers.postgres.url());
        let digest = [("DATABASE_URL", &*url), ("INBOX_DATABASE_URL", &inbox)];
        programs[1].command(&["digest", "--consumer", "score"], &digest).await.unwrap();
        stop(&mut programs).await;
    }
    stack.stop(&CancellationToken::new()).await;
}

/// What a program cannot do is what it is not ready for, with a reason that says what to change; and it goes on by
/// itself.
#[tokio::test]
async fn what_the_database_refuses_is_named_at_ready() {
    let mut stack = servers().await;
    for program in stack.programs() {
        program.start().await.unwrap();
    }
    for program in stack.programs() {
        program.ready(DEADLINE).await.unwrap();
    }
    let person = format!("{}/person", stack.servers.postgres.url());
    let role = format!("{}/person", stack.servers.postgres.url_of("outbox_relay"));
    // Database, what is done, what undoes it, whose readiness (its place in the stack), what it says.
    let cases = [
        (
            "person",
            "ALTER ROLE person_api SET default_transaction_read_only = on",
            "ALTER ROLE person_api RESET default_transaction_read_only",
            0,
            "default_transaction_read_only is on",
        ),
        (
            "person",
            "ALTER DATABASE person SET default_transaction_read_only = on",
            "ALTER DATABASE person RESET default_transaction_read_only",
            1,
            "default_transaction_read_only is on",
        ),
        (
            "person",
            "ALTER TABLE person.person ENABLE ROW LEVEL SECURITY",
            "ALTER TABLE person.person DISABLE ROW LEVEL SECURITY",
            0,
            "row security is on for person.person",
        ),
        (
            "person",
            "ALTER TABLE outbox.event ENABLE ROW LEVEL SECURITY",
            "ALTER TABLE outbox.event DISABLE ROW LEVEL SECURITY",
            1,
            "row security",
        ),
        (
            "person",
            "REVOKE INSERT ON person.debt FROM person_api",
            "GRANT INSERT ON person.debt TO person_api",
            0,
            "the role person_api lacks the right INSERT on person.debt",
        ),
        (
            "score",
            "REVOKE SELECT ON score.entry FROM score_api",
            "GRANT SELECT ON score.entry TO score_api",
            4,
            "the role score_api lacks the right SELECT on score.entry",
        ),
    ];
    for (database, done, undone, place, expected) in cases {
        let mut conn = admin(&stack, database).await;
        run(&mut conn, "SET default_transaction_read_only = off".to_owned()).await;
        run(&mut conn, done.to_owned()).await;
        // A default is for sessions that begin after it.
        end_sessions(&mut conn).await;
        let program = &stack.programs()[place];
        eventually(&format!("{done}: {expected}"), async || match program.not_ready().await {
            Some(reason) if reason.contains(expected) => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
        if place == 1 {
            let (healthy, said) = relay(&["doctor"], &role).await;
            assert!(!healthy && said.contains("problem  "), "{said}");
            let (healthy, said) = relay(&["doctor"], &person).await;
            assert!(!healthy, "{said}");
        }
        run(&mut conn, undone.to_owned()).await;
        end_sessions(&mut conn).await;
        stack.programs()[place].ready(DEADLINE).await.unwrap();
    }
    writes_arrive(&stack.person_api.url(), &stack.score_api.url()).await;
    stack.stop(&CancellationToken::new()).await;
}

async fn end_sessions(conn: &mut PgConnection) {
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
               WHERE datname = current_database() AND pid <> pg_backend_pid() AND usename <> current_user";
    conn.execute(end).await.unwrap();
}

/// A pooler that keeps one session for one connection is as good as none.
#[tokio::test]
async fn a_pooler_in_session_mode_serves() {
    let stack = servers().await;
    let password = password(&stack);
    let (port, settings) = (ports::free(), ["pool_mode = session", "default_pool_size = 40"]);
    let postgres = &stack.servers.postgres;
    let pooler = postgres.pooler(stack.folder(), port, &settings, &ROLES[1..], &password).await.unwrap();
    let mut programs = stack.programs_on(["person", "score"], "%2f").unwrap();
    for (program, (role, database)) in programs.iter_mut().zip([
        ("person_api", "person"),
        ("outbox_relay", "person"),
        ("score_projector", "score"),
        ("outbox_relay", "score"),
        ("score_api", "score"),
    ]) {
        let url = format!("postgres://{role}:{password}@127.0.0.1:{port}/{database}");
        program.set_env("DATABASE_URL", &url);
    }
    start(&mut programs).await;
    writes_arrive(&programs[0].url(), &programs[4].url()).await;
    let (healthy, said) = relay(&["doctor"], programs[1].variable("DATABASE_URL").unwrap()).await;
    assert!(said.contains("each connection has a session of its own"), "{healthy} {said}");
    stop(&mut programs).await;
    drop(pooler);
    stack.stop(&CancellationToken::new()).await;
}
