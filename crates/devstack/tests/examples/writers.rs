//! The services that write orders. Each has a database of its own, and a source of the same name.

use std::fmt::Debug;

use devstack::{
    ports,
    testing::{Place, until},
};
use sqlx::{AssertSqlSafe, PgPool};

use crate::programs::{Program, Running};

/// The three ways to write.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Way {
    Capture,
    Publish,
    Insert,
}

/// All of them, and their ways.
pub(crate) const ALL: [(&str, Way); 8] = [
    ("shop.sql", Way::Capture),
    ("shop.py", Way::Capture),
    ("shop.js", Way::Capture),
    ("publish.sql", Way::Publish),
    ("publish.py", Way::Publish),
    ("publish.js", Way::Publish),
    ("publish.rs", Way::Publish),
    ("insert.sql", Way::Insert),
];

/// The source of a writer.
pub(crate) fn source(file: &str) -> String {
    file.replace('.', "-")
}

pub(crate) struct Writer {
    pub(crate) source: String,
    way: Way,
    /// As a superuser.
    pub(crate) url: String,
    pub(crate) pool: PgPool,
    program: Program,
}

impl Writer {
    /// With its tables and an outbox. One whose tables are captured has written before, as it would for years.
    pub(crate) async fn new(file: &str, way: Way) -> Self {
        let source = source(file);
        let url = Place::around().database(&format!("examples_{}", source.replace('-', "_"))).await;
        let pool = PgPool::connect(&url).await.unwrap();
        let role = Self::role(&pool, &url).await;
        let program = match file.rsplit_once('.').unwrap() {
            // It adds a column, as its owner.
            (_, "sql") if way == Way::Insert => Program::psql(&url, &[&format!("sql/{file}")]),
            (_, "sql") => Program::psql(&role, &[&format!("sql/{file}")]),
            (_, "py") => Program::python_file(file).await,
            (_, "js") => Program::node_file(file).await,
            (name, _) => Program::rust(name, &[]),
        };
        let writer = Self { source, way, program: program.env("DATABASE_URL", &role), url, pool };
        Program::psql(&writer.url, &["sql/orders.sql"]).run().await;
        let (_, role) = role.split_once("://").unwrap();
        let (role, _) = role.split_once(':').unwrap();
        writer
            .execute(&format!("GRANT SELECT, INSERT, UPDATE, DELETE ON orders, order_line TO {role}"))
            .await;
        if way == Way::Capture {
            writer.write().await;
        }
        writer.own(&["migrate", "--source", &writer.source]).run().await;
        if way == Way::Capture {
            Program::psql(&writer.url, &["sql/capture.sql"]).run().await;
            writer.own(&["backfill", "order"]).run().await;
        } else {
            writer.execute(&format!("SELECT outbox.grant_writer('{role}')")).await;
        }
        writer
    }

    /// A role with no rights yet, and its URL.
    async fn role(pool: &PgPool, url: &str) -> String {
        let (server, database) = url.rsplit_once('/').unwrap();
        let (_, server) = server.rsplit_once('@').unwrap();
        let create = format!("CREATE ROLE {database} LOGIN PASSWORD 'test'");
        sqlx::query(AssertSqlSafe(create)).execute(pool).await.unwrap();
        format!("postgres://{database}:test@{server}/{database}")
    }

    pub(crate) async fn execute(&self, sql: &str) {
        sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&self.pool).await.unwrap();
    }

    /// A command of the outbox.
    pub(crate) fn own(&self, args: &[&str]) -> Program {
        Program::own("outbox-relay", args).env("DATABASE_URL", &self.url).env("LOG", "error")
    }

    /// Runs the service.
    pub(crate) async fn write(&self) {
        self.program.run().await;
        if self.way == Way::Capture {
            // By hand.
            let paid = "UPDATE orders SET status = 'paid' WHERE id = (SELECT max(id) FROM orders)";
            Program::sql(&self.url, paid).run().await;
        }
    }

    /// Starts its relay, which is ready then.
    pub(crate) async fn relay(&self, amqp: &str) -> Running {
        let listen = format!("127.0.0.1:{}", ports::free());
        let program = self.own(&["run"]).env("AMQP_URL", amqp).env("LISTEN", &listen).env("LEASE", "10s");
        let relay = program.start();
        until("the relay is ready", async || {
            let answer = devstack::testing::client().get(format!("http://{listen}/ready")).send().await;
            answer.is_ok_and(|answer| answer.status().is_success())
        })
        .await;
        relay
    }

    /// The orders as they are.
    pub(crate) async fn orders(&self) -> Vec<(String, String)> {
        let orders =
            "SELECT id::text, order_body(id)::jsonb::text FROM orders ORDER BY id::text COLLATE \"C\"";
        sqlx::query_as(orders).fetch_all(&self.pool).await.unwrap()
    }

    /// The ids of events `order.new` that are no baselines: of orders that are there, and of all.
    pub(crate) async fn news(&self) -> (Vec<String>, Vec<String>) {
        let news = "SELECT e.id::text, o.id IS NOT NULL FROM outbox.event e LEFT JOIN orders o ON o.id::text = e.aggregate_id
                    WHERE e.type = 'order.new' AND e.headers -> 'baseline' IS NULL";
        let news: Vec<(String, bool)> = sqlx::query_as(news).fetch_all(&self.pool).await.unwrap();
        let there = news.iter().filter(|(_, there)| *there).map(|(id, _)| id.clone()).collect();
        (there, news.into_iter().map(|(id, _)| id).collect())
    }
}

impl Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.source)
    }
}
