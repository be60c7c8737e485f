//! `outbox.capture`: what a transaction changes in captured tables is published, once, as it is at its commit.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use outbox::install;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, postgres::PgDatabaseError};

/// A shop as others have it: orders with lines, identity and generated columns, foreign keys that cascade.
const SHOP: &str = "
    CREATE SCHEMA shop;
    CREATE TABLE shop.orders (
        id       bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
        customer text,
        gross    numeric(10, 2) NOT NULL DEFAULT 0,
        net      numeric(10, 2) GENERATED ALWAYS AS (round(gross / 1.19, 2)) STORED,
        at       timestamptz NOT NULL DEFAULT '2026-11-29 12:00:00+00',
        secret   bytea NOT NULL DEFAULT '\\xbeef',
        took     interval NOT NULL DEFAULT '26 hours');
    CREATE TABLE shop.line (
        id       bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
        order_id bigint REFERENCES shop.orders ON DELETE CASCADE,
        sku      text NOT NULL);
    CREATE INDEX ON shop.line (order_id);
    CREATE FUNCTION shop.order_body(bigint) RETURNS json STABLE BEGIN ATOMIC
        SELECT json_build_object('id', o.id, 'customer', o.customer, 'lines', (
                   SELECT string_agg(l.sku, ',' ORDER BY l.id) FROM shop.line l WHERE l.order_id = o.id))
        FROM shop.orders o WHERE o.id = $1;
    END;";

const CAPTURE: &str = "
    SELECT outbox.capture('shop.orders', 'order', body => 'shop.order_body');
    SELECT outbox.capture('shop.line', 'order', key => 'order_id')";

struct Shop {
    url: String,
    conn: PgConnection,
}

impl Shop {
    /// A shop that is not captured.
    async fn closed() -> Self {
        let url = devstack::testing::database("capture").await;
        let mut conn = PgConnection::connect(&url).await.unwrap();
        install(&mut conn, "shop").await.unwrap();
        run(&mut conn, SHOP).await;
        Self { url, conn }
    }

    /// A shop whose orders are captured, with their lines.
    async fn open() -> Self {
        let mut shop = Self::closed().await;
        shop.run(CAPTURE).await;
        shop
    }

    async fn another(&self) -> PgConnection {
        let mut conn = PgConnection::connect(&self.url).await.unwrap();
        conn.execute("SET lock_timeout = '5s'").await.unwrap();
        conn
    }

    async fn run(&mut self, sql: &str) {
        // Prepared transactions belong to the server, and the database's name is unique.
        let name = self.url.rsplit_once('/').unwrap().1;
        run(&mut self.conn, &sql.replace("$DATABASE", name)).await;
    }

    /// Runs what has to fail, and says how.
    async fn fails(&mut self, sql: &str) -> String {
        fails(&mut self.conn, sql).await
    }

    /// Every event: aggregate, version, type, body.
    async fn told(&mut self) -> String {
        self.ask(
            "SELECT string_agg(concat_ws(' ', aggregate_type || '/' || aggregate_id, version, type, payload), E'\\n'
                               ORDER BY position) FROM outbox.event",
        )
        .await
    }

    /// Events since the last time.
    async fn news(&mut self) -> String {
        let told = self.told().await;
        self.run("DELETE FROM outbox.event").await;
        told
    }

    async fn ask(&mut self, sql: &str) -> String {
        let answer: Option<String> =
            sqlx::query_scalar(AssertSqlSafe(sql.to_owned())).fetch_one(&mut self.conn).await.unwrap();
        answer.unwrap_or_default()
    }

    /// Roles belong to the server, and the database's name is unique.
    async fn role(&mut self, name: &str) -> String {
        let role = format!("{}_{name}", self.url.rsplit_once('/').unwrap().1);
        self.run(&format!("CREATE ROLE {role}")).await;
        role
    }

    /// What `outbox.capture_problem` says.
    async fn problems(&mut self) -> String {
        self.ask(
            "SELECT string_agg(concat(aggregate_type, ' ', table_name, ': ', finding, E'\\n   -> ', advice), E'\\n'
                               ORDER BY aggregate_type, table_name, finding) FROM outbox.capture_problem",
        )
        .await
    }
}

/// The statements of a script. One that is sent as a whole would be one transaction.
fn statements(script: &str) -> Vec<String> {
    let mut statements = vec![String::new()];
    for part in script.split_inclusive(';') {
        let last = statements.last_mut().unwrap();
        last.push_str(part);
        let whole = last.matches('\'').count() % 2 == 0
            && last.matches("$$").count() % 2 == 0
            && (!last.contains("BEGIN ATOMIC") || last.trim_end().ends_with("END;"));
        if whole {
            statements.push(String::new());
        }
    }
    statements.retain(|statement| !statement.trim().is_empty());
    statements
}

async fn run(conn: &mut PgConnection, script: &str) {
    for sql in statements(script) {
        if let Err(error) = conn.execute(AssertSqlSafe(sql.clone())).await {
            panic!("{sql}: {error}");
        }
    }
}

async fn fails(conn: &mut PgConnection, script: &str) -> String {
    let mut said = format!("{script}: done");
    for sql in statements(script) {
        if let Err(error) = conn.execute(AssertSqlSafe(sql)).await {
            let error = error.into_database_error().unwrap();
            let error = error.downcast_ref::<PgDatabaseError>();
            let hint = error.hint().map(|hint| format!("\n   -> {hint}")).unwrap_or_default();
            said = format!("{} {}{hint}", error.code(), error.message());
            break;
        }
    }
    conn.execute(sqlx::raw_sql("ROLLBACK; RESET ROLE")).await.unwrap();
    said
}

#[tokio::test]
async fn a_transaction_publishes_each_aggregate_once_as_it_is_at_its_commit() {
    let mut shop = Shop::open().await;
    let mut told = String::new();
    for (what, sql) in [
        (
            "an order with its lines, in several statements and a savepoint that is taken back",
            "BEGIN; INSERT INTO shop.orders (customer) VALUES ('Ada'); INSERT INTO shop.line (order_id, sku) VALUES (1, 'a');
             SAVEPOINT s; INSERT INTO shop.line (order_id, sku) VALUES (1, 'never'); ROLLBACK TO s;
             INSERT INTO shop.line (order_id, sku) VALUES (1, 'b'); COMMIT",
        ),
        ("only what is rolled back", "BEGIN; UPDATE shop.orders SET customer = 'Eve'; ROLLBACK"),
        ("nothing changes", "UPDATE shop.orders SET customer = customer; UPDATE shop.line SET sku = sku"),
        ("a column that is not in the body", "UPDATE shop.orders SET gross = 119"),
        ("there and back", "BEGIN; UPDATE shop.orders SET customer = 'Eve'; UPDATE shop.orders SET customer = 'Ada'; COMMIT"),
        ("many rows of one statement", "INSERT INTO shop.orders (customer) VALUES ('Bea'), ('Cleo')"),
        ("a line that moves", "UPDATE shop.line SET order_id = 2 WHERE sku = 'b'"),
        ("a line that belongs to nothing", "UPDATE shop.line SET order_id = NULL WHERE sku = 'b'; DELETE FROM shop.line WHERE sku = 'b'"),
        ("no row", "UPDATE shop.orders SET customer = 'x' WHERE id = 99; DELETE FROM shop.line WHERE id = 99"),
        (
            "an upsert",
            "INSERT INTO shop.orders (id, customer) OVERRIDING SYSTEM VALUE VALUES (3, 'Cleo II'), (4, 'Dora')
             ON CONFLICT (id) DO UPDATE SET customer = excluded.customer",
        ),
        (
            "a MERGE",
            "MERGE INTO shop.orders o USING (VALUES (1, 'gone'), (2, 'Bea II'), (5, 'Ella')) AS v (id, customer) ON o.id = v.id
             WHEN MATCHED AND v.id = 1 THEN DELETE WHEN MATCHED THEN UPDATE SET customer = v.customer
             WHEN NOT MATCHED THEN INSERT (id, customer) OVERRIDING SYSTEM VALUE VALUES (v.id, v.customer)",
        ),
        ("a key that changes", "ALTER TABLE shop.orders ALTER id SET GENERATED BY DEFAULT; UPDATE shop.orders SET id = 50 WHERE id = 5"),
        ("an order that comes and goes", "BEGIN; INSERT INTO shop.orders (id) VALUES (60); DELETE FROM shop.orders WHERE id = 60; COMMIT"),
        ("a key that is used again", "INSERT INTO shop.orders (id, customer) VALUES (1, 'Ada again')"),
        ("all of them", "DELETE FROM shop.orders"),
        (
            "in parts, by request",
            "BEGIN; INSERT INTO shop.orders (id, customer) VALUES (70, 'Fay'); SET CONSTRAINTS ALL IMMEDIATE;
             UPDATE shop.orders SET customer = 'Fay II'; COMMIT",
        ),
    ] {
        shop.run(sql).await;
        told = format!("{told}\n{what}:\n{}", shop.news().await);
    }
    insta::assert_snapshot!(told);
    assert_eq!(shop.ask("SELECT count(*)::text FROM outbox.touched").await, "0");
}

