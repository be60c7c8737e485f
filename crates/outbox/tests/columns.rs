//! Each column of an event, in its type's whole range: what no message can carry, and what no subscriber could read,
//! is its writer's error.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use outbox::{AppendError, NewEvent, append, install};
use serde_json::{Map, Value, json, value::RawValue};
use sqlx::{AssertSqlSafe, PgPool};
use uuid::Uuid;

async fn database() -> PgPool {
    let pool = PgPool::connect(&devstack::testing::database("columns").await).await.unwrap();
    install(&mut pool.acquire().await.unwrap(), "test").await.unwrap();
    pool
}

/// Which constraint refuses an event with this value, or `taken`.
async fn said(pool: &PgPool, column: &str, value: &str) -> String {
    let given = |of, default| if column == of { value.to_owned() } else { String::from(default) };
    // With a predecessor, any version is taken for the next one.
    let previous_id = if column == "version" { "gen_random_uuid()" } else { "NULL::uuid" };
    let sql = format!(
        "INSERT INTO outbox.event (position, aggregate_type, aggregate_id, version, type, payload, headers, created_at,
                                   previous_id)
         SELECT {}, {}, {}, {}, {}, {}, {}, {}, {previous_id}",
        given("position", "outbox.next_position()"),
        given("aggregate_type", "'thing'"),
        given("aggregate_id", "gen_random_uuid()::text"),
        given("version", "1"),
        given("type", "'thing.new'"),
        given("payload", "'{}'"),
        given("headers", "NULL::jsonb"),
        given("created_at", "now()"),
    );
    match sqlx::query(AssertSqlSafe(sql)).execute(pool).await {
        Ok(_) => "taken".to_owned(),
        Err(error) => {
            let error = error.as_database_error().unwrap();
            error.constraint().unwrap_or(error.message()).to_owned()
        }
    }
}

#[tokio::test]
async fn the_schema_refuses_what_cannot_be_published() {
    let pool = database().await;
    // As a writer may have it compressed in a table of its own: 20 MiB in 240 KiB.
    let stored = "CREATE TABLE stored (payload json, headers jsonb);
                  INSERT INTO stored SELECT to_json(repeat('a', 20 << 20)), jsonb_build_object('a', repeat('a', 1 << 20))";
    sqlx::raw_sql(stored).execute(&pool).await.unwrap();
    let mut told = Vec::new();
    for (column, value) in [
        ("created_at", "'infinity'::timestamptz"),
        ("created_at", "'-infinity'::timestamptz"),
        ("created_at", "'290000-01-01Z'::timestamptz"),
        ("created_at", "'10000-01-01Z'::timestamptz"),
        ("created_at", "'9999-12-31T23:59:59Z'::timestamptz"),
        ("created_at", "'0044-03-15Z BC'::timestamptz"),
        ("created_at", "'1969-12-31T23:59:59Z'::timestamptz"),
        ("version", "9223372036854775807"),
        ("version", "9223372036854775806"),
        ("version", "0"),
        ("position", "9223372036854775807"),
        ("position", "0"),
        ("position", "-5"),
        ("type", "repeat('a', 256)"),
        ("type", "''"),
        ("aggregate_type", "repeat('a', 256)"),
        ("aggregate_id", "repeat('a', 256)"),
        ("payload", "to_json(repeat('a', 16 << 20))"),
        ("payload", "(SELECT payload FROM stored)"),
        ("payload", "(repeat('[', 2000) || repeat(']', 2000))::json"),
        ("payload", "'\"\\u0000\"'::json"),
        ("headers", "'[]'::jsonb"),
        ("headers", "'\"text\"'::jsonb"),
        ("headers", "(SELECT headers FROM stored)"),
        ("headers", "'{\"a\": 1e131071}'::jsonb"),
        ("headers", "'{\"a\": 1e400}'::jsonb"),
        ("headers", "('{\"a\":' || repeat('[', 200) || repeat(']', 200) || '}')::jsonb"),
        ("headers", "'{\"a\": [[[[1]]]]}'::jsonb"),
        ("headers", "'{\"a\": [{\"b\": [1]}]}'::jsonb"),
        ("headers", "(SELECT jsonb_object_agg(n, n) FROM generate_series(1, 65) n)"),
        ("headers", "(SELECT jsonb_object_agg(n, n) FROM generate_series(1, 64) n)"),
        ("headers", "jsonb_build_object(repeat('a', 256), 1)"),
        ("headers", "jsonb_build_object(repeat('é', 128), 1)"),
        ("headers", "jsonb_build_object(repeat('a', 255), 1)"),
        ("headers", "'{\"BCC\": \"queue\"}'::jsonb"),
        ("headers", "'{}'::jsonb"),
    ] {
        told.push(format!("{column} = {value}: {}", said(&pool, column, value).await));
    }
    insta::assert_snapshot!(told.join("\n"));
}

