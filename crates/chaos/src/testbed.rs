//! The system under test: private servers, the programs, and a proxy on each link between two of them.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use anyhow::Context;
use sqlx::{AssertSqlSafe, Executor};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use super::{
    addresses::Addresses,
    barrier::Barrier,
    fault::{Instance, Link},
    proxy::{LinkState, Proxy},
    supervisor::Supervisor,
    workload::sql_writers,
};
use devstack::{
    folder::Folder, ports, postgres::Postgres, program::Program, rabbitmq::RabbitMq, servers::Setup,
    stack::Stack, users,
};

/// Not durable: a crash of a server keeps what it has written to the operating system, and the machine itself does not
/// lose its power here.
const SETUP: Setup = Setup::PASSING;

/// The largest body that the broker takes.
pub(crate) const MESSAGE_LIMIT: usize = 2 * 1024 * 1024;

/// Every part that can have a fault.
#[derive(Debug)]
pub(crate) struct Testbed {
    pub(crate) postgres: Mutex<Postgres>,
    pub(crate) rabbitmq: Mutex<RabbitMq>,
    pub(crate) supervisor: Supervisor,
    /// The relay's commands, for an operator, past all proxies.
    pub(crate) operator: Program,
    /// The projector's commands.
    pub(crate) score_operator: Program,
    pub(crate) addresses: Arc<Addresses>,
    /// Where the writers stop while a database is replaced.
    pub(crate) barrier: Arc<Barrier>,
    proxies: BTreeMap<Link, Proxy>,
    // Dropped last, because it ends every process that is left.
    folder: Folder,
}

impl Testbed {
    /// Starts the servers. `sabotaged` is the folder with another build of relay and projector.
    pub(crate) async fn start(sabotaged: Option<&Path>) -> anyhow::Result<Self> {
        let (servers, folder) = Stack::prepare(Folder::temporary()?, SETUP).await?.into_servers();
        let (postgres, rabbitmq) = (servers.postgres, servers.rabbitmq);
        rabbitmq.limit_bodies(MESSAGE_LIMIT).await?;
        let mut proxies = BTreeMap::new();
        let mut programs = BTreeMap::new();
        let person_api = ports::free();
        for link in Link::all() {
            let server = match link {
                Link::Clients => person_api,
                Link::Database(_) => postgres.port(),
                Link::Broker(_) => rabbitmq.port(),
            };
            proxies.insert(link, Proxy::to(server).await?);
        }
        for instance in Instance::ALL {
            let port = if instance == Instance::PersonApi { person_api } else { ports::free() };
            let (file, role, database) = match instance {
                Instance::PersonApi => ("person-api", "person_api", "person"),
                Instance::PersonRelay1 | Instance::PersonRelay2 => ("outbox-relay", "outbox_relay", "person"),
                Instance::ScoreRelay => ("outbox-relay", "outbox_relay", "score"),
                Instance::Projector1 | Instance::Projector2 => {
                    ("score-projector", "score_projector", "score")
                }
                Instance::ScoreApi => ("score-api", "score_api", "score"),
            };
            let through = |link| proxies.get(&link).map(Proxy::port).context("every link has its proxy");
            let url =
                format!("{}/{database}", postgres.url_through(role, through(Link::Database(instance))?));
            let mut program = Program::new(&folder, instance.name(), file, port)?.env("DATABASE_URL", &url);
            if let Some(folder) = sabotaged
                && matches!(file, "outbox-relay" | "score-projector")
            {
                program = program.from(folder);
            }
            if instance.has_broker() {
                let user = match instance {
                    Instance::ScoreRelay => users::SCORE_RELAY,
                    Instance::Projector1 | Instance::Projector2 => users::PROJECTOR,
                    _ => users::PERSON_RELAY,
                };
                let url = format!("{}/%2f", rabbitmq.url_through(user, through(Link::Broker(instance))?));
                program = program.env("AMQP_URL", &url);
            }
            if file == "score-projector" {
                program = program.env("SOURCE", users::SOURCES);
            }
            programs.insert(instance, program);
        }
        let url_of = |instance| programs.get(&instance).map(Program::url).unwrap_or_default();
        let addresses = Addresses {
            postgres: postgres.url(),
            broker: format!("{}/%2f", rabbitmq.url()),
            replay: format!("{}/%2f", rabbitmq.url_of(users::REPLAY)),
            person_api: format!(
                "http://127.0.0.1:{}",
                proxies.get(&Link::Clients).map(Proxy::port).unwrap_or_default()
            ),
            score_api: url_of(Instance::ScoreApi),
        };
        prepare(&addresses).await?;
        Ok(Self {
            postgres: Mutex::new(postgres),
            rabbitmq: Mutex::new(rabbitmq),
            supervisor: Supervisor::new(programs),
            operator: Program::new(&folder, "operator", "outbox-relay", ports::free())?,
            score_operator: Program::new(&folder, "score-operator", "score-projector", ports::free())?,
            addresses: Arc::new(addresses),
            barrier: Arc::default(),
            proxies,
            folder,
        })
    }

    /// Puts a link into another state.
    pub(crate) fn set_link(&self, link: Link, state: LinkState) {
        if let Some(proxy) = self.proxies.get(&link) {
            proxy.set(state);
        }
    }

    /// The folder with everything.
    pub(crate) fn folder(&self) -> &Folder {
        &self.folder
    }

    /// The folder with the logs of programs and servers.
    pub(crate) fn logs(&self) -> std::path::PathBuf {
        self.folder.path().join("log")
    }

    /// Ends everything at once, since the data is removed anyway.
    pub(crate) async fn stop(self) {
        let hurry = CancellationToken::new();
        hurry.cancel();
        self.supervisor.stop(&hurry).await;
        self.rabbitmq.into_inner().stop(&hurry).await;
        self.postgres.into_inner().stop(&hurry).await;
    }
}

/// Makes what the oracle and the faults need in the databases.
async fn prepare(addresses: &Addresses) -> anyhow::Result<()> {
    addresses
        .connect("postgres")
        .await?
        .execute(AssertSqlSafe(format!("CREATE DATABASE {}", Addresses::OTHER)))
        .await?;
    for database in ["person", "score"] {
        let mut conn = addresses.connect(database).await?;
        // The oracle counts dead rows, so no autovacuum may remove them before.
        conn.execute(
            "CREATE EXTENSION pgstattuple;
             ALTER TABLE outbox.event_1 SET (autovacuum_enabled = off);
             ALTER TABLE outbox.event_default SET (autovacuum_enabled = off)",
        )
        .await?;
    }
    let mut conn = addresses.connect("person").await?;
    // One fault stores a row that this check would refuse.
    conn.execute("ALTER TABLE outbox.event DROP CONSTRAINT event_rules").await?;
    sql_writers::prepare(&mut conn).await
}
