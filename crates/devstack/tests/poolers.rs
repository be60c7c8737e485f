//! `PgBouncer` between the programs and PostgreSQL, for real: the one of the server's Debian (1.18 beside PostgreSQL 15, 1.24 beside 17). In transaction mode, writers of all three ways and person-api
//! work, in few sessions that they share; the other programs and every command refuse, at once, and leave nothing behind in
//! the sessions of others.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

mod support;

use std::time::Duration;

use devstack::{
    binary::find,
    ports,
    stack::Stack,
    testing::{DEADLINE, eventually},
};
use outbox::Event;
use serde_json::json;
use sqlx::{
    Connection, Executor, PgConnection, PgPool, Postgres, Transaction,
    postgres::{PgArguments, PgConnectOptions, PgPoolOptions},
    query::Query,
};
use support::stack;
use tokio::{process::Command, task::JoinSet};
use tokio_util::sync::CancellationToken;

/// Fewer sessions than there are connections, so that each transaction may get another one.
const SESSIONS: &str = "default_pool_size = 4";
const SHARED: &str = "pool_mode = transaction";
/// Hands out the session that was not used for the longest time, instead of the one that was used last.
const IN_TURN: &str = "server_round_robin = 1";
/// Writers at a time, transactions of each, and aggregates of each way.
const WRITERS: i64 = 8;
const TRANSACTIONS: i64 = 15;
const AGGREGATES: i64 = 5;
const WORDS: &str = "there is a pooler that does not keep one session for one connection";

/// Tables of a service of each way.
const SHOP: &str = "
CREATE SCHEMA shop;
CREATE TABLE shop.captured (id bigint PRIMARY KEY, n bigint NOT NULL);
CREATE TABLE shop.published (LIKE shop.captured INCLUDING ALL);
CREATE TABLE shop.inserted (id bigint PRIMARY KEY, version bigint NOT NULL);
SELECT outbox.capture('shop.captured', 'captured');
GRANT CONNECT ON DATABASE person TO writer;
GRANT USAGE ON SCHEMA shop TO writer;
GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA shop TO writer;
SELECT outbox.grant_writer('writer')";

/// Aggregates whose versions are not 1, 2, 3, … in the order of their positions.
const WRONG: &str = "
SELECT count(*) FROM (
    SELECT version, row_number() OVER (PARTITION BY aggregate_type, aggregate_id ORDER BY position) AS n
    FROM outbox.event) e
WHERE version <> n";

fn password(stack: &Stack) -> String {
    let url = stack.servers.postgres.url();
    let (login, _) = url.rsplit_once('@').unwrap();
    login.rsplit_once(':').unwrap().1.to_owned()
}

/// Without the parameter that `PgBouncer` refuses by default.
fn plain(url: &str) -> PgConnectOptions {
    url.parse::<PgConnectOptions>().unwrap().extra_float_digits(None)
}

async fn admin(stack: &Stack) -> PgConnection {
    PgConnection::connect(&format!("{}/person", stack.servers.postgres.url())).await.unwrap()
}

