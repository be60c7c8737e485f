//! One inbox as the console sees it.

use std::collections::BTreeMap;

use daemon::config::database::Database;
use inbox::{
    held, rejected,
    requests::{self, Request},
};
use sqlx::{PgConnection, PgPool};
use tokio_util::sync::CancellationToken;

use crate::{
    looks::Looks,
    outbox::reason,
    watch::{Target, Watch},
};

/// For what a page asks beyond the looks, which have one of their own.
const CONNECTIONS: u32 = 1;
/// How many causes are shown.
const CAUSES: i64 = 50;
/// How many requests are shown.
const REQUESTS: i64 = 10;

/// An inbox: one consumer of one database.
#[derive(Debug)]
pub struct Inbox {
    /// What the file calls it.
    pub name: String,
    /// The consumer's name in the schema `inbox`.
    pub consumer: String,
    /// Its queues.
    pub queues: Vec<String>,
    /// Its database's address and user, without the password.
    pub address: String,
    /// Its database.
    pub database: Database,
    /// Connections for what a page asks.
    pub pool: PgPool,
    looks: Looks,
    /// What was seen last.
    pub watch: Watch<Look>,
}

/// What one look sees.
#[derive(Debug)]
pub struct Look {
    /// Events that wait, by cause.
    pub held: held::Groups,
    /// Messages that cannot be applied, by reason.
    pub rejected: rejected::Groups,
    /// The newest incarnation of each source that it follows.
    pub sources: BTreeMap<String, i64>,
    /// The last requests of operators, the newest first.
    pub requests: Vec<Request>,
}

/// A row for each source.
const SOURCES: &str = "SELECT name, incarnation FROM inbox.source WHERE consumer = $1 ORDER BY name";

impl Inbox {
    /// Connects when it is first looked at.
    pub fn new(name: &str, consumer: Option<String>, queues: Vec<String>, database: &Database) -> Self {
        Self {
            name: name.to_owned(),
            consumer: consumer.unwrap_or_else(|| name.to_owned()),
            queues,
            address: database.address(),
            database: database.clone().quiet(),
            pool: database.pool(CONNECTIONS),
            looks: Looks::new(database.clone()),
            watch: Watch::default(),
        }
    }

    /// Looks at it again and again, until `stop`.
    pub async fn run(&self, stop: CancellationToken) {
        self.watch.run(stop, self).await;
    }
}

impl Target for Inbox {
    type Look = Look;

    async fn look(&self) -> Result<Look, String> {
        let mut conn = self.looks.take().await.map_err(|error| reason(&error))?;
        let seen = look(&mut conn, &self.consumer).await.map_err(|error| reason(&error))?;
        self.looks.keep(conn);
        Ok(seen)
    }
}

async fn look(conn: &mut PgConnection, consumer: &str) -> sqlx::Result<Look> {
    let held = held::groups(conn, consumer, CAUSES).await?;
    let rejected = rejected::groups(conn, consumer).await?;
    let sources: Vec<(String, i64)> = sqlx::query_as(SOURCES).bind(consumer).fetch_all(&mut *conn).await?;
    let requests = requests::list(conn, consumer, REQUESTS).await?;
    Ok(Look { held, rejected, sources: sources.into_iter().collect(), requests })
}
