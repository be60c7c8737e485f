//! The views of the schema: what an operator's role reads with them, that it reads no body, and that a column that costs
//! something is computed only when it is named.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use outbox::install;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

/// Each view for operators, with a question.
const QUESTIONS: [&str; 15] = [
    "SELECT source, incarnation, last_position, used_position, partitions_end, pending_erasures FROM outbox.overview",
    "SELECT name, low_water, high, open_ranges, open_positions, open_events, new_events, parked_events, waiting_events,
            leads, paused_by FROM outbox.relay_status",
    "SELECT oldest_created_at = (SELECT created_at FROM outbox.event WHERE position = 4) FROM outbox.relay_status",
    "SELECT position, relay, state, detail FROM outbox.event_progress WHERE position = ANY ('{1,2,3,4,5,6,7,8}')
     ORDER BY position",
    "SELECT position, aggregate_id, state, reason, detail FROM outbox.parked_event ORDER BY position",
    "SELECT state, reason, type, detail, events, oldest_position FROM outbox.parked_group
     WHERE relay = 'default' ORDER BY 1, 2, 3, 4",
    "SELECT type, reason, aggregates, detail FROM outbox.waiting_group WHERE relay = 'default' ORDER BY 1, 2",
    "SELECT name, lower, upper, is_default, first_position, kept_because FROM outbox.partition_status ORDER BY 1",
    "SELECT name, is_default, last_position, next_begins, has_events FROM outbox.partition_in_use",
    "SELECT count(*) FROM outbox.lock_holder",
    "SELECT count(*) FROM outbox.leader_session",
    "SELECT aggregate_type, table_name, is_root, key, body, left_out FROM outbox.captured",
    "SELECT aggregate_type, table_name, finding, advice FROM outbox.capture_problem",
    "SELECT * FROM outbox.digest(1)",
    "SELECT position, version, type FROM outbox.event WHERE aggregate_id = 'b' ORDER BY position",
];

/// What the role may not do, though the views are open to it.
const REFUSED: [&str; 11] = [
    "SELECT payload FROM outbox.event",
    "SELECT headers FROM outbox.event",
    "SELECT payload FROM outbox.parked",
    "SELECT payload FROM outbox.readable",
    "SELECT payload FROM outbox.readable_parked",
    "UPDATE outbox.relay SET paused_by = 'somebody'",
    "DELETE FROM outbox.parked",
    "SELECT outbox.why_kept('event_1', 'infinity', true)",
    "SELECT outbox.retire_partition('event_1', 'infinity', true)",
    "SELECT outbox.begin_next_partition('infinity')",
    "SELECT outbox.what_keeps('event_1', 'infinity', 1)",
];

/// Eight events of two aggregates; the relay has settled two, parked the third, and the fourth is under way; the fifth
/// waits, and the sixth behind it.
const EVENTS: &str = "
    INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    SELECT 'thing', CASE WHEN n % 2 = 1 THEN 'a' ELSE 'b' END, (n + 1) / 2, 'thing.new', '{\"secret\": true}'
    FROM generate_series(1, 8) n;
    INSERT INTO outbox.relay (name, low_water, high, open, paused_by)
    VALUES ('default', 3, 6, '{[4,5)}', 'an operator');
    INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, payload, created_at,
                               reason, detail, state, next_attempt_at)
    SELECT 'default', position, id, aggregate_type, aggregate_id, version, type,
           CASE WHEN position = 3 THEN payload END, created_at, r.reason, r.detail, r.state, r.next
    FROM outbox.event
    JOIN (VALUES (3, 'refused', 'event 3 is too large', 'parked', NULL::timestamptz),
                 (5, 'nacked', 'a queue is full', 'waiting', now()),
                 (6, 'behind', '', 'waiting', NULL)) AS r (position, reason, detail, state, next) USING (position)";

async fn database() -> (PgConnection, String) {
    let url = devstack::testing::database("views").await;
    let mut admin = PgConnection::connect(&url).await.unwrap();
    install(&mut admin, "test").await.unwrap();
    admin.execute(EVENTS).await.unwrap();
    // In a schema that the role may not use.
    let captured = "CREATE SCHEMA shop; CREATE TABLE shop.orders (id bigint PRIMARY KEY, secret text);
                    SELECT outbox.capture('shop.orders', 'order', left_out => 'secret');
                    ALTER TABLE shop.orders DISABLE TRIGGER ALL";
    admin.execute(sqlx::raw_sql(captured)).await.unwrap();
    // Roles belong to the server, and the database's name is unique.
    let role = format!("{}_reader", url.rsplit_once('/').unwrap().1);
    admin.execute(AssertSqlSafe(format!("CREATE ROLE {role}"))).await.unwrap();
    sqlx::query("SELECT outbox.grant_reader($1::regrole)").bind(&role).execute(&mut admin).await.unwrap();
    (admin, role)
}

