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
    /// Sum up what the read model has received, to be compared with what its source has.
    Digest(DigestArgs),
    /// Events that wait in the inbox: list, show, redrive, skip.
    Held(HeldArgs),
    /// Messages that cannot be applied: list, show, drop.
    Rejected(RejectedArgs),
    /// Build the read model a second time, beside the live one, and let it take its place.
    Rebuild(RebuildArgs),
    /// Recompute every score from its entries, and hold the read model against the inbox; exit code 3 when
    /// something does not fit.
    Verify(VerifyArgs),
    /// Ask the program that runs at this address whether it is ready; for a container's health check.
    Health(HealthArgs),
}

/// Settings of `run`.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Where to answer /live, /ready and /metrics.
    #[arg(long, env = "LISTEN", default_value = "127.0.0.1:8004", value_name = "ADDRESS")]
    pub listen: SocketAddr,
    /// The queue to consume from; its dead letters go to `<queue>.dead`. Both are declared.
    #[arg(long, env = "QUEUE", default_value = "score", value_name = "NAME")]
    pub queue: String,
    /// A source to follow, and a user of the broker that publishes it: `person=outbox_relay_person`. May be
    /// repeated, also for one source, as while its user is renamed; with commas between in the variable. Messages of
    /// other sources, and of other users, are rejected. Without it every source is followed and every user
    /// believed, with a warning: whoever may write to the exchange can then forge events.
    #[arg(long, env = "SOURCE", value_delimiter = ',', value_name = "SOURCE=USER")]
    pub source: Vec<Publisher>,
    /// After so many events refused in a row, with none applied in between, nothing more is consumed until
    /// one of them succeeds: it is the program that is broken, and not the events. 0 for never.
    #[arg(long, env = "MAX_REFUSED", default_value_t = 20, value_name = "COUNT")]
    pub max_refused: u32,
    /// When more events than this were refused or wait behind one that was, nothing more is consumed until
    /// they are fewer. 0 for never.
    #[arg(long, env = "MAX_HELD", default_value_t = 10_000, value_name = "COUNT")]
    pub max_held: u32,
    /// Of messages that cannot be applied so many are kept for each reason; further ones are only counted. 0 for
    /// any number.
    #[arg(long, env = "MAX_REJECTED", default_value_t = 10_000, value_name = "COUNT")]
    pub max_rejected: u32,
    /// So many events may wait for versions that have not arrived; further ones are rejected. 0 for any number.
    #[arg(long, env = "MAX_GAPS", default_value_t = 1_000_000, value_name = "COUNT")]
    pub max_gaps: u32,
    /// Where the database is.
    #[command(flatten)]
    pub database: DatabaseArgs,
    /// Where the broker is.
    #[command(flatten)]
    pub broker: BrokerArgs,
    /// Its health and its metrics.
    #[command(flatten)]
    pub probes: ProbeArgs,
    /// How long to drain.
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
    /// A role that `score-projector run` uses: it gets the rights on `score` and `inbox` that it needs
    /// (those on `outbox` come from `outbox-relay migrate --grant-writer`). May be repeated.
    #[arg(long, value_name = "ROLE")]
    pub grant_to: Vec<String>,
    /// A role that `score-api run` uses: it may read the scores. May be repeated.
    #[arg(long, value_name = "ROLE")]
    pub grant_api: Vec<String>,
}

/// Settings of `health`.
#[derive(Clone, Debug, Args)]
pub struct HealthArgs {
    /// Where the program listens.
    #[arg(long, env = "LISTEN", default_value = "127.0.0.1:8004", value_name = "ADDRESS")]
    pub listen: SocketAddr,
    /// The database of the process that is asked for; another one at this address is not it.
    #[command(flatten)]
    pub database: DatabaseArgs,
    /// The queue that it consumes from.
    #[arg(long, env = "QUEUE", default_value = "score", value_name = "NAME")]
    pub queue: String,
    /// The consumer of its live read model, if it should be a certain one: `score`, or `score-2` after a rebuild.
    #[arg(long, value_name = "NAME")]
    pub consumer: Option<String>,
}
