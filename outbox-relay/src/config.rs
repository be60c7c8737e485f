//! The command line and its environment variables.

use std::{net::SocketAddr, time::Duration};

use clap::{Parser, Subcommand};
use lapin::{types::ShortString, uri::AMQPUri};
use secrecy::ExposeSecret;
use service::{
    config::{SettingError, broker::BrokerArgs, database::DatabaseArgs},
    shutdown::ShutdownArgs,
    telemetry::TelemetryArgs,
};

use crate::{leader::Begin, relay::exchange, unroutable::Policy};

/// A statement of the relay reads at most one batch by an index.
pub const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);

/// Publishes the transactional outbox of any PostgreSQL database to RabbitMQ, reliably and in order.
#[derive(Debug, Parser)]
#[command(name = "outbox-relay", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The relay's commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Relay events until stopped. Any number may run: one leads, the others stand by.
    Run(Box<RunArgs>),
    /// Install the outbox in a database, or bring it up to date.
    Migrate(MigrateArgs),
    /// Ask a running relay whether it is ready; exit code 1, with the reasons, when it is not.
    Health(ListenArgs),
}

/// Where the relay answers.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct ListenArgs {
    /// Where /live, /ready and /metrics are served.
    #[arg(long, env = "LISTEN", default_value = "127.0.0.1:8002", value_name = "ADDRESS:PORT")]
    pub listen: SocketAddr,
}

/// Settings of `run`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// The database.
    #[command(flatten)]
    pub database: DatabaseArgs,
    /// The broker.
    #[command(flatten)]
    pub broker: BrokerArgs,
    /// The relay's name in this database. Each name has its own progress and publishes everything.
    #[arg(long, env = "RELAY_NAME", default_value = "default", value_parser = relay_name)]
    pub name: String,
    /// Where a name that does not exist yet begins: with the first event stored, or with the next.
    #[arg(long, env = "BEGIN", default_value = "start", value_enum)]
    pub begin: Begin,
    /// The topic exchange to publish to.
    #[arg(long, env = "EXCHANGE", default_value = "event_dispatcher", value_parser = exchange)]
    pub exchange: ShortString,
    /// Declare the exchange (topic, durable) if it does not exist.
    #[arg(long, env = "DECLARE_EXCHANGE")]
    pub declare_exchange: bool,
    /// What to do with events that no queue takes: `hold` (wait, and be not ready) or, by type pattern as
    /// in a topic binding, `drop` (count and go on). The first that matches wins; what none matches is
    /// held: `score.new=hold,score.*=drop`.
    #[arg(long, env = "UNROUTABLE", default_value = "hold", value_name = "RULES")]
    pub unroutable: Policy,
    /// Where it answers.
    #[command(flatten)]
    pub listen: ListenArgs,
    /// Logging.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
    /// Shutdown.
    #[command(flatten)]
    pub shutdown: ShutdownArgs,
}

impl RunArgs {
    /// The nodes of the broker, parsed.
    pub fn uris(&self) -> Result<Vec<AMQPUri>, SettingError> {
        let urls = self.broker.urls()?;
        urls.iter()
            .map(|url| {
                // The parser's own message may quote the URL, and with it the password.
                url.expose_secret().parse().map_err(|_| {
                    SettingError::new(
                        "AMQP_URL",
                        "a node's URL should look like amqp://user:password@host:5672/vhost",
                    )
                })
            })
            .collect()
    }
}

/// Settings of `migrate`.
#[derive(Debug, clap::Args)]
pub struct MigrateArgs {
    /// The database, with a role that may create schemas.
    #[command(flatten)]
    pub database: DatabaseArgs,
    /// The name under which this database publishes (AMQP's `app_id`). Subscribers know its events by it,
    /// so it cannot be changed later.
    #[arg(long, env = "SOURCE", value_name = "NAME")]
    pub source: String,
    /// A role that appends events; may be repeated.
    #[arg(long, value_name = "ROLE")]
    pub grant_writer: Vec<String>,
    /// A role that relays; may be repeated. Let a superuser also run:
    /// `GRANT pg_read_all_stats TO ROLE`.
    #[arg(long, value_name = "ROLE")]
    pub grant_relay: Vec<String>,
    /// Logging.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}

fn relay_name(name: &str) -> Result<String, String> {
    let valid = (1..=63).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-".contains(&b));
    if valid {
        Ok(name.to_owned())
    } else {
        Err("it should be 1 to 63 lower-case letters, digits, '-' or '_', a letter first".to_owned())
    }
}
