//! The services that receive orders. Each has a database, a queue and a user of its own.

use devstack::{
    ports,
    testing::{MANAGEMENT_URL, Place, eventually, until},
    users::Rights,
};
use serde_json::Value;
use sqlx::{Executor, PgPool, Postgres, Transaction};

use crate::{
    programs::{Program, Running},
    proxy::Proxy,
};

/// The three that keep a copy.
pub(crate) const COPIES: [&str; 3] = ["python", "node", "rust"];
/// The one that sends mails.
pub(crate) const MAILER: &str = "mailer";

pub(crate) struct Subscriber {
    pub(crate) name: &'static str,
    queue: String,
    amqp: String,
    pub(crate) pool: PgPool,
    program: Program,
    running: Option<Running>,
}

impl Subscriber {
    /// Started, and consuming from its queue. `source` are the publishers that it follows.
    pub(crate) async fn new(name: &'static str, amqp: &str, proxy: &Proxy, source: &str) -> Self {
        let queue = if name == MAILER { "mails".to_owned() } else { format!("order-copy-{name}") };
        let user = Place::around().broker_user(amqp, name, Rights::Subscriber(&queue)).await;
        let database = Place::around().database(&format!("examples_{name}")).await;
        let program = Self::program(name, &[]).await;
        let mut subscriber = Self {
            name,
            queue,
            amqp: amqp.to_owned(),
            pool: PgPool::connect(&database).await.unwrap(),
            program: program
                .env("DATABASE_URL", &database)
                .env("AMQP_URL", &proxy.url(&user))
                .env("SOURCE", source)
                .env("LISTEN", &format!("127.0.0.1:{}", ports::free())),
            running: None,
        };
        subscriber.start().await;
        subscriber
    }

    async fn program(name: &str, args: &[&str]) -> Program {
        match name {
            "python" => Program::python_file("subscriber.py").await,
            "node" => Program::node_file("subscriber.js").await,
            "rust" => Program::rust("subscriber", args),
            _ => Program::python_file("mailer.py").await,
        }
    }

    /// Starts it, and waits until it consumes.
    pub(crate) async fn start(&mut self) {
        self.running = Some(self.program.start());
        let server = std::env::var(MANAGEMENT_URL).unwrap();
        let (_, vhost) = self.amqp.rsplit_once('/').unwrap();
        let url = format!("{server}/api/queues/{vhost}/{}", self.queue);
        // The consumer that is there may be one that has just been killed.
        until("the queue has a consumer", async || {
            let Ok(answer) = devstack::testing::client().get(&url).send().await else { return false };
            let queue: Value = answer.json().await.unwrap_or_default();
            queue["consumers"].as_u64().unwrap_or(0) > 0
        })
        .await;
    }

    /// Starts it, and it ends by itself, in failure.
    pub(crate) async fn fails(&mut self) -> String {
        let mut running = self.program.start();
        assert!(!running.ended().await.success());
        running.said()
    }

    pub(crate) fn running(&self) -> &Running {
        self.running.as_ref().expect("it was started")
    }

    /// As a service manager does; it ends well.
    pub(crate) async fn stop(&mut self) {
        self.running.take().expect("it was started").stop().await;
    }

    pub(crate) async fn kill(&mut self) {
        self.running.take().expect("it was started").kill().await;
    }

    /// Holds it up in the middle of a transaction, until this one ends.
    pub(crate) async fn hold_up(&self) -> Transaction<'static, Postgres> {
        let mut tx = self.pool.begin().await.unwrap();
        let lock = if self.name == MAILER { "LOCK TABLE mail" } else { "LOCK TABLE copy" };
        tx.execute(lock).await.unwrap();
        tx
    }

    pub(crate) async fn is_held_up(&self) {
        let waits = "SELECT EXISTS (SELECT FROM pg_stat_activity
                                    WHERE datname = current_database() AND wait_event_type = 'Lock')";
        until("it waits for the lock", async || {
            sqlx::query_scalar(waits).fetch_one(&self.pool).await.unwrap()
        })
        .await;
    }

    /// What it has of a source.
    pub(crate) async fn copy(&self, source: &str) -> Vec<(String, String)> {
        let copy = "SELECT id, body::text FROM copy WHERE source = $1 ORDER BY id COLLATE \"C\"";
        sqlx::query_as(copy).bind(source).fetch_all(&self.pool).await.unwrap()
    }

    /// Waits until it has this of a source.
    pub(crate) async fn has(&self, source: &str, wanted: &[(String, String)]) {
        eventually(&format!("the copy of {source} in {} is {wanted:?}", self.name), async || {
            let copy = self.copy(source).await;
            if copy == wanted { Ok(()) } else { Err(format!("{copy:?}")) }
        })
        .await;
    }

    /// The ids of the messages for which there is a mail.
    pub(crate) async fn mails(&self) -> Vec<String> {
        let mails = "SELECT message_id::text FROM mail ORDER BY 1";
        sqlx::query_scalar(mails).fetch_all(&self.pool).await.unwrap()
    }

    /// What waits, in which version, of which type, and why.
    pub(crate) async fn held(&self) -> String {
        if self.name == "rust" {
            return self.command("held").await;
        }
        let held = "SELECT concat_ws(' ', aggregate_id, version, type, error) FROM held ORDER BY aggregate_id, version";
        let held: Vec<String> = sqlx::query_scalar(held).fetch_all(&self.pool).await.unwrap();
        held.join("\n")
    }

    /// A command of the one in Rust.
    async fn command(&self, name: &str) -> String {
        let command = Self::program("rust", &[name]).await;
        let variables = self.program.variables().iter();
        variables.fold(command, |command, (name, value)| command.env(name, value)).run().await
    }

    /// Repairs the body that could not be applied, as the program cannot be, and has it applied.
    pub(crate) async fn redrive(&mut self) {
        let (table, body) = if self.name == "rust" { ("inbox.held", "payload") } else { ("held", "body") };
        let repair = format!(
            r"UPDATE {table} SET {body} = convert_to(replace(convert_from({body}, 'UTF8'), '\u0000', ''), 'UTF8')
              WHERE version = 1"
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(repair)).execute(&self.pool).await.unwrap();
        if self.name == "rust" {
            self.command("redrive").await;
        } else {
            self.stop().await;
            self.start().await;
        }
    }
}
