//! The settings of the service, and what commands share of them.

use std::{fmt::Write, net::SocketAddr, time::Duration};

use daemon::{
    cli::{Setting, Source, Table},
    config::{SettingError, broker::BrokerArgs, database::DatabaseArgs},
    probes::ProbeArgs,
    shutdown::ShutdownArgs,
    telemetry::TelemetryArgs,
};
use lapin::types::ShortString;

use crate::{
    cli::Cli,
    outboxes,
    partition::PartitionArgs,
    relay::exchange,
    rules::{Nacked, Rules, Unroutable},
    serve::Outbox,
    session::Begin,
    subscribers::ExpectArgs,
};

/// A statement of the relay reads at most one batch by an index.
pub const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);

/// Where the relay answers.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct ListenArgs {
    /// Where /live, /ready and /metrics are served.
    #[arg(long, env = "LISTEN", default_value = "127.0.0.1:8002", value_name = "ADDRESS:PORT")]
    pub listen: SocketAddr,
}

/// Settings of `health`.
#[derive(Clone, Debug, clap::Args)]
pub struct HealthArgs {
    /// Where it answers.
    #[command(flatten)]
    pub listen: ListenArgs,
    /// The database of the relay that is asked for; another process at this address is not it.
    #[command(flatten)]
    pub database: DatabaseArgs,
    /// The name of the relay that is asked for.
    #[arg(long, env = "RELAY_NAME", default_value = "default", value_parser = relay_name)]
    pub name: String,
    /// The source that it should publish for, if it should be a certain one. A relay knows it once it has led.
    #[arg(long, env = "SOURCE", value_name = "NAME")]
    pub source: Option<String>,
}

/// Settings of `run`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// The outbox, or what holds for each of the outboxes.
    #[command(flatten)]
    pub outbox: OutboxArgs,
    /// Where it answers.
    #[command(flatten)]
    pub listen: ListenArgs,
    /// Logging.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
    /// Its health and its metrics.
    #[command(flatten)]
    pub probes: ProbeArgs,
    /// Shutdown.
    #[command(flatten)]
    pub shutdown: ShutdownArgs,
    /// Check all settings, read the files that they name, show what is set by whom, and end: with exit code
    /// 2 if `run` would not start. Connects to nothing.
    #[arg(long)]
    pub check_config: bool,
}

/// An outbox, and how it is relayed.
#[derive(Clone, Debug, clap::Args)]
pub struct OutboxArgs {
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
    /// Declare the exchange (topic, durable) if it does not exist, and `<exchange>.by_aggregate` (headers, durable), which
    /// it feeds, for subscribers that follow versions.
    #[arg(long, env = "DECLARE_EXCHANGE")]
    pub declare_exchange: bool,
    /// Add the attributes of CloudEvents 1.0 to each message, as headers `cloudEvents_id`, `cloudEvents_source`,
    /// `cloudEvents_type`, and so on, beside the relay's own.
    #[arg(long, env = "CLOUDEVENTS")]
    pub cloudevents: bool,
    /// What to do with events that no queue takes, by type pattern as in a topic binding: `park` (set aside
    /// and tried again; the rest goes on), `hold` (they wait, later events of their aggregates behind them, and the
    /// relay is not ready) or `drop` (count and go on). The first that matches wins; `park` or `hold` without a
    /// pattern is for the rest: `order.new=hold,order.*=drop,park`. When everything comes back, events wait instead.
    #[arg(long, env = "UNROUTABLE", default_value = "park", value_name = "RULES")]
    pub unroutable: Rules<Unroutable>,
    /// What to do with events that a full queue refuses, by type pattern in the same way: `hold` (they wait, and later
    /// events of their aggregates behind them) or `pass` (after ten seconds or more they are set aside and tried again, and
    /// later events go on: the full queue misses them until then). Other aggregates go on either way.
    #[arg(long, env = "NACKED", default_value = "hold", value_name = "RULES")]
    pub nacked: Rules<Nacked>,
    /// How many events may be set aside; beyond it they wait, and later events of their aggregates behind them.
    #[arg(long, env = "MAX_PARKED", default_value = "10000", value_parser = clap::value_parser!(i64).range(0..))]
    pub max_parked: i64,
    /// How many events of a type may wait in the database; beyond it they stay in memory, and once that is full
    /// nothing more is read.
    #[arg(long, env = "MAX_WAITING", default_value = "10000000", value_parser = clap::value_parser!(i64).range(0..))]
    pub max_waiting: i64,
    /// How long a leader that says nothing stays the leader: after it, another relay takes over.
    #[arg(long, env = "LEASE", default_value = "2s", value_parser = lease, value_name = "DURATION")]
    pub lease: Duration,
    /// Connections that publish in parallel, each for its own aggregates (1 to 32).
    #[arg(long, env = "LANES", default_value = "4", value_parser = lanes)]
    pub lanes: usize,
    /// Events in memory at most.
    #[arg(long, env = "MAX_EVENTS", default_value = "8000", value_parser = at_least_one)]
    pub max_events: usize,
    /// Bytes of events in memory at most, but for one event that is larger by itself.
    #[arg(long, env = "MAX_BYTES", default_value = "16777216", value_parser = at_least_one)]
    pub max_bytes: usize,
    /// Of an aggregate with a long history that was erased, a step rewrites so many events at most.
    #[arg(long, env = "ERASURE_STEP", default_value = "1000", value_parser = clap::value_parser!(i64).range(1..=100_000), value_name = "COUNT")]
    pub erasure_step: i64,
    /// Partitions and retention.
    #[command(flatten)]
    pub partitions: PartitionArgs,
    /// Expected subscribers.
    #[command(flatten)]
    pub expect: ExpectArgs,
}

