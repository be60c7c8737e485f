//! Where figures are measured: private durable servers, with databases and virtual hosts of their own.

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

/// As in production, and told what the server was asked.
const SETUP: Setup = Setup {
    durable: true,
    settings: &[
        "shared_preload_libraries=pg_stat_statements",
        // So that `pg_stat_activity` has a program's statement whole, which pgbench is to repeat.
        "track_activity_query_size=16384",
    ],
    ..Setup::PASSING
};

/// The servers, and how much is done on them.
#[derive(Debug)]
pub struct Ground {
    /// Its databases `person` and `score` are empty and serve as templates; its programs do not run.
    pub(crate) stack: Stack,
    /// How much is done.
    pub(crate) size: Scale,
    /// How busy the machine was before the run.
    pub(crate) load: String,
}

impl Ground {
    /// Starts the servers.
    pub async fn start(size: Scale) -> anyhow::Result<Self> {
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let load = load.split(' ').take(3).collect::<Vec<_>>().join(", ") + " (1, 5 and 15 minutes)";
        Ok(Self { load, stack: Stack::prepare(Folder::temporary()?, SETUP).await?, size })
    }

    /// Stops them, at once: the data goes away.
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

    /// Removes a database, whoever is connected to it.
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
        let answer = client()?.request(method, url).timeout(std::time::Duration::from_mins(1)).send().await?;
        ensure!(answer.status().is_success(), "the virtual host {vhost}: {}", answer.status());
        Ok(())
    }

    /// The programs on databases and a virtual host of their own, in the order in which an event passes
    /// them.
    pub(crate) fn programs(&self, person: &str, score: &str, vhost: &str) -> anyhow::Result<[Program; 5]> {
        let [person_api, person_relay, projector, score_relay, score_api] =
            self.stack.programs_on([person, score], vhost)?;
        // What is published without a relay comes from the administrator.
        let sources = format!("{},person={}", users::SOURCES, rabbitmq::USER);
        Ok([person_api, person_relay, projector.env("SOURCE", &sources), score_relay, score_api])
    }

    /// Writes what is left to write of earlier rounds, so that none pays for another's.
    pub(crate) async fn settle(&self) -> anyhow::Result<()> {
        self.connect("postgres").await?.execute("CHECKPOINT").await?;
        Ok(())
    }
}
