//! Where the servers and the programs listen.

use std::time::Duration;

use anyhow::Context;
use sqlx::{Connection, PgConnection};

/// Timeout of connecting to PostgreSQL.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// URLs of everything, past the proxies unless a field says otherwise.
#[derive(Clone, Debug)]
pub(crate) struct Addresses {
    /// PostgreSQL, as its superuser, without a database.
    pub(crate) postgres: String,
    /// RabbitMQ, as its administrator.
    pub(crate) broker: String,
    /// RabbitMQ, as the user that replays history.
    pub(crate) replay: String,
    /// person-api, through the proxy of the clients.
    pub(crate) person_api: String,
    /// score-api.
    pub(crate) score_api: String,
}

impl Addresses {
    /// Another database of the same server, which no program uses.
    pub(crate) const OTHER: &str = "other";

    /// A superuser's URL.
    pub(crate) fn url(&self, database: &str) -> String {
        format!("{}/{database}", self.postgres)
    }

    /// A superuser's connection.
    pub(crate) async fn connect(&self, database: &str) -> anyhow::Result<PgConnection> {
        let connected =
            tokio::time::timeout(CONNECT_TIMEOUT, PgConnection::connect(&self.url(database))).await;
        connected.context("PostgreSQL does not respond")?.context("PostgreSQL refuses the connection")
    }
}
