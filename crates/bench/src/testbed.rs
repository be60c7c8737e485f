//! The servers that figures are measured on: private and durable. Each figure has its own databases and virtual host.

use anyhow::{Context, ensure};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

use super::scale::Scale;
use devstack::{
    folder::Folder,
    program::{Program, client},
    rabbitmq,
    servers::Setup,
    stack::Stack,
    users,
};

/// Durable, as in production, and with statistics of the statements.
const SETUP: Setup = Setup {
    durable: true,
    settings: &[
        "shared_preload_libraries=pg_stat_statements",
        // So that `pg_stat_activity` has a program's statement whole, which pgbench is to repeat.
        "track_activity_query_size=16384",
    ],
    ..Setup::PASSING
};

/// The servers, and the scale of the run.
#[derive(Debug)]
pub struct Testbed {
    /// Its databases `person` and `score` are empty and serve as templates; its programs do not run.
    pub(crate) stack: Stack,
    /// The scale of the run.
    pub(crate) size: Scale,
    /// The load average of the machine before the run.
    pub(crate) load: String,
}

impl Testbed {
    /// Starts the servers.
    pub async fn start(size: Scale) -> anyhow::Result<Self> {
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let load = load.split(' ').take(3).collect::<Vec<_>>().join(", ") + " (1, 5 and 15 minutes)";
        Ok(Self { load, stack: Stack::prepare(Folder::temporary()?, SETUP).await?, size })
    }

    /// Stops the servers at once, since their data is removed.
    pub async fn stop(self) {
        let hurry = tokio_util::sync::CancellationToken::new();
        hurry.cancel();
        self.stack.stop(&hurry).await;
    }

    /// A superuser's connection.
    pub(crate) async fn connect(&self, database: &str) -> anyhow::Result<PgConnection> {
        let url = format!("{}/{database}", self.stack.servers.postgres.url());
        PgConnection::connect(&url)
            .await
            .with_context(|| format!("cannot connect to the database {database}"))
    }

    /// A database like `person` or `score`, with all schemas and rights, and a connection to it.
    pub(crate) async fn database(&self, template: &str, name: &str) -> anyhow::Result<PgConnection> {
        let sql = format!("CREATE DATABASE {name} TEMPLATE {template}");
        self.connect("postgres").await?.execute(AssertSqlSafe(sql)).await?;
        self.connect(name).await
    }

    /// Drops a database, and ends its sessions.
    pub(crate) async fn drop_database(&self, name: &str) -> anyhow::Result<()> {
        let sql = format!("DROP DATABASE {name} WITH (FORCE)");
        self.connect("postgres").await?.execute(AssertSqlSafe(sql)).await?;
        Ok(())
    }

    /// A new virtual host's AMQP URL.
    pub(crate) async fn virtual_host(&self, name: &str) -> anyhow::Result<String> {
        self.manage(reqwest::Method::PUT, name).await?;
        users::make_all(&self.stack.servers.rabbitmq, name).await?;
        Ok(format!("{}/{name}", self.stack.servers.rabbitmq.url()))
    }

    /// Removes a virtual host with all of its queues.
    pub(crate) async fn drop_virtual_host(&self, name: &str) -> anyhow::Result<()> {
        self.manage(reqwest::Method::DELETE, name).await
    }

    async fn manage(&self, method: reqwest::Method, vhost: &str) -> anyhow::Result<()> {
        let url = format!("{}/api/vhosts/{vhost}", self.stack.servers.rabbitmq.management_url());
        let response =
            client()?.request(method, url).timeout(std::time::Duration::from_mins(1)).send().await?;
        ensure!(response.status().is_success(), "the virtual host {vhost}: {}", response.status());
        Ok(())
    }

    /// The programs on databases and a virtual host of their own, in the order in which an event passes
    /// them.
    pub(crate) fn programs(&self, person: &str, score: &str, vhost: &str) -> anyhow::Result<[Program; 5]> {
        let [person_api, person_relay, projector, score_relay, score_api] =
            self.stack.programs_on([person, score], vhost)?;
        // The bench publishes without a relay, as the administrator.
        let sources = format!("{},person={}", users::SOURCES, rabbitmq::USER);
        Ok([person_api, person_relay, projector.env("SOURCE", &sources), score_relay, score_api])
    }

    /// Flushes what earlier rounds have written, so that no round pays for another one.
    pub(crate) async fn settle(&self) -> anyhow::Result<()> {
        self.connect("postgres").await?.execute("CHECKPOINT").await?;
        Ok(())
    }
}
