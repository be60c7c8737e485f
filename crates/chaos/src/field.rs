//! Where it happens: private servers, the programs, and a wire between any two that speak to each other.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use anyhow::Context;
use sqlx::Executor;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use super::{
    addresses::Addresses,
    crew::Crew,
    fault::{Member, Place},
    notes,
    wire::{Weather, Wire},
};
use devstack::{
    folder::Folder, ports, postgres::Postgres, program::Program, rabbitmq::RabbitMq, servers::Setup,
    stack::Stack, users,
};

/// A crash of a server loses what it had not written, and nothing that it had: nobody takes the machine's
/// power away here, so nothing is written through to the disk.
const SETUP: Setup = Setup::PASSING;

/// The largest body that the broker takes.
pub(crate) const MESSAGE_LIMIT: usize = 2 * 1024 * 1024;

/// Everything that can have a fault.
#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) postgres: Mutex<Postgres>,
    pub(crate) rabbitmq: Mutex<RabbitMq>,
    pub(crate) crew: Crew,
    /// What an operator works with, past all wires.
    pub(crate) operator: Program,
    /// The same for the projector.
    pub(crate) score_operator: Program,
    pub(crate) addresses: Arc<Addresses>,
    wires: BTreeMap<Place, Wire>,
    // Last, because it waits for what is left of the others.
    folder: Folder,
}

impl Field {
    /// Starts the servers. The programs are those next to this one; relays and projectors may be in
    /// another folder.
    pub(crate) async fn start(other: Option<&Path>) -> anyhow::Result<Self> {
        let (servers, folder) = Stack::prepare(Folder::temporary()?, SETUP).await?.into_servers();
        let (postgres, rabbitmq) = (servers.postgres, servers.rabbitmq);
        rabbitmq.limit_bodies(MESSAGE_LIMIT).await?;
        let mut wires = BTreeMap::new();
        let mut programs = BTreeMap::new();
        let person_api = ports::free();
        for place in Place::all() {
            let server = match place {
                Place::Clients => person_api,
                Place::Database(_) => postgres.port(),
                Place::Broker(_) => rabbitmq.port(),
            };
            wires.insert(place, Wire::to(server).await?);
        }
        for member in Member::ALL {
            let port = if member == Member::PersonApi { person_api } else { ports::free() };
            let (file, role, database) = match member {
                Member::PersonApi => ("person-api", "person_api", "person"),
                Member::PersonRelay1 | Member::PersonRelay2 => ("outbox-relay", "outbox_relay", "person"),
                Member::ScoreRelay => ("outbox-relay", "outbox_relay", "score"),
                Member::Projector1 | Member::Projector2 => ("score-projector", "score_projector", "score"),
                Member::ScoreApi => ("score-api", "score_api", "score"),
            };
            let through = |place| wires.get(&place).map(Wire::port).context("every place has its wire");
            let url = format!("{}/{database}", postgres.url_through(role, through(Place::Database(member))?));
            let mut program = Program::new(&folder, member.name(), file, port)?.env("DATABASE_URL", &url);
            if let Some(other) = other
                && matches!(file, "outbox-relay" | "score-projector")
            {
                program = program.from(other);
            }
            if member.has_broker() {
                let user = match member {
                    Member::ScoreRelay => users::SCORE_RELAY,
                    Member::Projector1 | Member::Projector2 => users::PROJECTOR,
                    _ => users::PERSON_RELAY,
                };
                let url = format!("{}/%2f", rabbitmq.url_through(user, through(Place::Broker(member))?));
                program = program.env("AMQP_URL", &url);
            }
            if file == "score-projector" {
                program = program.env("SOURCE", users::SOURCES);
            }
            programs.insert(member, program);
        }
        let url_of = |member| programs.get(&member).map(Program::url).unwrap_or_default();
        let addresses = Addresses {
            postgres: postgres.url(),
            broker: format!("{}/%2f", rabbitmq.url()),
            replay: format!("{}/%2f", rabbitmq.url_of(users::REPLAY)),
            person_api: format!(
                "http://127.0.0.1:{}",
                wires.get(&Place::Clients).map(Wire::port).unwrap_or_default()
            ),
            score_api: url_of(Member::ScoreApi),
        };
        prepare(&addresses).await?;
        Ok(Self {
            postgres: Mutex::new(postgres),
            rabbitmq: Mutex::new(rabbitmq),
            crew: Crew::new(programs),
            operator: Program::new(&folder, "operator", "outbox-relay", ports::free())?,
            score_operator: Program::new(&folder, "score-operator", "score-projector", ports::free())?,
            addresses: Arc::new(addresses),
            wires,
            folder,
        })
    }

    /// Changes the weather on a wire.
    pub(crate) fn turn(&self, place: Place, weather: Weather) {
        if let Some(wire) = self.wires.get(&place) {
            wire.turn(weather);
        }
    }

    /// Where the programs and the servers write what they have to say.
    pub(crate) fn logs(&self) -> std::path::PathBuf {
        self.folder.path().join("log")
    }

    /// Ends everything at once: the data goes away.
    pub(crate) async fn stop(self) {
        let hurry = CancellationToken::new();
        hurry.cancel();
        self.crew.stop(&hurry).await;
        self.rabbitmq.into_inner().stop(&hurry).await;
        self.postgres.into_inner().stop(&hurry).await;
    }
}

/// What the oracle and the faults need in the databases beside what the programs have made.
async fn prepare(addresses: &Addresses) -> anyhow::Result<()> {
    addresses.connect("postgres").await?.execute("CREATE DATABASE elsewhere").await?;
    for database in ["person", "score"] {
        let mut conn = addresses.connect(database).await?;
        // Dead rows are counted, so nobody may remove them before.
        conn.execute(
            "CREATE EXTENSION pgstattuple;
             ALTER TABLE outbox.event_1 SET (autovacuum_enabled = off);
             ALTER TABLE outbox.event_default SET (autovacuum_enabled = off)",
        )
        .await?;
    }
    let mut conn = addresses.connect("person").await?;
    // A row that cannot be sent is older than this check.
    conn.execute("ALTER TABLE outbox.event DROP CONSTRAINT event_headers_fit").await?;
    notes::prepare(&mut conn).await
}