#[tokio::test]
async fn writers_of_all_three_ways_and_person_api_share_sessions() {
    let mut stack = stack().await;
    let (password, mut admin) = (password(&stack), admin(&stack).await);
    admin.execute("CREATE ROLE writer LOGIN").await.unwrap();
    admin.execute(sqlx::AssertSqlSafe(format!("ALTER ROLE writer PASSWORD '{password}'"))).await.unwrap();
    admin.execute(SHOP).await.unwrap();
    let postgres = &stack.servers.postgres;
    // From 1.21 on it can repeat in one session what a client has prepared in another.
    let knows_prepared = postgres.pooler_release().unwrap() >= (1, 21);
    let mut settings = vec![SHARED, SESSIONS, IN_TURN];
    if knows_prepared {
        settings.push("max_prepared_statements = 10");
    }
    let (port, users) = (ports::free(), ["writer", "person_api"]);
    let pooler = postgres.pooler(stack.folder(), port, &settings, &users, &password).await.unwrap();
    let url = |role: &str| format!("postgres://{role}:{password}@127.0.0.1:{port}/person");

    // Two processes, which share sessions with each other.
    let [mut second, ..] = stack.programs_on(["person", "score"], "%2f").unwrap();
    stack.person_api.stop(&CancellationToken::new()).await;
    for program in [&mut stack.person_api, &mut second] {
        program.set_env("DATABASE_URL", &url("person_api"));
        program.start().await.unwrap();
        program.ready(DEADLINE).await.unwrap_or_else(|error| panic!("{error:#}"));
    }
    let writers = PgPoolOptions::new().max_connections(8).connect_with(plain(&url("writer"))).await.unwrap();
    let mut styles = vec![false];
    if knows_prepared {
        styles.push(true);
    }
    for prepared in styles.clone() {
        let mut tasks = JoinSet::new();
        for writer in 0..WRITERS {
            tasks.spawn(write(writers.clone(), writer, prepared));
        }
        for person in 1..=AGGREGATES {
            let apis = [stack.person_api.url(), second.url()];
            tasks.spawn(use_person_api(apis, if prepared { 200 } else { 100 } + person));
        }
        tasks.join_all().await;
    }
    writers.close().await;

    let expected = WRITERS * TRANSACTIONS * i64::try_from(styles.len()).unwrap();
    for way in ["captured", "published", "inserted"] {
        let count = sqlx::query_scalar("SELECT count(*) FROM outbox.event WHERE aggregate_type = $1");
        let events: i64 = count.bind(way).fetch_one(&mut admin).await.unwrap();
        assert_eq!(events, expected, "events of the way {way}");
    }
    let wrong: i64 = sqlx::query_scalar(WRONG).fetch_one(&mut admin).await.unwrap();
    assert_eq!(wrong, 0, "versions out of order");
    eventually("everything is published", async || {
        let behind = "SELECT (SELECT max(position) FROM outbox.event) - (SELECT low_water FROM outbox.relay)";
        let behind: i64 = sqlx::query_scalar(behind).fetch_one(&mut admin).await.unwrap();
        if behind <= 0 { Ok(()) } else { Err(behind.to_string()) }
    })
    .await;
    // Of the settings that person-api needs, none is left in a session, and others see their own.
    for role in users {
        let mut other = PgConnection::connect_with(&plain(&url(role))).await.unwrap();
        for _ in 0..8 {
            let set = "SELECT name || ' = ' || setting FROM pg_settings
                       WHERE source = 'session' AND name IN ('search_path', 'row_security', 'statement_timeout', 'jit',
                             'enable_seqscan', 'plan_cache_mode', 'lock_timeout') LIMIT 1";
            let left = sqlx::raw_sql(set).fetch_optional(&mut other).await.unwrap();
            assert!(left.is_none(), "{role}: {left:?}");
        }
    }
    for program in [&mut stack.person_api, &mut second] {
        program.stop(&CancellationToken::new()).await;
    }
    drop(pooler);
    stack.stop(&CancellationToken::new()).await;
}

/// A statement of the writer's own. The library's follow.
fn query(sql: &'static str, prepared: bool) -> Query<'static, Postgres, PgArguments> {
    sqlx::query(sql).persistent(prepared)
}

async fn write(pool: PgPool, writer: i64, prepared: bool) {
    for n in 0..TRANSACTIONS {
        let id = (writer + n) % AGGREGATES;
        let mut tx = pool.begin().await.unwrap();
        let captured = "INSERT INTO shop.captured VALUES ($1, 1)
                        ON CONFLICT (id) DO UPDATE SET n = captured.n + 1";
        query(captured, prepared).bind(id).execute(&mut *tx).await.unwrap();
        tx.commit().await.unwrap();

        let mut tx = pool.begin().await.unwrap();
        let published = "INSERT INTO shop.published VALUES ($1, 1)
                         ON CONFLICT (id) DO UPDATE SET n = published.n + 1";
        query(published, prepared).bind(id).execute(&mut *tx).await.unwrap();
        let event = Event::new("published.changed", "published", id.to_string(), &json!({"n": n}));
        outbox::publish(&mut tx, event).await.unwrap();
        tx.commit().await.unwrap();

        let mut tx = pool.begin().await.unwrap();
        insert(&mut tx, id, prepared).await;
        tx.commit().await.unwrap();
    }
}

async fn insert(tx: &mut Transaction<'_, Postgres>, id: i64, prepared: bool) {
    let raise = "INSERT INTO shop.inserted VALUES ($1, 1)
                 ON CONFLICT (id) DO UPDATE SET version = inserted.version + 1";
    query(raise, prepared).bind(id).execute(&mut **tx).await.unwrap();
    let insert = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                  SELECT 'inserted', id::text, version, 'inserted.changed', '{}' FROM shop.inserted WHERE id = $1";
    query(insert, prepared).bind(id).execute(&mut **tx).await.unwrap();
}

/// Every kind of request, some to each process.
async fn use_person_api(apis: [String; 2], cpf: i64) {
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(20)).build().unwrap();
    let send = async |n: usize, method: reqwest::Method, path: &str, body: serde_json::Value, key: &str| {
        let request = client.request(method, format!("{}{path}", apis[n % 2]));
        let request = if body.is_null() { request } else { request.json(&body) };
        let response = request.header("Idempotency-Key", key).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    };
    let (get, post) = (reqwest::Method::GET, reqwest::Method::POST);
    let none = serde_json::Value::Null;
    let person = json!({"cpf": cpf, "name": "a", "date_of_birth": "1990-01-01T00:00:00Z"});
    for n in 0..2 {
        // The second is a repetition, which gets the stored response from the other process.
        let key = format!("person-{cpf}");
        let (status, body) = send(n, post.clone(), "/person", person.clone(), &key).await;
        assert_eq!(status, 201, "{body}");
    }
    let path = format!("/person/{cpf}");
    for n in 0..6 {
        let (status, body) =
            send(n, post.clone(), &format!("{path}/debt"), json!({"value": 40}), &format!("debt-{n}")).await;
        assert_eq!(status, 201, "{body}");
        let (status, body) = send(n + 1, get.clone(), &path, none.clone(), "read").await;
        assert_eq!((status, body.matches("\"value\"").count()), (200, n + 1), "{body}");
    }
    let (status, body) = send(0, reqwest::Method::PATCH, &path, json!({"name": "b"}), "patch").await;
    assert_eq!(status, 200, "{body}");
    let (status, body) = send(1, get.clone(), &format!("{path}/debt"), none.clone(), "read").await;
    assert_eq!(status, 200, "{body}");
    if cpf % 2 == 0 {
        let (status, body) = send(1, reqwest::Method::DELETE, &path, none.clone(), "delete").await;
        assert_eq!(status, 200, "{body}");
        assert_eq!(send(0, get, &path, none, "read").await.0, 404);
    }
}