/// What the schema would refuse, the crate says in words, before anything is sent.
#[tokio::test]
async fn append_says_which_rule_an_event_breaks() {
    let pool = database().await;
    let event = |version: i64, headers: Value| NewEvent {
        id: Uuid::now_v7(),
        aggregate_type: "thing".into(),
        aggregate_id: "a".to_owned(),
        version,
        type_: "thing.new".into(),
        payload: RawValue::from_string("{}".to_owned()).unwrap(),
        headers: headers.as_object().cloned(),
    };
    let many: Map<String, Value> = (0..65).map(|n| (n.to_string(), json!(n))).collect();
    let mut tx = pool.begin().await.unwrap();
    let mut told = Vec::new();
    for bad in [
        event(i64::MAX, json!({})),
        event(1, json!({"a": [[[[1]]]]})),
        event(1, Value::Object(many)),
        event(1, json!({"a".repeat(256): 1})),
    ] {
        let AppendError::Unfit { rule, .. } = append(&mut tx, &[bad]).await.unwrap_err() else { panic!() };
        told.push(rule);
    }
    append(&mut tx, &[event(1, json!({"a": [[[1]]]}))]).await.unwrap();
    insta::assert_snapshot!(told.join("\n"));
}

/// The sequence cannot be set to where numbers end, and where it stands near its end, that is what is said.
#[tokio::test]
async fn the_sequence_ends_before_the_numbers_do() {
    let pool = database().await;
    let ask = async |sql: &str| {
        let asked = sqlx::query(AssertSqlSafe(sql.to_owned())).execute(&pool).await;
        asked.map_or_else(
            |error| error.as_database_error().unwrap().message().to_owned(),
            |_| "done".to_owned(),
        )
    };
    let mut told = Vec::new();
    for sql in [
        "SELECT setval('outbox.position', 9223372036854775800)",
        "SELECT setval('outbox.position', 8999999999999999999)",
        "SELECT outbox.add_partition(1000)",
        "SELECT outbox.next_position()",
        "SELECT outbox.next_position()",
        "SELECT setval('outbox.position', 17)",
        "SELECT outbox.add_partition(1000)",
    ] {
        told.push(format!("{sql}: {}", ask(sql).await));
    }
    insta::assert_snapshot!(told.join("\n"));
}

/// A body as deep as the server can parse is erased like any other.
#[tokio::test]
async fn a_deep_body_is_erased() {
    let pool = database().await;
    // The deepest that this server takes.
    let (mut low, mut high) = (1_i32, 100_000_i32);
    let takes = async |depth: i32| {
        let sql = "SELECT (repeat('[', $1) || repeat(']', $1))::json IS NOT NULL";
        sqlx::query(sql).bind(depth).execute(&pool).await.is_ok()
    };
    while high - low > 1 {
        let middle = i32::midpoint(low, high);
        if takes(middle).await { low = middle } else { high = middle }
    }
    let deep = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                SELECT 'thing', 'a', 1, 'thing.new', (repeat('[', $1) || repeat(']', $1))::json";
    // Less by what an INSERT needs more of the stack than a SELECT.
    let mut depth = low;
    while sqlx::query(deep).bind(depth).execute(&pool).await.is_err() {
        depth -= 10;
    }
    sqlx::query("SELECT outbox.erase('{thing}', '{a}', '{2}')").execute(&pool).await.unwrap();
    let body: String =
        sqlx::query_scalar("SELECT payload::text FROM outbox.event").fetch_one(&pool).await.unwrap();
    assert_eq!(body, r#"{"id":"a","erased":true}"#);
}

/// What was stored before the schema refused it is erased all the same: a check that is not valid for old rows still
/// holds for those that are changed.
#[tokio::test]
async fn a_row_of_before_is_erased() {
    let pool = database().await;
    let before = "DO $$
        DECLARE c record;
        BEGIN
            CREATE TEMP TABLE rule ON COMMIT DROP AS
                SELECT conname, pg_get_constraintdef(oid) AS def FROM pg_constraint
                WHERE conrelid = 'outbox.event'::regclass AND contype = 'c' AND NOT convalidated;
            FOR c IN SELECT * FROM rule LOOP
                EXECUTE format('ALTER TABLE outbox.event DROP CONSTRAINT %I', c.conname);
            END LOOP;
            INSERT INTO outbox.event
                (aggregate_type, aggregate_id, version, type, payload, headers, created_at, previous_id) VALUES
                ('thing', 'a', 1, 'thing.new', '{}', NULL, 'infinity', gen_random_uuid()),
                ('thing', 'a', 2, 'thing.new', '{}', '{\"CC\": [[[[[1]]]]]}', '-infinity', gen_random_uuid()),
                ('thing', 'a', 9223372036854775807, 'thing.new', '{}', NULL, now(), gen_random_uuid());
            FOR c IN SELECT * FROM rule LOOP
                EXECUTE format('ALTER TABLE outbox.event ADD CONSTRAINT %I %s', c.conname, c.def);
            END LOOP;
        END $$";
    sqlx::raw_sql(before).execute(&pool).await.unwrap();
    // Nothing is above the last version: an operator, for once.
    let erase = "UPDATE outbox.event SET payload = outbox.erased(payload, aggregate_id), headers = '{\"erased\": true}'";
    sqlx::query(erase).execute(&pool).await.unwrap();
    sqlx::query("SELECT outbox.erase('{thing}', '{a}', '{3}')").execute(&pool).await.unwrap();
}
