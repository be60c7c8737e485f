//! The promises of the writing side, over real PostgreSQL: what is appended, in which order, by whom.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::{collections::BTreeSet, time::Duration};

use chrono::{DateTime, Utc};
use devstack::testing::until;
use outbox::{AppendError, CHANNEL, NewEvent, Source, Waker, append, install, migrator, source};
use serde_json::{json, value::RawValue};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool, postgres::PgListener};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

const LIMIT: Duration = devstack::testing::DEADLINE;

/// A database with the outbox of the source `test`.
async fn database() -> PgPool {
    let pool = PgPool::connect(&devstack::testing::database("outbox").await).await.unwrap();
    install(&mut pool.acquire().await.unwrap(), "test").await.unwrap();
    pool
}

fn event(aggregate: &str, version: i64) -> NewEvent {
    NewEvent {
        id: Uuid::now_v7(),
        aggregate_type: "thing".into(),
        aggregate_id: aggregate.to_owned(),
        version,
        type_: "thing.changed".into(),
        payload: RawValue::from_string(format!(r#"{{"version":{version}}}"#)).unwrap(),
        headers: None,
    }
}

async fn count(pool: &PgPool) -> i64 {
    sqlx::query_scalar("SELECT count(*) FROM outbox.event").fetch_one(pool).await.unwrap()
}

#[tokio::test]
async fn events_are_appended_in_their_order_and_byte_for_byte() {
    let pool = database().await;
    let mut events: Vec<NewEvent> = (1..=200).map(|version| event("a", version)).collect();
    // Spaces, a repeated name, an escape, digits beyond a float: as written, so forwarded.
    let bytes = r#"{ "a" : 1.10,"a":123456789012345.6789, "b": "\u0000é" }"#;
    events[1].payload = RawValue::from_string(bytes.to_owned()).unwrap();
    events[1].headers = json!({"traceparent": "00-1-2-03", "baseline": true}).as_object().cloned();
    let mut tx = pool.begin().await.unwrap();
    append(&mut tx, &[]).await.unwrap();
    append(&mut tx, &events).await.unwrap();
    assert_eq!(count(&pool).await, 0, "nobody sees it before the commit");
    tx.commit().await.unwrap();

    let stored: Vec<(i64, Uuid, i64)> =
        sqlx::query_as("SELECT position, id, version FROM outbox.event ORDER BY position")
            .fetch_all(&pool)
            .await
            .unwrap();
    let sent: Vec<(i64, Uuid, i64)> =
        (1..).zip(&events).map(|(n, event)| (n, event.id, event.version)).collect();
    assert_eq!(stored, sent);
    let row: String = sqlx::query_scalar(
        "SELECT concat_ws(' | ', position, aggregate_type, aggregate_id, version, type, payload, headers)
         FROM outbox.event WHERE version = 2",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    insta::assert_snapshot!(row, @r#"2 | thing | a | 2 | thing.changed | { "a" : 1.10,"a":123456789012345.6789, "b": "\u0000é" } | {"baseline": true, "traceparent": "00-1-2-03"}"#);
}

#[tokio::test]
async fn a_rollback_takes_the_events_back_and_leaves_a_gap() {
    let pool = database().await;
    let mut tx = pool.begin().await.unwrap();
    append(&mut tx, &[event("a", 1), event("a", 2)]).await.unwrap();
    tx.rollback().await.unwrap();
    let mut tx = pool.begin().await.unwrap();
    append(&mut tx, &[event("a", 1)]).await.unwrap();
    tx.commit().await.unwrap();
    let positions: Vec<i64> =
        sqlx::query_scalar("SELECT position FROM outbox.event").fetch_all(&pool).await.unwrap();
    assert_eq!(positions, [3]);
}

#[tokio::test]
async fn a_version_cannot_be_taken_twice() {
    let pool = database().await;
    let mut tx = pool.begin().await.unwrap();
    append(&mut tx, &[event("a", 1), event("b", 1)]).await.unwrap();
    tx.commit().await.unwrap();
    let mut tx = pool.begin().await.unwrap();
    let error = append(&mut tx, &[event("c", 1), event("a", 1)]).await.unwrap_err();
    assert!(matches!(error, AppendError::VersionTaken(_)), "{error}");
    tx.rollback().await.unwrap();
    assert_eq!(count(&pool).await, 2);
}

#[tokio::test]
async fn the_schema_refuses_what_no_message_could_carry() {
    let pool = database().await;
    let mut long = event("a", 1);
    long.aggregate_id = "é".repeat(128);
    let mut refused = Vec::new();
    for (name, bad) in [("256 bytes of an id", long), ("no id", event("", 1)), ("version 0", event("a", 0))] {
        let mut tx = pool.begin().await.unwrap();
        let AppendError::Database(error) = append(&mut tx, &[bad]).await.unwrap_err() else {
            panic!("{name}")
        };
        refused.push(format!("{name}: {}", error.as_database_error().unwrap().constraint().unwrap()));
    }
    let headers = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers)
                   VALUES ('thing', 'a', 1, 'thing.changed', '{}', '[1]')";
    let error = sqlx::query(headers).execute(&pool).await.unwrap_err();
    refused
        .push(format!("headers in an array: {}", error.as_database_error().unwrap().constraint().unwrap()));
    // What is too large for a broker is too large for the outbox, whoever writes it.
    for (name, column, value) in [
        ("a body of 16 MiB", "payload", "to_json(repeat('a', 16777216))"),
        ("headers of 64 KiB", "headers", "jsonb_build_object('a', repeat('a', 65536))"),
    ] {
        let payload = if column == "payload" { "" } else { ", payload" };
        let empty = if column == "payload" { "" } else { ", '{}'" };
        let sql = format!(
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, {column}{payload})
             VALUES ('thing', 'a', 1, 'thing.changed', {value}{empty})"
        );
        let error = sqlx::query(AssertSqlSafe(sql)).execute(&pool).await.unwrap_err();
        refused.push(format!("{name}: {}", error.as_database_error().unwrap().constraint().unwrap()));
    }
    assert_eq!(count(&pool).await, 0);
    insta::assert_snapshot!(refused.join("\n"), @r"
    256 bytes of an id: event_aggregate_id_check
    no id: event_aggregate_id_check
    version 0: event_version_check
    headers in an array: event_headers_check
    a body of 16 MiB: event_payload_size
    headers of 64 KiB: event_headers_size
    ");
}

/// The writer learns of it before anything was sent, in words, and its transaction is as good as before.
#[tokio::test]
async fn append_refuses_what_no_message_could_carry() {
    let pool = database().await;
    let headers = |name: &str, bytes: usize| {
        Some(serde_json::Map::from_iter([(name.to_owned(), json!("a".repeat(bytes)))]))
    };
    let (mut body, mut large, mut key) = (event("a", 1), event("a", 1), event("a", 1));
    body.payload = RawValue::from_string(format!("{:?}", "a".repeat(16 * 1024 * 1024))).unwrap();
    large.headers = headers("a", 64 * 1024);
    key.headers = headers("BCC", 1);
    let mut tx = pool.begin().await.unwrap();
    let mut said = Vec::new();
    for bad in [body, large, key] {
        let id = bad.id.to_string();
        let error = append(&mut tx, &[event("b", 1), bad]).await.unwrap_err();
        said.push(error.to_string().replace(&id, "ID"));
    }
    append(&mut tx, &[event("a", 1)]).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(count(&pool).await, 1);
    insta::assert_snapshot!(said.join("\n"), @r"
    event ID of type thing.changed cannot be published: its body has 16777218 bytes, and at most 16777216 are allowed
    event ID of type thing.changed cannot be published: its headers have 65544 bytes, and at most 65536 are allowed
    event ID of type thing.changed cannot be published: it has a header named BCC, which RabbitMQ takes for more routing keys
    ");
}

#[tokio::test]
async fn a_source_is_named_once_for_good() {
    let mut conn = PgConnection::connect(&devstack::testing::database("outbox").await).await.unwrap();
    let mut said = Vec::new();
    for name in ["", "Person", "1st", "a b", "é", &"a".repeat(64)] {
        said.push(install(&mut conn, name).await.unwrap_err().to_string());
    }
    migrator().run(&mut conn).await.unwrap();
    said.push(source(&mut conn).await.unwrap_err().to_string());
    for name in ["person", "person"] {
        let stored = install(&mut conn, name).await.unwrap();
        let expected =
            Source { name: "person".to_owned(), incarnation: 1, parent: None, began_at_position: 0 };
        assert_eq!(stored, expected);
    }
    said.push(install(&mut conn, "score").await.unwrap_err().to_string());
    said.push(source(&mut conn).await.unwrap().to_string());
    sqlx::query("UPDATE outbox.source SET incarnation = 2").execute(&mut conn).await.unwrap();
    said.push(install(&mut conn, "person").await.unwrap().to_string());
    insta::assert_snapshot!(said.join("\n"));
}

#[tokio::test]
async fn several_programs_may_install_it_at_once() {
    let url = devstack::testing::database("outbox").await;
    let one = async || {
        let mut conn = PgConnection::connect(&url).await.unwrap();
        install(&mut conn, "person").await.map(|source| source.to_string()).map_err(|error| error.to_string())
    };
    let (a, b, c) = timeout(LIMIT, async { tokio::join!(one(), one(), one()) }).await.unwrap();
    for result in [a, b, c] {
        assert_eq!(result, Ok("person".to_owned()));
    }
}

const HOLDERS: &str =
    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND mode = 'ShareLock'
    AND (classid::bigint, objid::bigint, objsubid) = (1869968482, 1, 2)
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";

#[tokio::test]
async fn who_has_a_position_holds_the_lock_until_the_end() {
    let pool = database().await;
    let holders = async || sqlx::query_scalar::<_, i64>(HOLDERS).fetch_one(&pool).await.unwrap();
    let mut committed = pool.begin().await.unwrap();
    append(&mut committed, &[event("a", 1), event("a", 2)]).await.unwrap();
    let mut rolled_back = pool.begin().await.unwrap();
    append(&mut rolled_back, &[event("b", 1)]).await.unwrap();
    assert_eq!(holders().await, 2, "shared: writers do not wait for each other");
    committed.commit().await.unwrap();
    assert_eq!(holders().await, 1);
    rolled_back.rollback().await.unwrap();
    assert_eq!(holders().await, 0);
}

#[tokio::test]
async fn the_lock_comes_before_the_position() {
    let pool = database().await;
    let mut holder = pool.begin().await.unwrap();
    sqlx::query("SELECT pg_advisory_xact_lock(1869968482, 1)").execute(&mut *holder).await.unwrap();
    let writer = {
        let pool = pool.clone();
        tokio::spawn(async move {
            let mut tx = pool.begin().await.unwrap();
            append(&mut tx, &[event("a", 1)]).await.unwrap();
            tx.commit().await.unwrap();
        })
    };
    until("the writer waits for the lock", async || {
        let waiting = "SELECT count(*) FROM pg_stat_activity
                       WHERE datname = current_database() AND wait_event = 'advisory'";
        sqlx::query_scalar::<_, i64>(waiting).fetch_one(&pool).await.unwrap() == 1
    })
    .await;
    let taken: bool =
        sqlx::query_scalar("SELECT is_called FROM outbox.position").fetch_one(&pool).await.unwrap();
    assert!(!taken, "a position was taken by nobody who holds the lock");
    holder.rollback().await.unwrap();
    timeout(LIMIT, writer).await.unwrap().unwrap();
    assert_eq!(count(&pool).await, 1);
}

#[tokio::test]
async fn uuid7_tells_the_time_and_is_unique() {
    let pool = database().await;
    let made: Vec<(Uuid, DateTime<Utc>, DateTime<Utc>)> = sqlx::query_as(
        "SELECT id, before, clock_timestamp()
         FROM (SELECT clock_timestamp() AS before, outbox.uuid7() AS id FROM generate_series(1, 10000) OFFSET 0) made",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    let unique: BTreeSet<Uuid> = made.iter().map(|(id, _, _)| *id).collect();
    assert_eq!(unique.len(), made.len());
    for (id, before, after) in made {
        assert_eq!((id.get_version_num(), id.get_variant()), (7, uuid::Variant::RFC4122), "{id}");
        let millis = i64::try_from(id.as_u128() >> 80).unwrap();
        let around = before.timestamp_millis()..=after.timestamp_millis() + 1;
        assert!(around.contains(&millis), "{id} is of {millis}, not within {around:?}");
    }
}

/// Takes a role that belongs to the whole server; whichever test process comes first makes it.
async fn as_role(pool: &PgPool, role: &str, grant: &str) -> sqlx::pool::PoolConnection<sqlx::Postgres> {
    let sql = format!(
        "DO $$ BEGIN CREATE ROLE {role}; EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$;
         SELECT outbox.{grant}('{role}')"
    );
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(pool).await.unwrap();
    let mut conn = pool.acquire().await.unwrap();
    sqlx::query(AssertSqlSafe(format!("SET ROLE {role}"))).execute(&mut *conn).await.unwrap();
    conn
}

/// Runs each and says what PostgreSQL said.
async fn attempts(conn: &mut PgConnection, statements: &[&'static str]) -> String {
    let mut said = Vec::new();
    for sql in statements {
        let answer = match sqlx::query(*sql).execute(&mut *conn).await {
            Ok(_) => "may".to_owned(),
            Err(error) => {
                error.as_database_error().unwrap_or_else(|| panic!("{sql}: {error}")).message().to_owned()
            }
        };
        said.push(format!("{answer}: {}", sql.split_whitespace().collect::<Vec<_>>().join(" ")));
    }
    said.join("\n")
}

#[tokio::test]
async fn a_writer_can_append_and_nothing_else() {
    let pool = database().await;
    let mut writer = as_role(&pool, "outbox_writer_test", "grant_writer").await;
    let said = attempts(
        &mut writer,
        &[
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
             VALUES ('thing', 'a', 1, 'thing.new', '{}') RETURNING position",
            "SELECT name FROM outbox.source",
            "SELECT version FROM outbox.migration",
            "INSERT INTO outbox.event (position, aggregate_type, aggregate_id, version, type, payload)
             VALUES (7, 'thing', 'a', 2, 'thing.new', '{}')",
            "INSERT INTO outbox.event_1 (aggregate_type, aggregate_id, version, type, payload)
             VALUES ('thing', 'a', 2, 'thing.new', '{}')",
            "SELECT nextval('outbox.position')",
            "SELECT setval('outbox.position', 1000000)",
            "SELECT last_value FROM outbox.position",
            "SELECT payload FROM outbox.event",
            "UPDATE outbox.event SET payload = '{}'",
            "DELETE FROM outbox.event",
            "TRUNCATE outbox.event",
            "UPDATE outbox.source SET incarnation = 2",
            "SELECT name FROM outbox.relay",
            "CREATE TABLE outbox.mine ()",
            "SELECT outbox.add_partition(1000)",
            "SELECT outbox.retire_partition('event_1', now() + interval '1 day', true)",
            "SELECT outbox.erase('{thing}', '{a}', '{2}')",
        ],
    )
    .await;
    insta::assert_snapshot!(said);
    let mut tx = writer.begin().await.unwrap();
    append(&mut tx, &[event("a", 2)]).await.expect("append needs no more than the grants");
    tx.commit().await.unwrap();
}

#[tokio::test]
async fn a_relay_reads_events_and_writes_only_its_own_tables() {
    let pool = database().await;
    let mut relay = as_role(&pool, "outbox_relay_test", "grant_relay").await;
    let said = attempts(
        &mut relay,
        &[
            "SELECT * FROM outbox.event",
            "SELECT last_value FROM outbox.position",
            "SELECT name, incarnation FROM outbox.source",
            "INSERT INTO outbox.relay (name) VALUES ('default')",
            "UPDATE outbox.relay SET high = 1",
            "DELETE FROM outbox.parked",
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
             VALUES ('thing', 'a', 1, 'thing.new', '{}')",
            "UPDATE outbox.event SET payload = '{}'",
            "DELETE FROM outbox.event",
            "SELECT nextval('outbox.position')",
            "DELETE FROM outbox.relay",
            "TRUNCATE outbox.event_1",
            "SELECT * FROM outbox.partition",
            "SELECT outbox.add_partition(1000)",
            "SELECT outbox.retire_partition('event_1', now() + interval '1 day', true)",
            "UPDATE outbox.source SET incarnation = 2",
            "SELECT outbox.erase('{thing}', '{a}', '{2}')",
        ],
    )
    .await;
    insta::assert_snapshot!(said);
}

#[tokio::test]
async fn a_thousand_wakes_are_folded_into_a_few_notices() {
    let pool = database().await;
    let mut listener = PgListener::connect_with(&pool).await.unwrap();
    listener.listen(CHANNEL).await.unwrap();
    let (waker, stop) = (Waker::new(), CancellationToken::new());
    waker.wake(); // Before anybody runs it: not lost.
    let running = tokio::spawn(waker.clone().run(pool.clone(), stop.clone()));
    let notice = timeout(LIMIT, listener.recv()).await.expect("the first wake arrives").unwrap();
    assert_eq!((notice.channel(), notice.payload()), (CHANNEL, ""));

    for _ in 0..1000 {
        waker.wake();
    }
    timeout(LIMIT, listener.recv()).await.expect("the others arrive, folded").unwrap();
    // The waker is idle once more: this notice is the last one, whatever came before it.
    sqlx::query("NOTIFY outbox_event, 'end'").execute(&pool).await.unwrap();
    let mut more = 0;
    while timeout(LIMIT, listener.recv()).await.unwrap().unwrap().payload() != "end" {
        more += 1;
    }
    assert!(more <= 2, "{more} notices more");

    stop.cancel();
    timeout(LIMIT, running).await.expect("it ends when asked to").unwrap();
}

#[tokio::test]
async fn a_waker_survives_a_database_that_is_away() {
    let pool = database().await;
    let mut listener = PgListener::connect_with(&pool).await.unwrap();
    listener.listen(CHANNEL).await.unwrap();
    // A pool of one connection, and somebody has it: no notice can be sent.
    let narrow = sqlx::postgres::PgPoolOptions::new()
        .max_connections(1)
        .acquire_timeout(Duration::from_millis(50))
        .connect_with((*pool.connect_options()).clone())
        .await
        .unwrap();
    let taken = narrow.acquire().await.unwrap();
    let (waker, stop) = (Waker::new(), CancellationToken::new());
    let running = tokio::spawn(waker.clone().run(narrow.clone(), stop.clone()));
    waker.wake();
    assert!(timeout(Duration::from_millis(200), listener.recv()).await.is_err(), "no notice can be sent");
    drop(taken);
    // It may still be at one that cannot be sent, or find no connection in so short a time on a busy machine.
    let arrives = async {
        loop {
            waker.wake();
            if let Ok(notice) = timeout(Duration::from_millis(500), listener.recv()).await {
                break notice;
            }
        }
    };
    timeout(LIMIT, arrives).await.expect("a later wake arrives").unwrap();
    stop.cancel();
    timeout(LIMIT, running).await.unwrap().unwrap();
}
