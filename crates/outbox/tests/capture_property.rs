//! Random transactions of concurrent writers over captured tables, in each isolation level. What they do is drawn from a
//! seed, which a failure prints; `CAPTURE_SEED` repeats it, but for how the writers meet. The verdict does not depend on that:
//! of each aggregate, the events replay what each transaction did to its rows.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use devstack::{folder::Folder, ports, postgres::Postgres, testing::Place};
use outbox::install;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const WRITERS: u64 = 6;
const TRANSACTIONS: u64 = 150;

/// Orders have lines, accounts are rows. Row triggers note what each transaction did; the capture knows nothing of them.
const TABLES: [&str; 9] = [
    "CREATE TABLE orders (id bigint PRIMARY KEY, note int NOT NULL)",
    "CREATE TABLE line (id bigint PRIMARY KEY, order_id bigint REFERENCES orders ON DELETE CASCADE, n int NOT NULL)",
    "CREATE INDEX ON line (order_id)",
    "CREATE TABLE account (id text PRIMARY KEY, n int NOT NULL)",
    "CREATE TABLE log (number bigserial, xid text DEFAULT pg_current_xact_id()::text, source text, before json, after json)",
    "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
         INSERT INTO log (source, before, after) VALUES (TG_TABLE_NAME,
             CASE WHEN TG_OP <> 'INSERT' THEN to_json(OLD) END, CASE WHEN TG_OP <> 'DELETE' THEN to_json(NEW) END);
         RETURN NULL; END $$",
    "DO $$ DECLARE t text; BEGIN FOREACH t IN ARRAY ARRAY['orders', 'line', 'account'] LOOP
         EXECUTE format('CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON %I FOR EACH ROW EXECUTE FUNCTION note()', t);
     END LOOP; END $$",
    "CREATE FUNCTION order_body(bigint) RETURNS json STABLE BEGIN ATOMIC
         SELECT json_build_object('id', o.id, 'note', o.note, 'lines', (
             SELECT coalesce(json_object_agg(l.id, l.n), '{}') FROM line l WHERE l.order_id = o.id))
         FROM orders o WHERE o.id = $1; END",
    "SELECT outbox.capture('orders', 'order', body => 'public.order_body'),
            outbox.capture('line', 'order', 'order_id'), outbox.capture('account', 'account')",
];

/// Numbers from a seed (splitmix64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    /// A statement on the captured tables.
    fn statement(&mut self) -> String {
        let (order, other, line, n) = (self.below(5), self.below(5), self.below(12), self.below(4));
        match self.below(15) {
            0 => format!(
                "INSERT INTO orders VALUES ({order}, {n}) ON CONFLICT (id) DO UPDATE SET note = excluded.note"
            ),
            1 => format!(
                "INSERT INTO orders SELECT g, {n} FROM generate_series({order}, {other}) g ON CONFLICT DO NOTHING"
            ),
            2 => format!("UPDATE orders SET note = {n} WHERE id = {order}"),
            3 => format!("UPDATE orders SET note = {n} WHERE id BETWEEN {order} AND {other}"),
            4 => format!("DELETE FROM orders WHERE id = {order}"),
            5 => format!("UPDATE orders SET id = {other} WHERE id = {order}"),
            6 => format!(
                "INSERT INTO line SELECT {line}, id, {n} FROM orders WHERE id = {order}
                 ON CONFLICT (id) DO UPDATE SET n = excluded.n"
            ),
            7 => format!(
                "UPDATE line SET order_id = {other} WHERE id = {line} AND EXISTS (SELECT FROM orders WHERE id = {other})"
            ),
            8 => format!("UPDATE line SET order_id = NULL WHERE id = {line}"),
            9 => format!("UPDATE line SET n = {n} WHERE order_id = {order}"),
            10 => format!("DELETE FROM line WHERE order_id = {order} OR id = {line}"),
            11 => format!(
                "MERGE INTO orders o USING (VALUES ({order}, {n}), (7, {line})) AS v (id, n) ON o.id = v.id
                 WHEN MATCHED AND v.n = 0 THEN DELETE WHEN MATCHED THEN UPDATE SET note = v.n
                 WHEN NOT MATCHED THEN INSERT VALUES (v.id, v.n)"
            ),
            12 => format!(
                "INSERT INTO account VALUES ('a{order}', {n}), ('b{other}', {n}) ON CONFLICT (id) DO UPDATE SET n = excluded.n"
            ),
            13 => format!("DELETE FROM account WHERE id IN ('a{order}', 'b{other}')"),
            _ => format!(
                "UPDATE account SET n = {n}, id = CASE id WHEN 'a{order}' THEN 'c{other}' ELSE id END WHERE n < {n}"
            ),
        }
    }
}

