//! Where the servers and the programs listen.

use std::time::Duration;

use anyhow::Context;
use sqlx::{Connection, PgConnection};

/// Another database of the same server, whose transactions are nobody's business.
const ELSEWHERE: &str = "elsewhere";
/// How long somebody may take to connect.
const CONNECT: Duration = Duration::from_secs(5);

/// Where everything is, past the wires unless it says otherwise.
#[derive(Clone, Debug)]
pub(crate) struct Addresses {
    /// PostgreSQL, as its superuser, without a database.
    pub(crate) postgres: String,
    /// RabbitMQ, as its administrator.
    pub(crate) broker: String,
    /// RabbitMQ's URL, as the user that has history replayed.
    pub(crate) replay: String,
    /// person-api, by way of the clients' wire.
    pub(crate) person_api: String,
    /// score-api.
    pub(crate) score_api: String,
}

impl Addresses {
    /// A superuser's URL.
    pub(crate) fn url(&self, database: &str) -> String {
        format!("{}/{database}", self.postgres)
    }

    /// A superuser's connection.
    pub(crate) async fn connect(&self, database: &str) -> anyhow::Result<PgConnection> {
        let connected = tokio::time::timeout(CONNECT, PgConnection::connect(&self.url(database))).await;
        connected.context("PostgreSQL does not answer")?.context("PostgreSQL is away")
    }

    /// A superuser's connection to the other database.
    pub(crate) async fn connect_elsewhere(&self) -> anyhow::Result<PgConnection> {
        self.connect(ELSEWHERE).await
    }
}