#[tokio::test]
async fn copy_and_two_phase_commit_publish() {
    let mut shop = Shop::open().await;
    let mut copy = shop.conn.copy_in_raw("COPY shop.orders (customer) FROM STDIN").await.unwrap();
    copy.send("Ada\nBea\n".as_bytes()).await.unwrap();
    copy.finish().await.unwrap();
    shop.run(
        "BEGIN; INSERT INTO shop.line (order_id, sku) VALUES (2, 'a'); PREPARE TRANSACTION 'one $DATABASE'",
    )
    .await;
    shop.run("COMMIT PREPARED 'one $DATABASE'; BEGIN; DELETE FROM shop.orders; PREPARE TRANSACTION 'two $DATABASE'; ROLLBACK PREPARED 'two $DATABASE'").await;
    insta::assert_snapshot!(shop.told().await, @r#"
    order/1 1 order.new {"id" : 1, "customer" : "Ada", "lines" : null}
    order/2 1 order.new {"id" : 2, "customer" : "Bea", "lines" : null}
    order/2 2 order.changed {"id" : 2, "customer" : "Bea", "lines" : "a"}
    "#);
}

/// What is handed over at a time is bounded, however many rows a statement has.
#[tokio::test]
async fn a_statement_on_many_rows_publishes_each() {
    let mut shop = Shop::open().await;
    shop.run("INSERT INTO shop.orders (customer) SELECT 'c' FROM generate_series(1, 3500)").await;
    shop.run("BEGIN; INSERT INTO shop.line (order_id, sku) SELECT 1 + n % 3500, n FROM generate_series(0, 6999) n;
              UPDATE shop.orders SET customer = 'd' WHERE id <= 3000; DELETE FROM shop.orders WHERE id > 3490; COMMIT").await;
    let counts = "SELECT string_agg(concat_ws(' ', type, version, n), ', ' ORDER BY type) FROM (
                      SELECT type, version, count(*) AS n FROM outbox.event GROUP BY type, version) AS c";
    insta::assert_snapshot!(shop.ask(counts).await, @r"order.changed 2 3490, order.deleted 2 10, order.new 1 3500");
    let wrong = "SELECT count(*)::text FROM shop.orders o JOIN outbox.event e ON e.aggregate_id = o.id::text AND e.version = 2
                 WHERE e.payload::text <> shop.order_body(o.id)::text";
    assert_eq!(shop.ask(wrong).await, "0");
    // 3,490 keys are four pages of a thousand.
    shop.run(
        "BEGIN; SET LOCAL track_functions = 'all'; UPDATE shop.orders SET customer = 'e'; SET CONSTRAINTS ALL IMMEDIATE",
    )
    .await;
    let calls = "SELECT calls::text FROM pg_stat_xact_user_functions WHERE funcname = 'append_1'";
    assert_eq!(shop.ask(calls).await, "4");
}

/// Two writers change different lines of one order at the same time.
#[tokio::test]
async fn the_body_is_read_after_the_lock() {
    let mut shop = Shop::open().await;
    shop.run("INSERT INTO shop.orders (customer) VALUES ('Ada'); INSERT INTO shop.line (order_id, sku) VALUES (1, 'a'), (1, 'b')").await;
    // The first one has locked the chain, and is not committed.
    shop.run("BEGIN; UPDATE shop.line SET sku = 'A' WHERE sku = 'a'; PREPARE TRANSACTION 'first $DATABASE'")
        .await;
    let mut second = shop.another().await;
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut second).await.unwrap();
    run(&mut second, "BEGIN; UPDATE shop.line SET sku = 'B' WHERE sku = 'b'").await;
    let committing = tokio::spawn(async move { run(&mut second, "COMMIT").await });
    let waits = format!("SELECT (cardinality(pg_blocking_pids({pid})) > 0)::text");
    devstack::testing::until("the second one waits", async || shop.ask(&waits).await == "true").await;
    shop.run("COMMIT PREPARED 'first $DATABASE'").await;
    committing.await.unwrap();
    insta::assert_snapshot!(shop.ask("SELECT payload::text FROM outbox.event ORDER BY position DESC LIMIT 1").await, @r#"{"id" : 1, "customer" : "Ada", "lines" : "A,B"}"#);
}

/// A baseline is the state at its version: it waits for a writer that has the chain's lock, and reads the body after that.
#[tokio::test]
async fn a_baseline_is_read_after_the_lock() {
    let mut shop = Shop::open().await;
    shop.run("INSERT INTO shop.orders (customer) VALUES ('Ada'); INSERT INTO shop.line (order_id, sku) VALUES (1, 'a')").await;
    shop.run("BEGIN; UPDATE shop.line SET sku = 'A'; PREPARE TRANSACTION 'first $DATABASE'").await;
    let mut second = shop.another().await;
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut second).await.unwrap();
    let filling =
        tokio::spawn(async move { run(&mut second, "SELECT outbox.publish_state('order', '1')").await });
    let waits = format!("SELECT (cardinality(pg_blocking_pids({pid})) > 0)::text");
    devstack::testing::until("the baseline waits", async || shop.ask(&waits).await == "true").await;
    shop.run("COMMIT PREPARED 'first $DATABASE'").await;
    filling.await.unwrap();
    insta::assert_snapshot!(shop.told().await, @r#"
    order/1 1 order.new {"id" : 1, "customer" : "Ada", "lines" : null}
    order/1 2 order.changed {"id" : 1, "customer" : "Ada", "lines" : "a"}
    order/1 3 order.changed {"id" : 1, "customer" : "Ada", "lines" : "A"}
    order/1 4 order.baseline {"id" : 1, "customer" : "Ada", "lines" : "A"}
    "#);
}

/// What a statement notes does not grow with its rows, but with the aggregates that it touches.
#[tokio::test]
async fn a_statement_notes_each_aggregate_once() {
    let mut shop = Shop::open().await;
    shop.run("INSERT INTO shop.orders (customer) VALUES ('Ada'), ('Bea')").await;
    shop.run(
        "BEGIN; INSERT INTO shop.line (order_id, sku) SELECT 1 + n % 2, 'a' FROM generate_series(1, 3000) n;
              UPDATE shop.line SET sku = 'b'; DELETE FROM shop.line WHERE order_id = 2",
    )
    .await;
    let noted = "SELECT string_agg(concat_ws(' ', capture, lived, k.keys), ', ')
                 FROM (SELECT capture, lived, ARRAY(SELECT unnest(keys) ORDER BY 1) AS keys FROM outbox.touched ORDER BY keys) k";
    insta::assert_snapshot!(shop.ask(noted).await, @"1 0 {1,2}, 1 0 {1,2}, 1 0 {2}");
    shop.run("ROLLBACK").await;
}

/// A page of a thousand aggregates with large bodies is handed over in pieces, so that memory stays bounded.
#[tokio::test]
async fn large_bodies_are_handed_over_in_pieces() {
    let mut shop = Shop::open().await;
    shop.run("INSERT INTO shop.orders (customer) SELECT 'c' FROM generate_series(1, 8)").await;
    shop.run(
        "BEGIN; SET LOCAL track_functions = 'all'; UPDATE shop.orders SET customer = repeat('x', 3000000);
         SET CONSTRAINTS ALL IMMEDIATE",
    )
    .await;
    let calls = "SELECT string_agg(concat_ws(' ', funcname, calls), ', ' ORDER BY funcname) FROM pg_stat_xact_user_functions
                 WHERE funcname IN ('append_1', 'append_captured')";
    // Three bodies are more than 8 MB.
    insta::assert_snapshot!(shop.ask(calls).await, @"append_1 1, append_captured 3");
    shop.run("ROLLBACK").await;
}

/// A chain is locked by an UPDATE, also where nothing is published: a transaction with an older snapshot has to notice.
#[tokio::test]
async fn an_older_snapshot_is_refused_even_if_nothing_was_published() {
    let mut shop = Shop::open().await;
    shop.run("INSERT INTO shop.orders (customer) VALUES ('Ada'); INSERT INTO shop.line (order_id, sku) VALUES (1, 'a'), (1, 'b')").await;
    let mut older = shop.another().await;
    run(&mut older, "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM shop.orders").await;
    // Published as it was: the order's line changes and changes back in two transactions, of which the second says nothing.
    shop.run("UPDATE shop.line SET sku = sku WHERE sku = 'a'").await;
    run(&mut older, "UPDATE shop.line SET sku = 'B' WHERE sku = 'b'").await;
    let first = fails(&mut older, "COMMIT").await;
    // And where the aggregate has no event: a line without an order, and then the order with an older snapshot.
    shop.run("ALTER TABLE shop.line DROP CONSTRAINT line_order_id_fkey").await;
    run(&mut older, "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM shop.orders").await;
    shop.run("INSERT INTO shop.line (order_id, sku) VALUES (7, 'early')").await;
    run(&mut older, "INSERT INTO shop.orders (id) OVERRIDING SYSTEM VALUE VALUES (7)").await;
    let second = fails(&mut older, "COMMIT").await;
    insta::assert_snapshot!(format!("{first}\n{second}"), @r"
    40001 could not serialize access due to concurrent update
    40001 could not serialize access due to concurrent update
    ");
}

/// All chains of a transaction are locked in one order, those of all types together.
#[tokio::test]
async fn chains_are_locked_in_the_order_of_type_and_key() {
    let mut shop = Shop::open().await;
    shop.run("CREATE TABLE shop.account (id bigint PRIMARY KEY); CREATE TABLE shop.entry (account_id bigint);
              SELECT outbox.capture('shop.account', 'account'); SELECT outbox.capture('shop.entry', 'account', 'account_id');
              INSERT INTO shop.account VALUES (1); INSERT INTO shop.orders (customer) VALUES ('Ada')").await;
    // One transaction has locked account/1 and is not committed.
    shop.run("BEGIN; INSERT INTO shop.entry VALUES (1); PREPARE TRANSACTION 'one $DATABASE'").await;
    // The next one has touched order/1, and then account/1. It waits for account/1, and must not have locked order/1.
    let mut second = shop.another().await;
    run(&mut second, "BEGIN; UPDATE shop.orders SET customer = 'Bea'; INSERT INTO shop.entry VALUES (1)")
        .await;
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut second).await.unwrap();
    let committing = tokio::spawn(async move { run(&mut second, "COMMIT").await });
    let waits = format!("SELECT (cardinality(pg_blocking_pids({pid})) > 0)::text");
    devstack::testing::until("the second one waits", async || shop.ask(&waits).await == "true").await;
    // A third one touches order/1 alone, and waits for nobody.
    shop.run("SET lock_timeout = '1s'; INSERT INTO shop.line (order_id, sku) VALUES (1, 'a')").await;
    shop.run("COMMIT PREPARED 'one $DATABASE'").await;
    committing.await.unwrap();
    let told = "SELECT string_agg(concat_ws(' ', aggregate_type, version, type), ', ' ORDER BY position) FROM outbox.event";
    insta::assert_snapshot!(shop.ask(told).await, @r"account 1 account.new, order 1 order.new, order 2 order.changed, order 3 order.changed");
}

/// The first firing at COMMIT publishes everything: the others find nothing and return.
#[tokio::test]
async fn many_statements_of_a_transaction_are_published_together() {
    let mut shop = Shop::open().await;
    shop.run("INSERT INTO shop.orders (customer) SELECT 'c' FROM generate_series(1, 50)").await;
    let once = "BEGIN; SET LOCAL track_functions = 'all';
                DO $$ BEGIN FOR n IN 1..400 LOOP
                    UPDATE shop.orders SET customer = n WHERE id = 1 + n % 50; END LOOP; END $$;
                SET CONSTRAINTS ALL IMMEDIATE";
    shop.run(once).await;
    let calls = "SELECT string_agg(concat_ws(' ', funcname, calls), ', ' ORDER BY funcname) FROM pg_stat_xact_user_functions
                 WHERE funcname IN ('publish_touched', 'is_left', 'publish_1', 'append_1')";
    insta::assert_snapshot!(shop.ask(calls).await, @r"append_1 1, is_left 400, publish_1 1, publish_touched 400");
    shop.run("COMMIT").await;
    assert_eq!(shop.ask("SELECT count(*)::text FROM outbox.event").await, "100");
}

/// A further capture waits for the writers of its own table alone.
#[tokio::test]
async fn a_second_capture_waits_for_no_writer_of_other_tables() {
    let mut shop = Shop::open().await;
    let mut writer = shop.another().await;
    run(&mut writer, "BEGIN; INSERT INTO shop.orders (customer) VALUES ('Ada')").await;
    shop.run(
        "SET lock_timeout = '2s'; CREATE TABLE shop.account (id bigint PRIMARY KEY);
              SELECT outbox.capture('shop.account', 'account'); SELECT outbox.uncapture('shop.account')",
    )
    .await;
    run(&mut writer, "INSERT INTO shop.line (order_id, sku) VALUES (1, 'a'); COMMIT").await;
    insta::assert_snapshot!(shop.told().await, @r#"order/1 1 order.new {"id" : 1, "customer" : "Ada", "lines" : "a"}"#);
}

/// What a body looks like does not depend on the session that writes.
#[tokio::test]
async fn settings_of_the_writer_do_not_change_a_body() {
    let mut shop = Shop::closed().await;
    shop.run("SELECT outbox.capture('shop.orders', 'order')").await;
    shop.run("INSERT INTO shop.orders (customer, gross) VALUES ('Ada', 119)").await;
    shop.run(
        "SET timezone = 'Asia/Tokyo'; SET datestyle = 'SQL, DMY'; SET intervalstyle = 'sql_standard';
              SET bytea_output = 'escape'; SET extra_float_digits = -10; SET search_path = shop;
              UPDATE orders SET customer = 'Ada'",
    )
    .await;
    insta::assert_snapshot!(shop.told().await, @r#"order/1 1 order.new {"id":1,"customer":"Ada","gross":119.00,"net":100.00,"at":"2026-11-29T12:00:00+00:00","secret":"\\xbeef","took":"PT26H"}"#);
}

/// Without a body function the body is the row. What is left out stays out, whatever it is called later; what is added comes.
#[tokio::test]
async fn the_row_is_the_body_as_the_table_is_now() {
    let mut shop = Shop::closed().await;
    shop.run("SELECT outbox.capture('shop.orders', 'order', left_out => 'secret, took')").await;
    shop.run("INSERT INTO shop.orders (customer) VALUES ('Ada \"A\" \\'); ALTER TABLE shop.orders RENAME secret TO \"Se\"\"cret\";
              ALTER TABLE shop.orders ADD COLUMN \"Note\" json DEFAULT '{\"a\": 1.50}', DROP COLUMN net;
              UPDATE shop.orders SET gross = 1.1").await;
    insta::assert_snapshot!(shop.told().await, @r#"
    order/1 1 order.new {"id":1,"customer":"Ada \"A\" \\","gross":0.00,"net":0.00,"at":"2026-11-29T12:00:00+00:00"}
    order/1 2 order.changed {"id":1,"customer":"Ada \"A\" \\","gross":1.10,"at":"2026-11-29T12:00:00+00:00","Note":{"a": 1.50}}
    "#);
    insta::assert_snapshot!(shop.ask("SELECT left_out FROM outbox.captured").await, @r#"Se"cret, took"#);
}

/// Of a row that the owner's row security hides, and of one that a body function does not find, no deletion is invented.
#[tokio::test]
async fn a_body_that_is_not_found_is_no_deletion() {
    let mut shop = Shop::closed().await;
    let (owner, writer) = (shop.role("owner").await, shop.role("writer").await);
    shop.run(&format!(
        "GRANT USAGE ON SCHEMA shop TO {owner}, {writer};
         CREATE FUNCTION shop.joined(bigint) RETURNS jsonb STABLE BEGIN ATOMIC
             SELECT to_jsonb(o) FROM shop.orders o JOIN shop.line l ON l.order_id = o.id WHERE o.id = $1 LIMIT 1; END;
         SELECT outbox.capture('shop.orders', 'order', body => 'shop.joined');
         CREATE TABLE shop.hidden (id bigint PRIMARY KEY, n int); ALTER TABLE shop.hidden OWNER TO {owner};
         SELECT outbox.capture('shop.hidden', 'hidden'); INSERT INTO shop.hidden VALUES (1, 1);
         ALTER TABLE shop.hidden ENABLE ROW LEVEL SECURITY; ALTER TABLE shop.hidden FORCE ROW LEVEL SECURITY;
         GRANT SELECT, UPDATE ON shop.hidden TO {writer}; CREATE POLICY p ON shop.hidden TO {writer} USING (true)"
    ))
    .await;
    let joined = shop.fails("INSERT INTO shop.orders (customer) VALUES ('Ada')").await;
    let hidden =
        shop.fails(&format!("BEGIN; SET LOCAL ROLE {writer}; UPDATE shop.hidden SET n = 2; COMMIT")).await;
    insta::assert_snapshot!(format!("{joined}\n{hidden}"), @r#"
    22004 the body function shop.joined(bigint) returned null for order/1, whose row exists
       -> It has to return a body for each row of the captured table. Look for an inner join that finds nothing, and for row security. A deletion is published only if the row itself is gone.
    42501 query would be affected by row-level security policy for table "hidden"
       -> To disable the policy for the table's owner, use ALTER TABLE NO FORCE ROW LEVEL SECURITY.
    "#);
}

/// Rows that are older than their capture have no event. The first change tells them, and so does their deletion, because a
/// baseline may have.
#[tokio::test]
async fn rows_that_are_older_than_their_capture() {
    let mut shop = Shop::closed().await;
    shop.run("INSERT INTO shop.orders (customer) VALUES ('Ada'), ('Bea'), ('Cleo'), ('Dora')").await;
    shop.run(CAPTURE).await;
    shop.run("UPDATE shop.orders SET customer = 'Ada' WHERE id = 1; DELETE FROM shop.orders WHERE id = 2;
              BEGIN; DELETE FROM shop.orders WHERE id = 3;
              INSERT INTO shop.orders (id, customer) OVERRIDING SYSTEM VALUE VALUES (3, 'Cleo II'); COMMIT;
              BEGIN; DELETE FROM shop.orders WHERE id = 4; INSERT INTO shop.orders (id) OVERRIDING SYSTEM VALUE VALUES (4);
              DELETE FROM shop.orders WHERE id = 4; COMMIT;
              BEGIN; INSERT INTO shop.orders (id) OVERRIDING SYSTEM VALUE VALUES (9); DELETE FROM shop.orders WHERE id = 9; COMMIT;
              ALTER TABLE shop.line DROP CONSTRAINT line_order_id_fkey; INSERT INTO shop.line (order_id, sku) VALUES (8, 'x')").await;
    insta::assert_snapshot!(shop.told().await, @r#"
    order/1 1 order.new {"id" : 1, "customer" : "Ada", "lines" : null}
    order/2 1 order.deleted {"id" : "2"}
    order/3 1 order.new {"id" : 3, "customer" : "Cleo II", "lines" : null}
    order/4 1 order.deleted {"id" : "4"}
    "#);
    let chains = "SELECT string_agg(concat_ws(' ', aggregate_id, version, state), ', ' ORDER BY aggregate_id) FROM outbox.aggregate";
    insta::assert_snapshot!(shop.ask(chains).await, @r"1 1 live, 2 1 ended, 3 1 live, 4 1 ended, 8 0 ended, 9 0 ended");
}

/// A writer needs no right on the outbox, and gets none; nor does the owner of a captured table.
#[tokio::test]
async fn a_writer_needs_its_rights_on_the_table_alone() {
    let mut shop = Shop::closed().await;
    let (owner, writer, stranger) =
        (shop.role("owner").await, shop.role("writer").await, shop.role("stranger").await);
    shop.run(&format!(
        "GRANT USAGE ON SCHEMA shop TO {owner}, {writer}, {stranger}; GRANT CREATE ON SCHEMA shop TO {owner};
         ALTER TABLE shop.orders OWNER TO {owner}; ALTER TABLE shop.line OWNER TO {owner};
         GRANT SELECT, INSERT, UPDATE, DELETE ON shop.orders, shop.line TO {writer}"
    ))
    .await;
    let capture = "SELECT outbox.capture('shop.orders', 'order', body => 'shop.who')";
    let mut told = Vec::new();
    told.push(shop.fails(&format!("SET ROLE {owner}; {capture}")).await);
    shop.run(&format!("RESET ROLE; SELECT outbox.grant_capture('{owner}')")).await;
    // The body function is the owner's: it runs with the owner's rights, and so does what replaces it.
    shop.run(&format!(
        "SET ROLE {owner};
         CREATE FUNCTION shop.who(bigint) RETURNS json LANGUAGE sql STABLE SET search_path = shop, pg_temp AS
             'SELECT json_build_object(''who'', split_part(current_user, ''_'', -1), ''customer'', customer)
              FROM orders WHERE id = $1';
         {capture}; SELECT outbox.capture('shop.line', 'order', key => 'order_id');
         SET ROLE {writer}; BEGIN; INSERT INTO shop.orders (customer) VALUES ('Ada');
         INSERT INTO shop.line (order_id, sku) VALUES (1, 'a'); COMMIT; DELETE FROM shop.line"
    ))
    .await;
    shop.run("RESET ROLE").await;
    told.push(shop.told().await);
    for sql in [
        "SELECT outbox.capture('shop.orders', 'order')",
        "SELECT outbox.append_captured(1, '1', '(0,1)', true, '{}')",
        "SELECT outbox_capture.read_1('{1}')",
        "SELECT outbox_capture.state_1('{1}', false)",
        "SELECT * FROM outbox.touched",
        "INSERT INTO outbox.touched (capture, lived, keys) VALUES (1, 0, '{1}')",
        "CREATE TABLE outbox_capture.mine (n int)",
    ] {
        told.push(format!("writer: {sql}\n{}", shop.fails(&format!("SET ROLE {writer}; {sql}")).await));
    }
    for sql in [
        "SELECT * FROM outbox.touched",
        "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload) VALUES ('order', '1', 3, 'x', '{}')",
        "UPDATE outbox.aggregate SET version = 7",
        "SELECT outbox.number_by('order', 'writer')",
    ] {
        told.push(format!("owner: {sql}\n{}", shop.fails(&format!("SET ROLE {owner}; {sql}")).await));
    }
    shop.run(&format!("RESET ROLE; SELECT outbox.grant_capture('{stranger}')")).await;
    told.push(format!("stranger:\n{}", shop.fails(&format!("SET ROLE {stranger}; {capture}")).await));
    // What everybody may call publishes what was touched, which is nothing.
    shop.run(&format!("RESET ROLE; DELETE FROM outbox.event; SET ROLE {stranger}; RESET ROLE")).await;
    // A generated function that its owner has changed runs with the rights of the writer, as each trigger may.
    shop.run(&format!(
        "SET ROLE {owner}; CREATE OR REPLACE FUNCTION outbox_capture.publish_1() RETURNS void LANGUAGE plpgsql AS
             $$ BEGIN EXECUTE 'CREATE TEMP TABLE IF NOT EXISTS who AS SELECT current_user AS name'; END $$; RESET ROLE"
    ))
    .await;
    shop.run(&format!("BEGIN; SET LOCAL ROLE {writer}; UPDATE shop.orders SET customer = 'Eve'; SET CONSTRAINTS ALL IMMEDIATE; COMMIT"))
        .await;
    let who = shop.ask("SELECT name::text FROM who").await;
    let version: i32 = sqlx::query_scalar("SELECT current_setting('server_version_num')::int / 10000")
        .fetch_one(&mut shop.conn)
        .await
        .unwrap();
    assert_eq!(who, if version < 18 { writer.clone() } else { owner.clone() });
    told.push(shop.problems().await);
    told.push(shop.fails("SELECT outbox.publish_state('order', '1')").await);
    let told = told
        .join("\n")
        .replace(owner.as_str(), "OWNER")
        .replace(writer.as_str(), "WRITER")
        .replace(stranger.as_str(), "STRANGER");
    insta::assert_snapshot!(told);
}

/// The owner of the outbox needs no right on captured tables either: each part of a capture has the rights of its own role.
#[tokio::test]
async fn the_owner_of_the_outbox_may_be_nobody_else() {
    let url = devstack::testing::database("capture").await;
    let mut shop = Shop { conn: PgConnection::connect(&url).await.unwrap(), url };
    let (outbox, owner, writer) =
        (shop.role("outbox").await, shop.role("owner").await, shop.role("writer").await);
    let database = shop.url.rsplit_once('/').unwrap().1.to_owned();
    shop.run(&format!("ALTER DATABASE {database} OWNER TO {outbox}; SET ROLE {outbox}")).await;
    install(&mut shop.conn, "shop").await.unwrap();
    shop.run(&format!(
        "SELECT outbox.grant_capture('{owner}'); RESET ROLE; CREATE SCHEMA shop AUTHORIZATION {owner}; SET ROLE {owner};
         CREATE TABLE shop.orders (id int PRIMARY KEY, note text); CREATE TABLE shop.line (order_id int, sku text);
         CREATE FUNCTION shop.body(int) RETURNS json STABLE BEGIN ATOMIC
             SELECT json_build_object('lines', (SELECT count(*) FROM shop.line l WHERE l.order_id = $1)); END;
         SELECT outbox.capture('shop.orders', 'order', body => 'shop.body');
         SELECT outbox.capture('shop.line', 'order', 'order_id');
         GRANT USAGE ON SCHEMA shop TO {writer}; GRANT INSERT ON shop.orders, shop.line TO {writer}; SET ROLE {writer};
         INSERT INTO shop.orders VALUES (1), (2); BEGIN; INSERT INTO shop.line VALUES (1, 'a'); INSERT INTO shop.line VALUES (2, 'b');
         COMMIT; SET ROLE {owner}; SELECT outbox.publish_state('order', '2'); RESET ROLE"
    ))
    .await;
    insta::assert_snapshot!(shop.told().await, @r#"
    order/1 1 order.new {"lines" : 0}
    order/2 1 order.new {"lines" : 0}
    order/1 2 order.changed {"lines" : 1}
    order/2 2 order.changed {"lines" : 1}
    order/2 3 order.baseline {"lines" : 1}
    "#);
    shop.run(&format!("SET ROLE {outbox}")).await;
    assert_eq!(shop.problems().await, "");
    shop.run(&format!("SET ROLE {owner}; SELECT outbox.uncapture('shop.orders')")).await;
}

/// What `capture` refuses, and with which words.
#[tokio::test]
async fn a_capture_that_can_not_work_is_refused() {
    let mut shop = Shop::closed().await;
    shop.run("CREATE COLLATION shop.loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
              CREATE TABLE shop.odd (n numeric PRIMARY KEY, c char(4) UNIQUE, t text COLLATE shop.loose UNIQUE, id bigint, u uuid UNIQUE);
              CREATE VIEW shop.seen AS SELECT * FROM shop.orders; CREATE TEMP TABLE passing (id bigint PRIMARY KEY);
              CREATE TABLE shop.parts (id bigint PRIMARY KEY) PARTITION BY RANGE (id);
              CREATE TABLE shop.part PARTITION OF shop.parts DEFAULT;
              CREATE FUNCTION shop.loose_path(bigint) RETURNS json LANGUAGE sql AS 'SELECT NULL::json';
              CREATE FUNCTION shop.twice(bigint) RETURNS json LANGUAGE sql AS 'SELECT NULL::json';
              CREATE FUNCTION shop.twice(text) RETURNS json LANGUAGE sql AS 'SELECT NULL::json';
              CREATE FUNCTION shop.wrong(bigint) RETURNS text LANGUAGE sql AS 'SELECT NULL::text';
              CREATE FUNCTION shop.fails(bigint) RETURNS json LANGUAGE plpgsql SET search_path = shop AS
                  'BEGIN RETURN (SELECT to_json(x) FROM nowhere x); END';
              SELECT outbox.number_by('counted', 'writer')").await;
    let mut told = Vec::new();
    for arguments in [
        "NULL, 'order'",
        "'shop.orders', NULL",
        "'shop.orders', repeat('a', 247)",
        "'shop.orders', 'order', ''",
        "'shop.orders', 'order', 'ID'",
        "'shop.odd', 'odd', 'n'",
        "'shop.odd', 'odd', 'c'",
        "'shop.odd', 'odd', 't'",
        "'shop.odd', 'odd', 'id'",
        "'shop.odd', 'odd', 'id', body => 'shop.order_body'",
        "'shop.seen', 'order'",
        "'passing', 'passing'",
        "'shop.part', 'part'",
        "'outbox.relay', 'relay'",
        "'shop.orders', 'counted'",
        "'shop.orders', 'order', left_out => 'secret, secrte'",
        "'shop.orders', 'order', left_out => 'secret', body => 'shop.order_body'",
        "'shop.orders', 'order', body => 'shop.nowhere'",
        "'shop.orders', 'order', body => 'shop.twice'",
        "'shop.orders', 'order', body => 'shop.wrong'",
        "'shop.orders', 'order', body => 'shop.loose_path'",
        "'shop.orders', 'order', body => 'shop.fails'",
        "'shop.orders', 'order', 'id, customer', body => 'shop.order_body'",
    ] {
        told.push(format!(
            "{arguments}\n   {}",
            shop.fails(&format!("SELECT outbox.capture({arguments})")).await
        ));
    }
    shop.run("SELECT outbox.capture('shop.orders', 'order')").await;
    for sql in [
        "SELECT outbox.capture('shop.line', 'order', 'order_id', body => 'shop.order_body')",
        "SELECT outbox.capture('shop.line', 'order', 'sku')",
        "SELECT outbox.capture('shop.odd', 'order', 'u')",
        "SELECT outbox.capture('shop.line', 'order', 'order_id, sku')",
        "SELECT outbox.uncapture('shop.line')",
        "SELECT outbox.uncapture('shop.orders', 'other')",
        "SELECT outbox.uncapture_type('nothing')",
        "SELECT outbox.publish_state('nothing', '1')",
        "SELECT outbox.publish_state('order', NULL)",
        "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload) VALUES ('order', '1', 1, 'order.new', '{}')",
    ] {
        told.push(format!("{sql}\n   {}", shop.fails(sql).await));
    }
    insta::assert_snapshot!(told.join("\n"));
    assert_eq!(shop.ask("SELECT count(*)::text FROM outbox.captured").await, "1");
}

/// Keys of several columns, and of each type that a key may have.
#[tokio::test]
async fn keys_of_several_columns_and_types() {
    let mut shop = Shop::closed().await;
    shop.run("CREATE DOMAIN shop.name AS varchar(20);
              CREATE TABLE shop.place (tenant uuid, \"Name\" shop.name, n smallint, PRIMARY KEY (n, tenant, \"Name\"));
              CREATE TABLE shop.guest (tenant uuid, at_name text, n smallint);
              CREATE FUNCTION shop.place_body(uuid, text, int) RETURNS jsonb STABLE BEGIN ATOMIC
                  SELECT jsonb_build_object('name', $2, 'guests', (SELECT count(*) FROM shop.guest g
                         WHERE (g.tenant, g.at_name, g.n) = ($1, $2, $3))); END;
              SELECT outbox.capture('shop.place', 'place', 'tenant, Name, n', body => 'shop.place_body');
              SELECT outbox.capture('shop.guest', 'place', 'tenant, at_name, n');
              INSERT INTO shop.place VALUES ('00000000-0000-0000-0000-00000000000a', 'a \"b\" \\ \u{e9}', 1);
              INSERT INTO shop.guest SELECT tenant, \"Name\", n FROM shop.place;
              INSERT INTO shop.guest VALUES (NULL, 'a', 1), ('00000000-0000-0000-0000-00000000000a', NULL, 1);
              UPDATE shop.guest SET n = 1; DELETE FROM shop.guest").await;
    insta::assert_snapshot!(shop.news().await);
    shop.run("CREATE TABLE shop.word (w text PRIMARY KEY); SELECT outbox.capture('shop.word', 'word', 'w'); INSERT INTO shop.word VALUES ('x')").await;
    let long = shop.fails("INSERT INTO shop.word VALUES (repeat('a', 256))").await;
    let empty = shop.fails("INSERT INTO shop.word VALUES ('')").await;
    let many = shop.fails("INSERT INTO shop.word VALUES ('y'), (repeat('a', 256))").await;
    insta::assert_snapshot!(format!("{}\n{long}\n{empty}\n{many}", shop.told().await), @r#"
    word/x 1 word.new {"w":"x"}
    22023 an aggregate of the captured type word has a key of 256 bytes
       -> A key has 1 to 255 bytes.
    22023 an aggregate of the captured type word has a key of 0 bytes
       -> A key has 1 to 255 bytes.
    22023 an aggregate of the captured type word has a key of 256 bytes
       -> A key has 1 to 255 bytes.
    "#);
}

/// A statement on a partition fires the triggers of that partition alone.
#[tokio::test]
async fn partitions_publish_whichever_table_a_statement_names() {
    let mut shop = Shop::closed().await;
    shop.run("CREATE TABLE shop.event (id bigint, year int, n int, PRIMARY KEY (id, year)) PARTITION BY RANGE (year);
              CREATE TABLE shop.event_old PARTITION OF shop.event FOR VALUES FROM (MINVALUE) TO (2026) PARTITION BY LIST (id);
              CREATE TABLE shop.event_old_1 (n int, year int NOT NULL, id bigint NOT NULL);
              ALTER TABLE shop.event_old ATTACH PARTITION shop.event_old_1 DEFAULT;
              SELECT outbox.capture('shop.event', 'event', 'id, year');
              INSERT INTO shop.event VALUES (1, 2025, 1); UPDATE shop.event_old SET n = 2; UPDATE shop.event_old_1 SET n = 3;
              CREATE TABLE shop.event_new PARTITION OF shop.event FOR VALUES FROM (2026) TO (MAXVALUE);
              UPDATE shop.event SET year = 2026; UPDATE shop.event_new SET n = 4").await;
    let before = format!("{}\n{}", shop.news().await, shop.problems().await);
    shop.run("SELECT outbox.capture('shop.event', 'event', 'id, year'); UPDATE shop.event_new SET n = 5; DELETE FROM shop.event_new").await;
    insta::assert_snapshot!(format!("{before}\n{}{}", shop.told().await, shop.problems().await));
}

/// After changes of the schema either everything goes on, or the writer's error and `doctor` say what to do.
#[tokio::test]
async fn changes_of_the_schema() {
    let mut shop = Shop::open().await;
    shop.run("INSERT INTO shop.orders (customer) VALUES ('Ada'); INSERT INTO shop.line (order_id, sku) VALUES (1, 'a')").await;
    let mut told = Vec::new();
    for (what, change, write, back) in [
        (
            "a key is renamed",
            "ALTER TABLE shop.line RENAME order_id TO of_order",
            "UPDATE shop.line SET sku = 'b'",
            "ALTER TABLE shop.line RENAME of_order TO order_id",
        ),
        (
            "the root is renamed",
            "ALTER TABLE shop.orders RENAME TO purchase",
            "UPDATE shop.purchase SET customer = 'Bea'",
            "ALTER TABLE shop.purchase RENAME TO orders",
        ),
        (
            "the root is swapped",
            "ALTER TABLE shop.orders RENAME TO orders_1; CREATE TABLE shop.orders (LIKE shop.orders_1)",
            "UPDATE shop.line SET sku = 'b'",
            "DROP TABLE shop.orders; ALTER TABLE shop.orders_1 RENAME TO orders",
        ),
        (
            "a child is renamed",
            "ALTER TABLE shop.line RENAME TO item",
            "UPDATE shop.item SET sku = 'renamed'",
            "ALTER TABLE shop.item RENAME TO line",
        ),
        (
            "the body function is renamed",
            "ALTER FUNCTION shop.order_body RENAME TO body",
            "UPDATE shop.line SET sku = 'b'",
            "ALTER FUNCTION shop.body RENAME TO order_body",
        ),
        (
            "triggers are disabled",
            "ALTER TABLE shop.line DISABLE TRIGGER ALL",
            "UPDATE shop.line SET sku = 'unseen'",
            "ALTER TABLE shop.line ENABLE TRIGGER USER",
        ),
        (
            "a trigger is dropped",
            "DROP TRIGGER outbox_capture_2_update ON shop.line",
            "UPDATE shop.line SET sku = 'unseen too'",
            "SELECT outbox.capture('shop.line', 'order', 'order_id')",
        ),
        ("all rows are removed", "SELECT 1", "TRUNCATE shop.orders CASCADE", "SELECT 1"),
        (
            "the type is given to its writers",
            "SELECT outbox.number_by('order', 'writer')",
            "UPDATE shop.line SET sku = 'b'",
            "SELECT outbox.number_by('order', 'outbox')",
        ),
        (
            "a child is dropped",
            "DROP TABLE shop.line CASCADE",
            "UPDATE shop.orders SET customer = 'Cleo'",
            "SELECT outbox.capture('shop.orders', 'order')",
        ),
    ] {
        shop.run(change).await;
        let (said, problems) = (shop.fails(write).await, shop.problems().await);
        shop.run(back).await;
        told.push(format!("{what}\n{said}\n{problems}"));
    }
    insta::assert_snapshot!(told.join("\n"));
    assert_eq!(shop.problems().await, "");
    insta::assert_snapshot!(shop.told().await, @r#"
    order/1 1 order.new {"id" : 1, "customer" : "Ada", "lines" : null}
    order/1 2 order.changed {"id" : 1, "customer" : "Ada", "lines" : "a"}
    order/1 3 order.changed {"id" : 1, "customer" : "Ada", "lines" : "renamed"}
    "#);
}

/// Where triggers do not fire nothing is published. What differs is found, and mended.
#[tokio::test]
async fn what_no_trigger_saw_is_found_and_published() {
    let mut shop = Shop::open().await;
    shop.run("INSERT INTO shop.orders (customer) VALUES ('Ada'), ('Bea'), ('Cleo');
              SET session_replication_role = replica; UPDATE shop.orders SET customer = 'Ada II' WHERE id = 1;
              DELETE FROM shop.orders WHERE id = 2; INSERT INTO shop.orders (customer) VALUES ('Dora'); RESET session_replication_role").await;
    let differs = "SELECT string_agg(concat_ws(' ', aggregate_id, differs), ', ' ORDER BY aggregate_id)
                   FROM outbox.captured_difference('order', '{1,2,3,4,5}')";
    let found = shop.ask(differs).await;
    shop.run("DELETE FROM outbox.event; SELECT outbox.publish_states('order', '{4,1,2,1}')").await;
    let mended = shop.ask("SELECT string_agg(concat_ws(' ', aggregate_id, version, type, payload, headers), E'\\n' ORDER BY position)
                           FROM outbox.event").await;
    insta::assert_snapshot!(format!("{found}\n{mended}"), @r#"
    1 changed, 2 deleted, 4 new
    1 2 order.baseline {"id" : 1, "customer" : "Ada II", "lines" : null} {"baseline": true}
    2 2 order.deleted {"id" : "2"}
    4 1 order.baseline {"id" : 4, "customer" : "Dora", "lines" : null} {"baseline": true}
    "#);
    assert_eq!(shop.ask(differs).await, "");
    let version =
        "SELECT concat_ws(' ', outbox.publish_state('order', '3'), outbox.publish_state('order', '2'))";
    assert_eq!(shop.ask(version).await, "2", "one baseline, and nothing to say of what is gone");
    // A transaction that only copies is published if another part of it was seen.
    shop.run("BEGIN; UPDATE shop.orders SET customer = 'Cleo II' WHERE id = 3; SET LOCAL session_replication_role = replica; COMMIT").await;
    assert_eq!(shop.ask("SELECT version::text FROM outbox.aggregate WHERE aggregate_id = '3'").await, "3");
}

/// Of what is erased no hash stays, so the next change is published in any case.
#[tokio::test]
async fn erasure_forgets_the_hash() {
    let mut shop = Shop::open().await;
    shop.run(
        "INSERT INTO shop.orders (customer) VALUES ('Ada'); SELECT outbox.erase('{order}', '{1}', '{2}')",
    )
    .await;
    assert_eq!(shop.ask("SELECT count(body_hash)::text FROM outbox.aggregate").await, "0");
    shop.run("UPDATE shop.orders SET customer = customer").await;
    insta::assert_snapshot!(shop.told().await, @r#"
    order/1 1 order.new {"id":"1","erased":true}
    order/1 2 order.changed {"id" : 1, "customer" : "Ada", "lines" : null}
    "#);
}

/// A position at or below the last one of the aggregate would be read before it.
#[tokio::test]
async fn a_sequence_that_is_behind_is_the_writers_error() {
    let mut shop = Shop::open().await;
    shop.run("INSERT INTO shop.orders (customer) VALUES ('Ada'), ('Bea'); DELETE FROM outbox.event; SELECT setval('outbox.position', 1, false)").await;
    let one = shop.fails("UPDATE shop.orders SET customer = 'Eve' WHERE id = 2").await;
    shop.run("SELECT setval('outbox.position', 1, false)").await;
    let many = shop.fails("UPDATE shop.orders SET customer = 'Eve'").await;
    insta::assert_snapshot!(format!("{one}\n{many}"), @r"
    55000 the next position is 1, and the last event of order/2 has 2
       -> The sequence outbox.position is behind: run outbox-relay recover --sequence.
    55000 the next position is 2, and the last event of order/2 has 2
       -> The sequence outbox.position is behind: run outbox-relay recover --sequence.
    ");
}

/// Transactions of a SERIALIZABLE application that change different orders do not fail because of the capture. In turns, each
/// notes and reads what it has touched, twice: with an index in which they meet, each pair would fail.
#[tokio::test]
async fn disjoint_rows_are_serializable() {
    let mut shop = Shop::open().await;
    shop.run("ALTER TABLE shop.orders SET (fillfactor = 50); INSERT INTO shop.orders (customer) SELECT 'c' FROM generate_series(1, 64)").await;
    let (mut one, mut two) = (shop.another().await, shop.another().await);
    let mut failed = 0;
    for n in 0..32 {
        for conn in [&mut one, &mut two] {
            run(conn, "BEGIN ISOLATION LEVEL SERIALIZABLE; SET CONSTRAINTS ALL IMMEDIATE").await;
        }
        for customer in ["d", "e"] {
            for (conn, id) in [(&mut one, 2 * n + 1), (&mut two, 2 * n + 2)] {
                let update = format!("UPDATE shop.orders SET customer = '{customer}' WHERE id = {id}");
                // One that failed before is aborted.
                let _failed = conn.execute(AssertSqlSafe(update)).await;
            }
        }
        for conn in [&mut one, &mut two] {
            failed += u32::from(conn.execute("COMMIT").await.is_err());
        }
    }
    let told: i64 = sqlx::query_scalar("SELECT count(*) FROM outbox.event WHERE version > 1")
        .fetch_one(&mut shop.conn)
        .await
        .unwrap();
    assert!(failed < 2 && told >= 126, "{failed} of 64 failed, and {told} changes were published");
}

/// What is not captured any more is not published, and a new capture goes on with the versions.
#[tokio::test]
async fn a_capture_ends_and_begins_again() {
    let mut shop = Shop::open().await;
    shop.run(
        "INSERT INTO shop.orders (customer) VALUES ('Ada'); SELECT outbox.uncapture('shop.line');
              INSERT INTO shop.line (order_id, sku) VALUES (1, 'unseen');
              BEGIN; UPDATE shop.orders SET customer = 'seen'; SELECT outbox.uncapture('shop.orders');
              UPDATE shop.orders SET customer = 'unseen'; COMMIT",
    )
    .await;
    let left = "SELECT concat_ws(' ', (SELECT count(*) FROM pg_proc WHERE pronamespace = 'outbox_capture'::regnamespace),
                                 (SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'outbox_capture%'),
                                 (SELECT count(*) FROM outbox.captured))";
    assert_eq!(shop.ask(left).await, "1 0 0");
    shop.run(CAPTURE).await;
    shop.run(CAPTURE).await;
    shop.run("UPDATE shop.orders SET customer = 'Bea'").await;
    insta::assert_snapshot!(shop.told().await, @r#"
    order/1 1 order.new {"id" : 1, "customer" : "Ada", "lines" : null}
    order/1 2 order.changed {"id" : 1, "customer" : "seen", "lines" : "unseen"}
    order/1 3 order.changed {"id" : 1, "customer" : "Bea", "lines" : "unseen"}
    "#);
}

/// Changes the tables as an application does, with no right on the outbox.
const WORK: &str = "BEGIN; INSERT INTO shop.orders (customer) VALUES ('Ada'), ('Bea'); UPDATE shop.orders SET gross = gross + 1;
                    COMMIT; INSERT INTO shop.line (order_id, sku) SELECT min(id), 'a' FROM shop.orders;
                    UPDATE shop.line SET sku = 'b'; DELETE FROM shop.orders WHERE id = (SELECT max(id) FROM shop.orders)";

/// The triggers of captures, and what they do for a table: all of them, and those that go with the outbox.
const TRIGGERS: &str =
    "SELECT concat_ws(' ', count(*), count(tgqual)) FROM pg_trigger WHERE tgname LIKE 'outbox_capture%'";

/// Who drops the schema of the outbox, and nothing else, stops no writer of a captured table. The outbox may come again.
#[tokio::test]
async fn an_outbox_that_is_dropped_leaves_no_trigger() {
    for drop in [
        "DROP SCHEMA outbox CASCADE",
        "DROP TABLE outbox.touched CASCADE",
        "DROP SCHEMA outbox_capture CASCADE",
    ] {
        let mut shop = Shop::open().await;
        let writer = shop.role("writer").await;
        shop.run(&format!(
            "CREATE TABLE shop.visit (id int, day int) PARTITION BY LIST (day);
             CREATE TABLE shop.visit_1 PARTITION OF shop.visit FOR VALUES IN (1);
             CREATE INDEX ON shop.visit (id);
             CREATE FUNCTION shop.visit_body(int) RETURNS json STABLE BEGIN ATOMIC SELECT '1'::json; END;
             SELECT outbox.capture('shop.visit', 'visit', body => 'shop.visit_body');
             GRANT USAGE ON SCHEMA shop TO {writer};
             GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES IN SCHEMA shop TO {writer}"
        ))
        .await;
        let work = format!("SET ROLE {writer}; {WORK}; INSERT INTO shop.visit_1 VALUES (1, 1); RESET ROLE");
        shop.run(&work).await;
        assert_eq!(shop.ask(TRIGGERS).await, "16 16", "{drop}");
        // A truncated table is refused while it is captured.
        assert!(shop.fails("TRUNCATE shop.line").await.contains("is captured"));
        shop.run(drop).await;
        shop.run(&work).await;
        shop.run(&format!("SET ROLE {writer}; TRUNCATE shop.line, shop.orders; RESET ROLE")).await;
        assert_eq!(shop.ask(TRIGGERS).await, "0 0", "{drop}");
        if drop.starts_with("DROP SCHEMA outbox ") {
            // And again, with what the first one has left in the other schema.
            install(&mut shop.conn, "shop").await.unwrap();
            shop.run(CAPTURE).await;
            shop.run(&work).await;
            assert_eq!(shop.ask("SELECT count(*)::text FROM outbox.event").await, "5");
        }
    }
}

/// An outbox that captures already gets such triggers by the migration, as far as its owner may make them. One that was
/// disabled stays so.
#[tokio::test]
async fn the_triggers_of_an_earlier_release_are_renewed() {
    let url = devstack::testing::database("capture").await;
    let mut shop = Shop { conn: PgConnection::connect(&url).await.unwrap(), url };
    let database = shop.url.rsplit_once('/').unwrap().1.to_owned();
    let (owner, other) = (shop.role("owner").await, shop.role("other").await);
    shop.run(&format!("ALTER DATABASE {database} OWNER TO {owner}; SET ROLE {owner}")).await;
    let mut earlier = outbox::migrator();
    earlier.migrations.to_mut().retain(|migration| migration.version <= 22);
    earlier.run(&mut shop.conn).await.unwrap();
    shop.run("INSERT INTO outbox.source (name) VALUES ('shop')").await;
    shop.run(SHOP).await;
    shop.run(CAPTURE).await;
    shop.run(&format!(
        "ALTER TABLE shop.line DISABLE TRIGGER outbox_capture_2_truncate; SELECT outbox.grant_capture('{other}'); RESET ROLE;
         CREATE SCHEMA other AUTHORIZATION {other}; GRANT USAGE ON SCHEMA other TO {owner}; SET ROLE {other}; CREATE TABLE other.thing (id int PRIMARY KEY);
         SELECT outbox.capture('other.thing', 'thing'); SET ROLE {owner}"
    ))
    .await;
    assert_eq!(shop.ask(TRIGGERS).await, "12 0");
    install(&mut shop.conn, "shop").await.unwrap();
    assert_eq!(shop.ask(TRIGGERS).await, "12 8");
    let disabled =
        "SELECT string_agg(tgname, ' ') FROM pg_trigger WHERE tgenabled <> 'O' AND NOT tgisinternal
                    AND tgname LIKE 'outbox_capture%'";
    assert_eq!(shop.ask(disabled).await, "outbox_capture_2_truncate");
    insta::assert_snapshot!(shop.problems().await);
    shop.run(&format!("SET ROLE {other}; SELECT outbox.capture('other.thing', 'thing'); SET ROLE {owner}"))
        .await;
    shop.run(CAPTURE).await;
    assert_eq!(shop.ask(TRIGGERS).await, "12 12");
    assert_eq!(shop.problems().await, "");
    shop.run(WORK).await;
    shop.run("DROP SCHEMA outbox CASCADE").await;
    shop.run(&format!("{WORK}; SET ROLE {other}; INSERT INTO other.thing VALUES (1)")).await;
}

/// Only a member of the role that owns a captured table may change its capture, by whatever way, and the owner of the outbox.
#[tokio::test]
async fn a_capture_belongs_to_the_owner_of_its_table() {
    let url = devstack::testing::database("capture").await;
    let mut shop = Shop { conn: PgConnection::connect(&url).await.unwrap(), url };
    let database = shop.url.rsplit_once('/').unwrap().1.to_owned();
    let (outbox, owner, member, other) = (
        shop.role("outbox").await,
        shop.role("owner").await,
        shop.role("member").await,
        shop.role("other").await,
    );
    shop.run(&format!("ALTER DATABASE {database} OWNER TO {outbox}; SET ROLE {outbox}")).await;
    install(&mut shop.conn, "shop").await.unwrap();
    let capture = format!(
        "SET ROLE {owner}; SELECT outbox.capture('shop.orders', 'order'); SELECT outbox.capture('shop.line', 'order', 'order_id');
         RESET ROLE"
    );
    shop.run(&format!(
        "SELECT outbox.grant_capture('{owner}'), outbox.grant_capture('{other}'); RESET ROLE; GRANT {owner} TO {member};
         CREATE SCHEMA shop AUTHORIZATION {owner}; GRANT USAGE ON SCHEMA shop TO {other}; SET ROLE {owner};
         CREATE TABLE shop.orders (id int PRIMARY KEY); CREATE TABLE shop.line (order_id int); SET ROLE {other};
         RESET ROLE;
         CREATE SCHEMA mine AUTHORIZATION {other}; SET ROLE {other}; CREATE TABLE mine.t (id int PRIMARY KEY)"
    ))
    .await;
    shop.run(&capture).await;
    let mut told = Vec::new();
    for sql in [
        "SELECT outbox.uncapture('shop.line')",
        "SELECT outbox.uncapture('shop.orders')",
        "SELECT outbox.uncapture_type('order')",
        "SELECT outbox.drop_captured_table(2)",
        "SELECT outbox.capture('shop.orders', 'order')",
        "SELECT outbox.capture('shop.line', 'order', 'order_id')",
        "DELETE FROM outbox.captured_table",
        "DELETE FROM outbox.captured_table WHERE number = 2",
        "UPDATE outbox.captured_type SET left_out = '{1}'",
        "UPDATE outbox.captured_table SET relation = 'mine.t'::regclass",
        "INSERT INTO outbox.captured_type (aggregate_type, root, root_name) VALUES ('o', 'shop.orders', 'shop.orders')",
        "INSERT INTO outbox.captured_table (capture, relation, name, key_columns, key_names)
         SELECT 1, c.oid, format('%I.%I', n.nspname, c.relname), '{1}', '{id}'
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = 'mine.t'::regclass",
        // Statements are made of the name.
        "INSERT INTO outbox.captured_type (aggregate_type, root, root_name) VALUES ('o', 'mine.t', 'mine.t; DROP SCHEMA shop')",
    ] {
        let said = shop.fails(&format!("SET ROLE {other}; {sql}")).await;
        told.push(format!("{sql}\n{said}"));
    }
    let captured = "SELECT string_agg(table_name, ' ' ORDER BY number) FROM outbox.captured";
    assert_eq!(shop.ask(captured).await, "shop.orders shop.line");
    let ends = format!("SET ROLE {other}; SELECT outbox.uncapture_type('order')");
    let told = [told.join("\n"), shop.fails(&ends).await].join("\n");
    // A member of the owner may, and the owner of the outbox, who has no right on the tables.
    for role in [&owner, &member, &outbox] {
        for end in [
            "SELECT outbox.uncapture_type('order')",
            "SELECT outbox.uncapture('shop.line'); SELECT outbox.uncapture_type('order')",
        ] {
            let end = if role == &outbox && end.contains("uncapture(") {
                "SELECT outbox.uncapture_type('order')"
            } else {
                end
            };
            shop.run(&format!("SET ROLE {role}; {end}; RESET ROLE")).await;
            assert_eq!(shop.ask(TRIGGERS).await, "0 0");
            assert_eq!(shop.ask(captured).await, "");
            shop.run(&capture).await;
        }
    }
    // Of tables that were dropped, their former owner may, and no other role.
    shop.run("DROP TABLE shop.orders, shop.line").await;
    let told = [told, shop.fails(&ends).await].join("\n");
    shop.run(&format!("SET ROLE {owner}; SELECT outbox.uncapture_type('order'); RESET ROLE")).await;
    assert_eq!(shop.ask(captured).await, "");
    let mut told = told;
    for (role, name) in [(&outbox, "OUTBOX"), (&owner, "OWNER"), (&member, "MEMBER"), (&other, "OTHER")] {
        told = told.replace(role.as_str(), name);
    }
    insta::assert_snapshot!(told);
}

/// An installation that captures nothing has an empty table; the first capture makes the index wide, and there is no second
/// time.
#[tokio::test]
async fn the_index_of_what_is_touched_is_made_by_the_first_capture() {
    let mut shop = Shop::closed().await;
    let stands = "SELECT concat_ws(' ', pg_relation_size('outbox.touched'), pg_relation_size('outbox.touched_xid') / 8192 > 1000,
                                   (SELECT count(*) FROM outbox.touched))";
    assert_eq!(shop.ask(stands).await, "0 f 0");
    shop.run(CAPTURE).await;
    let wide = shop.ask(stands).await;
    assert!(wide.ends_with(" t 0") && wide != "0 t 0", "{wide}");
    let other = shop.role("other").await;
    shop.run(&format!("SELECT outbox.uncapture('shop.orders'); SELECT outbox.grant_capture('{other}')"))
        .await;
    shop.run(CAPTURE).await;
    assert_eq!(shop.ask(stands).await, wide);
}