/// A question's rows, each as one line of JSON.
async fn rows(conn: &mut PgConnection, question: &str) -> Vec<String> {
    let sql = format!("SELECT row_to_json(q)::text FROM ({question}) AS q");
    sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(conn).await.unwrap_or_else(|e| panic!("{question}: {e}"))
}

#[tokio::test]
async fn an_operator_reads_the_views_and_no_body() {
    let (mut conn, role) = database().await;
    conn.execute(AssertSqlSafe(format!("SET ROLE {role}"))).await.unwrap();
    let mut told = Vec::new();
    for question in QUESTIONS {
        told.extend(rows(&mut conn, question).await);
    }
    insta::assert_snapshot!(told.join("\n"));
    for statement in REFUSED {
        let refused = conn.execute(AssertSqlSafe(statement)).await.expect_err(statement);
        assert_eq!(refused.as_database_error().unwrap().code().unwrap(), "42501", "{statement}: {refused}");
    }
    // A view has no column that would show one, whatever comes to the tables.
    conn.execute("RESET ROLE").await.unwrap();
    let bodies =
        "SELECT string_agg(table_name || '.' || column_name, ', ' ORDER BY table_name, column_name) FROM information_schema.columns
                  JOIN information_schema.views USING (table_schema, table_name)
                  WHERE table_schema = 'outbox' AND column_name IN ('payload', 'headers')";
    let bodies: Option<String> = sqlx::query_scalar(bodies).fetch_one(&mut conn).await.unwrap();
    insta::assert_snapshot!(bodies.unwrap(), @"readable.headers, readable.payload, readable_parked.headers, readable_parked.payload");
}

/// What a statement reads, according to its plan.
async fn plan(conn: &mut PgConnection, sql: &str) -> String {
    let lines: Vec<String> =
        sqlx::query_scalar(AssertSqlSafe(format!("EXPLAIN (VERBOSE) {sql}"))).fetch_all(conn).await.unwrap();
    lines.join("\n")
}

#[tokio::test]
async fn a_column_that_is_not_named_costs_nothing() {
    let (mut conn, _) = database().await;
    let cheap = "SELECT name, low_water, high, heartbeat_age_seconds, open_positions FROM outbox.relay_status WHERE name = 'default'";
    let plan_of_cheap = plan(&mut conn, cheap).await;
    for costly in ["event", "parked", "pg_lock_status", "leader_pid"] {
        assert!(!plan_of_cheap.contains(costly), "{costly}: {plan_of_cheap}");
    }
    for (column, costly) in
        [("new_events", "event_1"), ("parked_events", "outbox.parked"), ("leads", "leader_pid")]
    {
        let plan =
            plan(&mut conn, &format!("SELECT {column} FROM outbox.relay_status WHERE name = 'default'"))
                .await;
        assert!(plan.contains(costly), "{column}: {plan}");
    }
    let cheap = plan(&mut conn, "SELECT source, last_position FROM outbox.overview").await;
    for costly in ["event", "pg_inherits", "erasure"] {
        assert!(!cheap.contains(costly), "{costly}: {cheap}");
    }
    let cheap = plan(&mut conn, "SELECT name, upper FROM outbox.partition_status").await;
    assert!(!cheap.contains("retention_blocker") && !cheap.contains("outbox.event_1"), "{cheap}");
    // The progress of one event is rows by primary keys.
    conn.execute("SET enable_seqscan = off").await.unwrap();
    let one = plan(&mut conn, "SELECT * FROM outbox.event_progress WHERE position = 3").await;
    assert!(
        one.contains("event_1_pkey") && one.contains("parked_pkey") && !one.contains("event_default"),
        "{one}"
    );
}

#[tokio::test]
async fn each_view_says_what_a_row_is() {
    let (mut conn, _) = database().await;
    let silent = "SELECT coalesce(string_agg(c.relname, ', '), 'none') FROM pg_class c
                  WHERE c.relnamespace = 'outbox'::regnamespace AND c.relkind = 'v'
                    AND obj_description(c.oid, 'pg_class') IS NULL";
    let silent: String = sqlx::query_scalar(silent).fetch_one(&mut conn).await.unwrap();
    assert_eq!(silent, "none");
}