impl RunArgs {
    /// What `settings` come to, and those of each of `tables`, for people; an error where `run` would not start.
    pub fn check(&self, settings: &[Setting], tables: Vec<Table<Cli>>) -> Result<String, SettingError> {
        let mut text = String::new();
        describe(&mut text, settings);
        if tables.is_empty() {
            text.push_str(&Outbox::new(self.outbox.clone())?.describe());
        } else {
            let of_tables: Vec<_> =
                tables.iter().map(|table| (table.name.clone(), table.settings.clone())).collect();
            let outboxes = outboxes::checked(outboxes::outboxes(tables))?;
            for (name, settings) in of_tables {
                let _never = writeln!(text, "\n[outbox.{name}]");
                let of_its_own = |setting: &&Setting| {
                    matches!(&setting.source, Source::Table(..))
                        || matches!(&setting.source, Source::Variable(name) if name.starts_with("OUTBOX_"))
                };
                describe(&mut text, settings.iter().filter(of_its_own));
                text.push_str(&outboxes.get(&name).map(Outbox::describe).unwrap_or_default());
            }
        }
        text.push_str("Every setting can be used.");
        Ok(text)
    }
}

fn describe<'a>(text: &mut String, settings: impl IntoIterator<Item = &'a Setting>) {
    for Setting { name, value, source } in settings {
        let value = value.as_deref().unwrap_or("-");
        let _never = writeln!(text, "{:<22} {value:<28} {source}", format!("--{name}"));
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
    /// Print the SQL instead of running it, as one script for Flyway, Alembic, Prisma, Rails or `psql -1`. Connects to
    /// nothing.
    #[arg(long)]
    pub print: bool,
    /// With --print: only what follows this migration, to bring an outbox up to date. The newest one that a database has
    /// is max(version) of outbox.migration.
    #[arg(long, requires = "print", value_name = "MIGRATION", value_parser = clap::value_parser!(i64).range(0..))]
    pub after: Option<i64>,
    /// Logging.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}

fn lease(text: &str) -> Result<Duration, String> {
    let lease = daemon::config::duration(text)?;
    if (Duration::from_secs(1)..=Duration::from_mins(1)).contains(&lease) {
        Ok(lease)
    } else {
        Err("it should be from 1s to 1m".to_owned())
    }
}

fn lanes(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| (1..=32).contains(n)).ok_or_else(|| "it should be from 1 to 32".to_owned())
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "it should be a number from 1 on".to_owned())
}

pub(crate) fn relay_name(name: &str) -> Result<String, String> {
    let valid = (1..=63).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-".contains(&b));
    if valid {
        Ok(name.to_owned())
    } else {
        Err("it should be 1 to 63 lower-case letters, digits, '-' or '_', a letter first".to_owned())
    }
}
