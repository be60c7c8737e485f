//! The whole system: both servers, two databases, the four programs and a second relay.

use std::time::{Duration, Instant};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio_util::sync::CancellationToken;

use crate::{
    folder::{Folder, write_private},
    program::Program,
    roles,
    servers::{Servers, Setup},
    users,
};

/// How long a program may take until it is ready.
const READY: Duration = Duration::from_mins(1);

/// A running stack.
#[derive(Debug)]
pub struct Stack {
    /// PostgreSQL and RabbitMQ.
    pub servers: Servers,
    /// Takes persons, at the usual port 8000.
    pub person_api: Program,
    /// Publishes the database `person`, at 8002.
    pub person_relay: Program,
    /// Follows the events, at 8004.
    pub score_projector: Program,
    /// Publishes the database `score`, at 8003.
    pub score_relay: Program,
    /// Answers scores, at 8001.
    pub score_api: Program,
    report: fn(&str),
    // Last, because it waits for what is left of the others.
    folder: Folder,
}

/// Where everything is, for whoever wants to join in.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Addresses {
    /// person-api.
    pub person_url: String,
    /// score-api.
    pub score_url: String,
    /// The database `person`, as the superuser.
    pub person_database_url: String,
    /// The database `score`, as the superuser.
    pub score_database_url: String,
    /// RabbitMQ, as the administrator.
    pub amqp_url: String,
    /// RabbitMQ, as the user that has history replayed.
    pub replay_amqp_url: String,
    /// Its management API, with name and password.
    pub rabbitmq_management_url: String,
    /// The relay of the database `person`.
    pub person_relay_url: String,
    /// The relay of the database `score`.
    pub score_relay_url: String,
    /// score-projector.
    pub projector_url: String,
}

impl Addresses {
    /// The variables of `devstack env`.
    pub fn variables(&self) -> [(&'static str, &str); 10] {
        [
            ("PERSON_URL", &self.person_url),
            ("SCORE_URL", &self.score_url),
            ("PERSON_DATABASE_URL", &self.person_database_url),
            ("SCORE_DATABASE_URL", &self.score_database_url),
            ("AMQP_URL", &self.amqp_url),
            ("REPLAY_AMQP_URL", &self.replay_amqp_url),
            ("RABBITMQ_MANAGEMENT_URL", &self.rabbitmq_management_url),
            ("PERSON_RELAY_URL", &self.person_relay_url),
            ("SCORE_RELAY_URL", &self.score_relay_url),
            ("PROJECTOR_URL", &self.projector_url),
        ]
    }
}

impl Stack {
    /// Starts everything in `folder` and waits until all of it is ready.
    pub async fn start(folder: Folder, setup: Setup) -> anyhow::Result<Self> {
        let mut stack = Self::prepare(folder, setup).await?;
        let begin = Instant::now();
        for program in stack.programs() {
            program.start().await?;
        }
        for program in stack.programs() {
            program.ready(READY).await?;
            (setup.report)(&format!(
                "{} is ready after {:.1} s",
                program.name(),
                begin.elapsed().as_secs_f32()
            ));
        }
        let addresses = serde_json::to_string_pretty(&stack.addresses())?;
        write_private(&stack.folder.path().join(ADDRESSES), &addresses)?;
        Ok(stack)
    }

    /// Starts the servers in `folder` and makes all schemas current; starts no program yet.
    pub async fn prepare(folder: Folder, setup: Setup) -> anyhow::Result<Self> {
        let servers = Servers::start(&folder, setup).await?;
        users::make_all(&servers.rabbitmq, "%2f").await.context("the programs' users of RabbitMQ")?;
        let stack = Self::new(folder, servers, setup)?;
        stack.migrate().await?;
        Ok(stack)
    }

    fn new(folder: Folder, servers: Servers, setup: Setup) -> anyhow::Result<Self> {
        let [person_api, person_relay, score_projector, score_relay, score_api] =
            programs(&folder, &servers, setup, ["person", "score"], "%2f")?;
        Ok(Self {
            servers,
            person_api,
            person_relay,
            score_projector,
            score_relay,
            score_api,
            report: setup.report,
            folder,
        })
    }

    /// The five programs once more, at free ports, for other databases and another virtual host, where
    /// [`users::make_all`] has made their users.
    pub fn programs_on(&self, databases: [&str; 2], vhost: &str) -> anyhow::Result<[Program; 5]> {
        programs(&self.folder, &self.servers, Setup::QUIET, databases, vhost)
    }

    /// Its servers and its folder alone, for programs of somebody else's making. The folder goes last.
    pub fn into_servers(self) -> (Servers, Folder) {
        (self.servers, self.folder)
    }

