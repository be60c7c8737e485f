//! What captured tables and `outbox.publish` cost a writer, next to the same transaction without.

use sqlx::{Connection, Executor, PgConnection};
use tokio::time::Instant;

use super::{
    figure::{Figure, Row},
    goal::Goal,
    pgbench,
    statistics::rate,
    testbed::Testbed,
};

const DATABASE: &str = "bench_capture";
/// A program that may publish, and has no further right on the outbox.
const WRITER: &str = "person_api";
/// Rows of the tables of which a transaction writes one.
const ROWS: i64 = 10_000;
/// One: what is measured is how long a transaction takes, and not how many go side by side.
const CLIENTS: u32 = 1;

/// Orders with three lines each, and baskets with two items; and a table that is not captured.
const SHOP: &str = "
    CREATE SCHEMA shop;
    CREATE TABLE shop.orders (id bigint PRIMARY KEY, customer text NOT NULL, n int NOT NULL, at timestamptz DEFAULT now());
    CREATE TABLE shop.line (id bigint PRIMARY KEY, order_id bigint REFERENCES shop.orders, sku text NOT NULL, n int NOT NULL);
    CREATE INDEX ON shop.line (order_id);
    CREATE TABLE shop.plain (LIKE shop.orders INCLUDING ALL);
    CREATE TABLE shop.own (LIKE shop.orders INCLUDING ALL, version bigint NOT NULL DEFAULT 1);
    CREATE TABLE shop.basket (LIKE shop.orders INCLUDING ALL);
    CREATE TABLE shop.item (id bigint PRIMARY KEY, basket_id bigint REFERENCES shop.basket, sku text NOT NULL);
    CREATE INDEX ON shop.item (basket_id);
    CREATE FUNCTION shop.order_body(of_id bigint) RETURNS json STABLE LANGUAGE plpgsql SET search_path = shop, pg_temp AS $$
    BEGIN
        RETURN (SELECT json_build_object('id', o.id, 'customer', o.customer, 'n', o.n, 'at', o.at, 'lines', (
                    SELECT json_agg(json_build_object('sku', l.sku, 'n', l.n) ORDER BY l.id) FROM line l WHERE l.order_id = o.id))
                FROM orders o WHERE o.id = of_id);
    END $$;
    CREATE FUNCTION shop.basket_body(of_id bigint) RETURNS json STABLE LANGUAGE plpgsql SET search_path = shop, pg_temp AS $$
    BEGIN
        RETURN (SELECT json_build_object('id', b.id, 'customer', b.customer, 'n', b.n, 'items', (
                    SELECT json_agg(i.sku ORDER BY i.id) FROM item i WHERE i.basket_id = b.id))
                FROM basket b WHERE b.id = of_id);
    END $$;";

/// The tables have their rows, and then each aggregate has its first event.
const CAPTURE: &str = "
    SELECT outbox.capture('shop.orders', 'order', body => 'shop.order_body'), outbox.capture('shop.line', 'order', 'order_id'),
           outbox.capture('shop.basket', 'basket', body => 'shop.basket_body'),
           outbox.capture('shop.item', 'basket', 'basket_id');
    UPDATE shop.orders SET n = 1;
    INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    SELECT 'own', o.id::text, 1, 'own.new', row_to_json(o) FROM shop.own o;
    GRANT USAGE ON SCHEMA shop TO person_api;
    GRANT SELECT, UPDATE ON ALL TABLES IN SCHEMA shop TO person_api;";

/// A transaction as an application has it: each part is a round trip.
fn transaction(table: &str, then: &str) -> String {
    let also = if table == "own" { ", version = version + 1" } else { "" };
    format!(
        "\\set id random(1, {ROWS})\nBEGIN;\nUPDATE shop.{table} SET n = n + 1{also} WHERE id = :id;\n{then}COMMIT;\n"
    )
}

const PUBLISH: &str = "SELECT outbox.publish('plain.changed', 'plain', :id::bigint::text, row_to_json(o))
    FROM shop.plain o WHERE o.id = :id;\n";
const INSERT: &str = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    SELECT 'own', o.id::text, o.version, 'own.changed', row_to_json(o) FROM shop.own o WHERE o.id = :id;\n";