/// The name of a pooler, and of its host, says nothing about it.
#[tokio::test]
async fn what_needs_a_session_refuses_at_once_and_leaves_nothing_behind() {
    let stack = stack().await;
    let password = password(&stack);
    let users = ["outbox_relay", "score_projector", "score_api", "postgres"];
    for settings in [vec![SHARED], vec![SHARED, IN_TURN, SESSIONS], vec![SHARED, "default_pool_size = 1"]] {
        let port = ports::free();
        let pooler =
            stack.servers.postgres.pooler(stack.folder(), port, &settings, &users, &password).await.unwrap();
        let url =
            |role: &str, database: &str| format!("postgres://{role}:{password}@127.0.0.1:{port}/{database}");
        // Other clients of the pooler, which may have any of its sessions at any time.
        let others: Vec<_> = users.map(|role| tokio::spawn(others(url(role, "person")))).into();

        let mut programs = stack.programs_on(["person", "score"], "%2f").unwrap();
        for (place, role, database) in
            [(1, "outbox_relay", "person"), (2, "score_projector", "score"), (4, "score_api", "score")]
        {
            let program = &mut programs[place];
            program.set_env("DATABASE_URL", &url(role, database));
            program.start().await.unwrap();
            eventually("it ends", async || match program.ended() {
                Some(words) if words.contains("exit status: 1") && words.contains(WORDS) => Ok(()),
                other => Err(format!("{settings:?}, {role}: {other:?}")),
            })
            .await;
        }
        for (program, args, role, database) in [
            ("outbox-relay", &["doctor"][..], "outbox_relay", "person"),
            ("outbox-relay", &["status"], "outbox_relay", "person"),
            ("outbox-relay", &["migrate", "--source", "person"], "postgres", "person"),
            ("person-api", &["migrate"], "postgres", "person"),
            ("score-projector", &["migrate"], "postgres", "score"),
        ] {
            let output = Command::new(find(program).unwrap())
                .args(args)
                .env("DATABASE_URL", url(role, database))
                .env("AMQP_URL", &stack.addresses().amqp_url)
                .output()
                .await
                .unwrap();
            let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            assert!(!output.status.success() && said.contains(WORDS), "{program} {args:?}: {said}");
        }
        for other in others {
            other.abort();
            let _aborted = other.await;
        }
        let mut other = PgConnection::connect_with(&plain(&url("outbox_relay", "person"))).await.unwrap();
        for _ in 0..8 {
            let path: String = read(&mut other, "SHOW search_path").await;
            assert_eq!(path, "\"$user\", public", "{settings:?}");
        }
        drop(pooler);
    }
    stack.stop(&CancellationToken::new()).await;
}

async fn read(conn: &mut PgConnection, sql: &'static str) -> String {
    use sqlx::Row;
    sqlx::raw_sql(sql).fetch_one(conn).await.unwrap().get(0)
}

/// Short transactions without end.
async fn others(url: String) {
    let Ok(mut conn) = PgConnection::connect_with(&plain(&url)).await else { return };
    while conn.execute("SELECT pg_sleep(0.001)").await.is_ok() {}
}