    /// Where its data is.
    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// Databases, schemas and roles, each unless it is there.
    async fn migrate(&self) -> anyhow::Result<()> {
        let server = self.servers.postgres.url();
        let mut conn = PgConnection::connect(&format!("{server}/postgres")).await?;
        for database in ["person", "score"] {
            let exists: bool =
                sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)")
                    .bind(database)
                    .fetch_one(&mut conn)
                    .await?;
            if !exists {
                let sql = format!("CREATE DATABASE {database}");
                sqlx::query(AssertSqlSafe(sql)).execute(&mut conn).await?;
            }
        }
        conn.close().await?;

        let person = format!("{server}/person");
        let score = format!("{server}/score");
        let commands: [(&Program, &[&str], &str); 4] = [
            (&self.person_api, &["migrate"], &person),
            (&self.person_relay, &["migrate", "--source", "person"], &person),
            (&self.score_projector, &["migrate"], &score),
            (&self.score_relay, &["migrate", "--source", "score"], &score),
        ];
        for (program, args, url) in commands {
            program
                .command(args, &[("DATABASE_URL", url)])
                .await
                .with_context(|| format!("the schemas of {} are not current", program.name()))?;
        }
        for database in [person, score] {
            let mut conn = PgConnection::connect(&database).await?;
            roles::make(&mut conn, &[], &self.folder.secrets().postgres).await?;
            conn.close().await?;
        }
        (self.report)("the schemas are current");
        Ok(())
    }

    /// The programs, in the order in which an event passes them.
    pub fn programs(&mut self) -> [&mut Program; 5] {
        [
            &mut self.person_api,
            &mut self.person_relay,
            &mut self.score_projector,
            &mut self.score_relay,
            &mut self.score_api,
        ]
    }

    /// Where everything is.
    pub fn addresses(&self) -> Addresses {
        let database = |name: &str| format!("{}/{name}", self.servers.postgres.url());
        Addresses {
            person_url: self.person_api.url(),
            score_url: self.score_api.url(),
            person_database_url: database("person"),
            score_database_url: database("score"),
            amqp_url: format!("{}/%2f", self.servers.rabbitmq.url()),
            replay_amqp_url: format!("{}/%2f", self.servers.rabbitmq.url_of(users::REPLAY)),
            rabbitmq_management_url: self.servers.rabbitmq.management_url(),
            person_relay_url: self.person_relay.url(),
            score_relay_url: self.score_relay.url(),
            projector_url: self.score_projector.url(),
        }
    }

    /// Stops the programs, which drain, and then the servers. Everything ends at once when `hurry` is cancelled.
    pub async fn stop(mut self, hurry: &CancellationToken) {
        let _never_written = std::fs::remove_file(self.folder.path().join(ADDRESSES));
        let report = self.report;
        for program in self.programs() {
            let in_good_order = program.stop(hurry).await;
            let hurried = if in_good_order { "" } else { ", in a hurry" };
            report(&format!("{} has stopped{hurried}", program.name()));
        }
        let at_once = hurry.child_token();
        if self.folder.is_temporary() {
            // The data is removed anyway.
            at_once.cancel();
        }
        self.servers.stop(&at_once).await;
    }
}

/// The programs, in the order in which an event passes them, on the databases of persons and of scores.
fn programs(
    folder: &Folder,
    servers: &Servers,
    setup: Setup,
    [person, score]: [&str; 2],
    vhost: &str,
) -> anyhow::Result<[Program; 5]> {
    let amqp = |user: &str| format!("{}/{vhost}", servers.rabbitmq.url_of(user));
    let program = |name: &str, file: &str, port: u16, role: &str, database: &str| {
        let url = format!("{}/{database}", servers.postgres.url_of(role));
        anyhow::Ok(Program::new(folder, name, file, setup.port(port))?.env("DATABASE_URL", &url))
    };
    let relay = |name: &str, port: u16, database: &str, user: &str| {
        let relay = program(name, "outbox-relay", port, "outbox_relay", database)?;
        anyhow::Ok(relay.env("AMQP_URL", &amqp(user)))
    };
    Ok([
        program("person-api", "person-api", 8000, "person_api", person)?,
        relay("person-relay", 8002, person, users::PERSON_RELAY)?,
        program("score-projector", "score-projector", 8004, "score_projector", score)?
            .env("AMQP_URL", &amqp(users::PROJECTOR))
            .env("SOURCE", users::SOURCES),
        // Nobody follows scores yet.
        relay("score-relay", 8003, score, users::SCORE_RELAY)?.args(["--unroutable", "score.*=drop"]),
        program("score-api", "score-api", 8001, "score_api", score)?,
    ])
}

/// The file with the addresses, while a stack runs.
pub const ADDRESSES: &str = "addresses.json";