/// See [`Row`].
#[derive(Debug)]
pub struct Capture {
    conn: PgConnection,
}

impl Figure for Capture {
    const ROWS: &'static [Row] = &[
        Row {
            name: "capture, one row",
            system: "a transaction that updates a row of a captured table, whose body function reads a child table, 1 client",
            ceiling: Some("the same of a table that is not captured"),
            unit: "ms",
            goal: Goal::RatioAtMost(2.5),
        },
        Row {
            name: "publish",
            system: "a transaction that updates a row and calls outbox.publish, 1 client",
            ceiling: Some("the same with an INSERT of the event, whose version the writer counts"),
            unit: "ms",
            goal: Goal::RatioAtMost(1.25),
        },
        Row {
            name: "capture, many rows",
            system: "one UPDATE of all rows of a captured table, whose body function reads a child table, until its commit",
            ceiling: None,
            unit: "events/s",
            goal: Goal::AtLeast(10_000.0),
        },
    ];

    async fn prepare(testbed: &Testbed) -> anyhow::Result<Self> {
        let mut conn = testbed.database("person", DATABASE).await?;
        conn.execute(sqlx::raw_sql(SHOP)).await?;
        for (rows, sql) in [
            (ROWS, "INSERT INTO shop.orders SELECT n, 'Maria da Silva Santos', 0 FROM generate_series(1, $1) n"),
            (ROWS * 3, "INSERT INTO shop.line SELECT n, 1 + n % 10000, 'sku' || n, 1 FROM generate_series(1, $1) n"),
            (ROWS, "INSERT INTO shop.plain SELECT n, 'Maria da Silva Santos', 0 FROM generate_series(1, $1) n"),
            (ROWS, "INSERT INTO shop.own SELECT n, 'Maria da Silva Santos', 0 FROM generate_series(1, $1) n"),
            (
                testbed.size.persons,
                "WITH basket AS (INSERT INTO shop.basket SELECT n, 'Maria da Silva Santos', 0 FROM generate_series(1, $1) n
                                 RETURNING id)
                 INSERT INTO shop.item SELECT b.id * 2 + m, b.id, 'sku' || m FROM basket b, generate_series(0, 1) m",
            ),
        ] {
            sqlx::query(sql).bind(rows).execute(&mut conn).await?;
        }
        for sql in CAPTURE.split_inclusive(';') {
            conn.execute(sql).await?;
        }
        conn.execute("ANALYZE").await?;
        Ok(Self { conn })
    }

    async fn system(&mut self, testbed: &Testbed) -> anyhow::Result<Vec<f64>> {
        let captured = Self::took(testbed, &transaction("orders", "")).await?;
        let published = Self::took(testbed, &transaction("plain", PUBLISH)).await?;
        self.conn.execute("VACUUM shop.basket, outbox.aggregate").await?;
        testbed.settle().await?;
        let begin = Instant::now();
        let done = self.conn.execute("UPDATE shop.basket SET n = n + 1").await?;
        Ok(vec![captured, published, rate(done.rows_affected().cast_signed(), begin.elapsed())])
    }

    async fn ceiling(&mut self, testbed: &Testbed) -> anyhow::Result<Vec<f64>> {
        Ok(vec![
            Self::took(testbed, &transaction("plain", "")).await?,
            Self::took(testbed, &transaction("own", INSERT)).await?,
        ])
    }

    async fn finish(mut self, testbed: &Testbed) -> anyhow::Result<Vec<String>> {
        let events: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM outbox.event e JOIN shop.basket b ON b.id::text = e.aggregate_id
             WHERE e.aggregate_type = 'basket'",
        )
        .fetch_one(&mut self.conn)
        .await?;
        self.conn.close().await?;
        testbed.drop_database(DATABASE).await?;
        Ok(vec![format!(
            "capture: one UPDATE of {} rows is a transaction with as many events; {events} in all",
            testbed.size.persons
        )])
    }
}

impl Capture {
    /// Milliseconds of a transaction.
    async fn took(testbed: &Testbed, script: &str) -> anyhow::Result<f64> {
        testbed.settle().await?;
        let rate = pgbench::run(testbed, [WRITER, DATABASE], script, CLIENTS, testbed.size.load / 3).await?;
        Ok(1_000.0 * f64::from(CLIENTS) / rate)
    }
}