/// Runs a statement; whether the transaction goes on. What conflicts may bring is no fault, nor is a server that crashes.
async fn takes(conn: &mut PgConnection, sql: &str) -> bool {
    match conn.execute(AssertSqlSafe(sql.to_owned())).await {
        Ok(_) => true,
        Err(error) => {
            // A connection that is lost: the next transaction finds out.
            let Some(error) = error.into_database_error() else { return false };
            let code = error.code().unwrap_or_default().into_owned();
            assert!(
                ["40001", "40P01", "23503", "23505", "21000", "57P01", "57P02", "57P03"]
                    .contains(&code.as_str()),
                "{sql}: {error}"
            );
            false
        }
    }
}

async fn copies(conn: &mut PgConnection, rows: String) -> bool {
    let Ok(mut copy) = conn.copy_in_raw("COPY orders FROM STDIN").await else { return false };
    copy.send(rows.into_bytes()).await.is_ok() && copy.finish().await.is_ok()
}

/// A connection to a server that is being started again, without what the writer had prepared: it is committed. The server
/// may crash once more meanwhile.
async fn connect_again(url: &str, gid: &str) -> PgConnection {
    let end = Instant::now() + devstack::testing::DEADLINE;
    loop {
        match connect_and_commit(url, gid).await {
            Ok(conn) => return conn,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn connect_and_commit(url: &str, gid: &str) -> sqlx::Result<PgConnection> {
    let mut conn = PgConnection::connect(url).await?;
    let prepared = "SELECT EXISTS (SELECT FROM pg_prepared_xacts WHERE gid = $1)";
    if sqlx::query_scalar(prepared).bind(gid).fetch_one(&mut conn).await? {
        conn.execute(AssertSqlSafe(format!("COMMIT PREPARED '{gid}'"))).await?;
    }
    Ok(conn)
}

/// One writer's transactions. Returns how many were committed. `crashes`: the server may be gone for a while.
async fn write(url: String, writer: u64, mut dice: Dice, crashes: bool) -> u64 {
    let mut conn = PgConnection::connect(&url).await.unwrap();
    let mut committed = 0;
    let gid = format!("{}_{writer}", url.rsplit_once('/').unwrap().1);
    for _ in 0..TRANSACTIONS {
        while let Err(error) = conn.execute("SET deadlock_timeout = '20ms'").await {
            assert!(crashes, "{error}");
            conn = connect_again(&url, &gid).await;
        }
        let level =
            ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"][usize::try_from(dice.below(3)).unwrap()];
        let mut goes_on = takes(&mut conn, &format!("BEGIN ISOLATION LEVEL {level}")).await;
        assert!(goes_on || crashes);
        for _ in 0..=dice.below(4) {
            goes_on = goes_on
                && match dice.below(6) {
                    // A part that is taken back, and one that stays.
                    0 => {
                        takes(&mut conn, "SAVEPOINT s").await;
                        let (one, two) = (dice.statement(), dice.statement());
                        let _may_fail = takes(&mut conn, &one).await && takes(&mut conn, &two).await;
                        takes(&mut conn, "ROLLBACK TO s").await
                    }
                    1 => {
                        let (one, two) = (dice.statement(), dice.statement());
                        takes(&mut conn, "SAVEPOINT s").await
                            && takes(&mut conn, &one).await
                            && takes(&mut conn, "RELEASE s").await
                            && takes(&mut conn, &two).await
                    }
                    2 => {
                        let rows = format!(
                            "{}\t{}\n{}\t1\n",
                            100 + writer * 1000 + dice.below(900),
                            dice.below(4),
                            8 + dice.below(2)
                        );
                        copies(&mut conn, rows).await
                    }
                    _ => {
                        let sql = dice.statement();
                        takes(&mut conn, &sql).await
                    }
                };
            if !goes_on {
                break;
            }
        }
        match dice.below(10) {
            0 => {
                takes(&mut conn, "ROLLBACK").await;
            }
            // The client dies.
            1 => {
                drop(conn);
                conn = connect_again(&url, &gid).await;
            }
            2 | 3 if goes_on => {
                if takes(&mut conn, &format!("PREPARE TRANSACTION '{gid}'")).await {
                    let ends = if dice.below(3) == 0 { "ROLLBACK" } else { "COMMIT" };
                    takes(&mut conn, &format!("{ends} PREPARED '{gid}'")).await;
                    committed += u64::from(ends == "COMMIT");
                }
            }
            // After a failure this is a rollback.
            _ => committed += u64::from(takes(&mut conn, "COMMIT").await && goes_on),
        }
    }
    committed
}

/// The rows of an aggregate, as the transactions that published it left them.
#[derive(Default)]
struct Rows {
    root: Option<Value>,
    lines: BTreeMap<String, Value>,
}

impl Rows {
    /// What a transaction did to one row.
    fn apply(&mut self, id: &str, source: &str, before: &Value, after: &Value) {
        let of = |row: &Value, column: &str| {
            row.get(column).map(|v| v.as_str().map_or(v.to_string(), str::to_owned))
        };
        if source == "line" {
            if of(before, "order_id").as_deref() == Some(id) {
                self.lines.remove(&before["id"].to_string());
            }
            if of(after, "order_id").as_deref() == Some(id) {
                self.lines.insert(after["id"].to_string(), after["n"].clone());
            }
        } else {
            if of(before, "id").as_deref() == Some(id) {
                self.root = None;
            }
            if of(after, "id").as_deref() == Some(id) {
                self.root = Some(after.clone());
            }
        }
    }

    /// Its body; none when it is gone.
    fn body(&self, aggregate_type: &str) -> Option<Value> {
        let mut body = self.root.clone()?;
        if aggregate_type == "order" {
            body["lines"] = json!(self.lines);
        }
        Some(body)
    }
}

#[tokio::test]
async fn each_event_is_the_state_that_its_transaction_committed() {
    let url = devstack::testing::database("capture_property").await;
    let (mut conn, writers) = begin(&url, false).await;
    let committed = finish(writers).await;
    verify(&mut conn, committed).await;
}

/// The server crashes beside the writers, three times: what it had noted of transactions under way is gone with them, and
/// what was prepared is published as it was.
#[tokio::test]
async fn a_crash_of_the_server_changes_nothing_of_it() {
    let folder = Folder::temporary().unwrap();
    let mut server = Postgres::new(&folder, ports::free(), true).await.unwrap();
    server.start().await.unwrap();
    let place = Place { postgres: server.url(), amqp: String::new(), management: String::new() };
    let url = place.database("capture_crash").await;
    let (mut conn, writers) = begin(&url, true).await;
    for crash in 1..=3 {
        devstack::testing::until("the writers have come further", async || {
            let events: i64 =
                sqlx::query_scalar("SELECT count(*) FROM outbox.event").fetch_one(&mut conn).await.unwrap();
            events >= crash * 100
        })
        .await;
        assert!(writers.iter().any(|writer| !writer.is_finished()), "they were done before crash {crash}");
        server.abort().await;
        server.start().await.unwrap();
        conn = PgConnection::connect(&url).await.unwrap();
    }
    let committed = finish(writers).await;
    verify(&mut conn, committed).await;
    server.stop(&CancellationToken::new()).await;
}

/// Captured tables, with writers that are under way.
async fn begin(url: &str, crashes: bool) -> (PgConnection, Vec<JoinHandle<u64>>) {
    let seed = std::env::var("CAPTURE_SEED")
        .map_or_else(|_| uuid::Uuid::new_v4().as_u64_pair().0, |seed| seed.parse().unwrap());
    println!("CAPTURE_SEED={seed}");
    let mut conn = PgConnection::connect(url).await.unwrap();
    install(&mut conn, "shop").await.unwrap();
    for sql in TABLES {
        conn.execute(sql).await.unwrap();
    }
    let mut dice = Dice(seed);
    let writers = (0..WRITERS)
        .map(|writer| tokio::spawn(write(url.to_owned(), writer, Dice(dice.below(u64::MAX)), crashes)))
        .collect();
    (conn, writers)
}

/// How many transactions were committed.
async fn finish(writers: Vec<JoinHandle<u64>>) -> u64 {
    let mut committed = 0;
    for writer in writers {
        committed += writer.await.unwrap();
    }
    assert!(committed > WRITERS * TRANSACTIONS / 4, "only {committed} were committed");
    committed
}

/// Asserts that the events replay the transactions.
async fn verify(conn: &mut PgConnection, committed: u64) {
    // One event for each aggregate and transaction, versions from 1 by position, and each names the one before.
    let wrong: Vec<String> = sqlx::query_scalar(
        "SELECT format('%s/%s version %s at position %s', aggregate_type, aggregate_id, version, position)
         FROM (SELECT e.*, row_number() OVER a AS number, lag(id, 1, '00000000-0000-0000-0000-000000000000') OVER a AS before,
                      count(*) OVER (PARTITION BY aggregate_type, aggregate_id, xmin::text) AS of_transaction
               FROM (SELECT *, xmin FROM outbox.event) e
               WINDOW a AS (PARTITION BY aggregate_type, aggregate_id ORDER BY position)) AS e
         WHERE version <> number OR previous_id <> before OR of_transaction > 1",
    )
    .fetch_all(&mut *conn)
    .await
    .unwrap();
    assert!(wrong.is_empty(), "{wrong:#?}");

    // Each body is what the rows were after its transaction, and the events are no more than needed.
    let log: Vec<(String, String, Value, Value)> = sqlx::query_as(
        "SELECT (xid::bigint % 4294967296)::text, source, coalesce(before, 'null'), coalesce(after, 'null') FROM log ORDER BY number",
    )
    .fetch_all(&mut *conn)
    .await
    .unwrap();
    let mut by_transaction: BTreeMap<&str, Vec<(&str, &Value, &Value)>> = BTreeMap::new();
    for (xid, source, before, after) in &log {
        by_transaction.entry(xid).or_default().push((source, before, after));
    }
    let events: Vec<(String, String, String, String, Value)> = sqlx::query_as(
        "SELECT aggregate_type, aggregate_id, type, xmin::text, payload FROM outbox.event ORDER BY position",
    )
    .fetch_all(&mut *conn)
    .await
    .unwrap();
    let mut aggregates: BTreeMap<(&str, &str), Rows> = BTreeMap::new();
    for (aggregate_type, id, type_, xid, payload) in &events {
        let rows = aggregates.entry((aggregate_type, id)).or_default();
        let before = rows.body(aggregate_type);
        for (source, row_before, row_after) in by_transaction.get(xid.as_str()).into_iter().flatten() {
            if (*source == "account") == (aggregate_type == "account") {
                rows.apply(id, source, row_before, row_after);
            }
        }
        let after = rows.body(aggregate_type);
        let what = format!("{aggregate_type}/{id} {type_} of {xid}");
        assert_ne!(before, after, "{what} says nothing new");
        let expected = match (&before, &after) {
            (None, Some(_)) => "new",
            (Some(_), Some(_)) => "changed",
            _ => "deleted",
        };
        assert_eq!(*type_, format!("{aggregate_type}.{expected}"), "{what}");
        assert_eq!(*payload, after.unwrap_or_else(|| json!({"id": id})), "{what}");
    }

    // The last event of each is what the tables have, and no transaction left anything behind.
    let differs: Vec<String> = sqlx::query_scalar(
        "SELECT concat_ws(' ', k.type, d.aggregate_id, d.differs)
         FROM (SELECT 'order' AS type, array_agg(id::text) AS ids FROM (SELECT id FROM orders UNION SELECT aggregate_id::bigint FROM outbox.event WHERE aggregate_type = 'order') o
               UNION ALL SELECT 'account', array_agg(id) FROM (SELECT id FROM account UNION SELECT aggregate_id FROM outbox.event WHERE aggregate_type = 'account') a) AS k,
              outbox.captured_difference(k.type, k.ids) AS d
         UNION ALL SELECT 'touched' FROM outbox.touched",
    )
    .fetch_all(&mut *conn)
    .await
    .unwrap();
    assert!(differs.is_empty(), "{differs:#?}");
    println!("{committed} committed, {} events", events.len());
}
