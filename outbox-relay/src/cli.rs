//! The command line: each command with its settings.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use clap_complete::Shell;
use daemon::cli::Tables;

use crate::{
    command::{
        backfill::BackfillArgs, digest::DigestArgs, doctor::DoctorArgs, erasures::ErasuresArgs,
        forget::ForgetArgs, new_incarnation::NewIncarnationArgs, parked::ParkedArgs, pause::PauseArgs,
        prune::PruneArgs, recover::RecoverArgs, replay::ReplayArgs, status::StatusArgs, trace::TraceArgs,
    },
    config::{HealthArgs, MigrateArgs, RunArgs},
};

/// The configuration file may have several outboxes.
pub const TABLES: Tables = Tables { kind: "outbox", commands: &["run", "health"], lists: &["expect"] };

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
    /// Show where each relay stands, and what it waits for; exit code 3 when something is not well.
    Status(StatusArgs),
    /// Examine the database, its relays and the broker; exit code 3 when there is something to do.
    Doctor(DoctorArgs),
    /// Find an event, or an aggregate's events, and how far each relay is with them.
    Trace(TraceArgs),
    /// Sum up what the outbox has, or compare it with what a subscriber has applied; exit code 3 when
    /// they differ.
    Digest(Box<DigestArgs>),
    /// Look after events that were set aside.
    Parked(ParkedArgs),
    /// Publish history again, beside the live relay: to one queue alone, or to everybody.
    Replay(Box<ReplayArgs>),
    /// Publish the state of each captured aggregate as a baseline, beside its writers: to everybody, or to one queue alone.
    Backfill(Box<BackfillArgs>),
    /// Publish nothing more until `resume`; writers do not notice.
    Pause {
        /// Which relay.
        #[command(flatten)]
        args: PauseArgs,
        /// Why, for whoever finds it paused.
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
    },
    /// Go on after `pause`.
    Resume(PauseArgs),
    /// After a restore or a failover: say what is to be done, do it step by step, and say when nothing is left. Exit code
    /// 3 while something is.
    Recover(RecoverArgs),
    /// After a restore or a failover that lost commits: publish under a new incarnation of the source. `recover` does it
    /// too.
    NewIncarnation(NewIncarnationArgs),
    /// Empty partitions of the outbox whose events are old enough, and needed by nobody.
    Prune(PruneArgs),
    /// Show which ended aggregates are still being erased; exit code 3 while there are any.
    Erasures(ErasuresArgs),
    /// Remove a relay name that is not used any more, with what it set aside; retention then no longer waits
    /// for it.
    Forget(ForgetArgs),
    /// Ask a running relay whether it is ready; exit code 1, with the reasons, when it is not.
    Health(HealthArgs),
    /// Print what completes this program's commands in a shell.
    Completions {
        /// Which shell.
        shell: Shell,
    },
    /// Write the manual pages into a folder, one for each command.
    #[command(hide = true)]
    Man {
        /// Where.
        folder: PathBuf,
    },
}
