//! The command line.

use std::net::SocketAddr;

use clap::{Args, Parser, Subcommand};
use daemon::{
    config::{broker::BrokerArgs, database::DatabaseArgs},
    probes::ProbeArgs,
    shutdown::ShutdownArgs,
    telemetry::TelemetryArgs,
};
use inbox::Publisher;

use crate::{
    command::{held::HeldArgs, rejected::RejectedArgs},
    digest::DigestArgs,
    rebuild::RebuildArgs,
    republish::RepublishArgs,
    verify::VerifyArgs,
};

/// Applies the person service's events to the score service's read model, and publishes the scores.
#[derive(Debug, Parser)]
#[command(name = "score-projector", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the program can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Consume events until SIGTERM.
    Run(RunArgs),
    /// Create the schemas `score` and `inbox` in the database, or bring them up to date.
    Migrate(MigrateArgs),
    /// Sum up what the read model has received, to compare it with `outbox-relay digest` of its source.
    Digest(DigestArgs),
    /// List, show, redrive or skip events that wait in the inbox.
    Held(HeldArgs),
    /// List, show or drop messages that cannot be applied.
    Rejected(RejectedArgs),
    /// Build a second read model beside the live one, and replace the live one with it.
    Rebuild(RebuildArgs),
    /// Publish the whole score of persons once more, as baselines, for subscribers to `score.*`.
    Republish(RepublishArgs),
    /// Recompute every score from its entries, and compare the read model with the inbox. Exit code 3 when
    /// something differs.
    Verify(VerifyArgs),
    /// Ask the running program whether it is ready, as a container's health check does.
    Health(HealthArgs),
}

/// Settings of `run`.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// The address of /live, /ready and /metrics.
    #[arg(long, env = "LISTEN", default_value = "127.0.0.1:8004", value_name = "ADDRESS")]
    pub listen: SocketAddr,
    /// The queue to consume from. Its dead letters go to `<queue>.dead`. The program declares both.
    #[arg(long, env = "QUEUE", default_value = "score", value_name = "NAME")]
    pub queue: String,
    /// A source to follow, and a broker user that publishes it: `person=outbox_relay_person`. May be repeated, also
    /// for one source while its user is renamed; the variable takes commas. Messages of other sources and of other
    /// users are rejected. Without this setting the program warns, and applies messages of every source and user: any
    /// user that may write to the exchange can then forge events.
    #[arg(long, env = "SOURCE", value_delimiter = ',', value_name = "SOURCE=USER")]
    pub source: Vec<Publisher>,
    /// After this many refused events in a row, the program counts as broken, not the events: consuming stops until one
    /// of them succeeds. 0 for no limit.
    #[arg(long, env = "MAX_REFUSED", default_value_t = 20, value_name = "COUNT")]
    pub max_refused: u32,
    /// How many events may be refused or wait behind a refused one. Above it, consuming stops until they are fewer. 0
    /// for no limit.
    #[arg(long, env = "MAX_HELD", default_value_t = 10_000, value_name = "COUNT")]
    pub max_held: u32,
    /// How many messages that cannot be applied are stored for each reason. Further ones are only counted. 0 for no
    /// limit.
    #[arg(long, env = "MAX_REJECTED", default_value_t = 10_000, value_name = "COUNT")]
    pub max_rejected: u32,
    /// How many events may wait for versions that have not arrived. Further ones are rejected. 0 for no limit.
    #[arg(long, env = "MAX_GAPS", default_value_t = 1_000_000, value_name = "COUNT")]
    pub max_gaps: u32,
    /// Where the database is.
    #[command(flatten)]
    pub database: DatabaseArgs,
    /// Where the broker is.
    #[command(flatten)]
    pub broker: BrokerArgs,
    /// Health and metrics.
    #[command(flatten)]
    pub probes: ProbeArgs,
    /// The time to drain.
    #[command(flatten)]
    pub shutdown: ShutdownArgs,
    /// What to log.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}

/// Settings of `migrate`.
#[derive(Clone, Debug, Args)]
pub struct MigrateArgs {
    /// Where the database is.
    #[command(flatten)]
    pub database: DatabaseArgs,
    /// A role that `score-projector run` uses: grants it the rights that it needs on `score` and `inbox`. Those on
    /// `outbox` come from `outbox-relay migrate --grant-writer`. May be repeated.
    #[arg(long, value_name = "ROLE")]
    pub grant_to: Vec<String>,
    /// A role that `score-api run` uses: lets it read the scores. May be repeated.
    #[arg(long, value_name = "ROLE")]
    pub grant_api: Vec<String>,
}

/// Settings of `health`.
#[derive(Clone, Debug, Args)]
pub struct HealthArgs {
    /// The address at which the program listens.
    #[arg(long, env = "LISTEN", default_value = "127.0.0.1:8004", value_name = "ADDRESS")]
    pub listen: SocketAddr,
    /// The database of the process that is meant. A process with another database counts as not ready.
    #[command(flatten)]
    pub database: DatabaseArgs,
    /// The queue that the process consumes from.
    #[arg(long, env = "QUEUE", default_value = "score", value_name = "NAME")]
    pub queue: String,
    /// The consumer that its live read model must have: `score`, or for example `score-2` after a rebuild. Any, when not
    /// given.
    #[arg(long, value_name = "NAME")]
    pub consumer: Option<String>,
}
