//! Publishes any database's outbox to RabbitMQ. It knows nothing of what the events are about.
//!
//! The way of an event: [`reader`] finds it by its position, [`queue`] has it wait for its turn, a lane
//! [`publish`]es it and learns its fate, [`relay`] settles it, or sets it aside ([`parked`]), and
//! [`leader`] stores the progress. [`position`] remembers what was read and what is missing.

pub mod broker;
pub mod command;
pub mod config;
mod failpoint;
pub mod lane;
pub mod leader;
pub mod lease;
mod migrate;
pub mod parked;
pub mod partition;
mod pause;
pub mod position;
pub mod publish;
pub mod queue;
pub mod reader;
pub mod relay;
mod sabotage;
mod systemd;
pub mod unroutable;
mod wake;

use std::sync::Arc;

use metrics_exporter_prometheus::PrometheusHandle;
use poem::Route;
use service::{config::database, front::Front, health::Health, shutdown::Shutdown};
use tokio::sync::Notify;

use config::{RunArgs, STATEMENT_TIMEOUT};
use lease::Lease;
use relay::{Limits, Relay};

pub use migrate::migrate;

/// Relays until `shutdown`.
pub async fn run(args: RunArgs, metrics: PrometheusHandle, shutdown: Shutdown) -> anyhow::Result<()> {
    sabotage::check()?;
    let front = Front::new(args.listen.listen, &args.front, 0)?;
    let database = database::by_index(args.database.options("outbox-relay", STATEMENT_TIMEOUT)?);
    let identity = identity();
    let nodes = broker::Nodes {
        nodes: args.broker.nodes()?,
        exchange: args.exchange.clone(),
        declare: args.declare_exchange,
        name: format!("outbox-relay {} {identity}", args.name),
    };
    let health = Health::new();
    let (events_health, paused_health) = (health.part("events"), health.part("paused"));
    let partitions_health = health.part("partitions");
    // There is nothing to wait for before there is an event, or a pause.
    for part in [&events_health, &paused_health, &partitions_health] {
        part.ready();
    }
    let wake = Arc::new(Notify::new());
    let pulse = Lease::new(systemd::PULSE);
    let relay = Relay {
        database: database.clone(),
        name: args.name,
        begin: args.begin,
        identity,
        nodes,
        policy: args.unroutable,
        lease: args.lease,
        limits: Limits {
            lanes: args.lanes,
            events: args.max_events,
            bytes: args.max_bytes,
            parked: args.max_parked,
        },
        wake: Arc::clone(&wake),
        pulse: pulse.clone(),
        health: health.clone(),
        database_health: health.part("database"),
        broker_health: health.part("broker"),
        events_health,
        paused_health,
        // The rest is for closing the connections.
        grace: args.shutdown.drain_timeout * 3 / 4,
    };
    let told = health.clone();
    let routes = health.add_to(Route::new(), Some(metrics));
    shutdown.serve(front, routes, args.shutdown.drain_timeout)?;
    let stop = shutdown.requested().clone();
    shutdown.spawn("relay", relay.run(stop.clone()));
    shutdown.spawn("wake-up", wake::listen(database.clone(), wake, stop.clone()));
    let partitions = partition::keep(database, args.partitions, partitions_health, stop.clone());
    shutdown.spawn("partitions", partitions);
    shutdown.spawn("service manager", systemd::notify(told, pulse, stop));
    shutdown.finish(args.shutdown.drain_timeout).await
}

/// Who this process is, for people who look at the leader's row.
fn identity() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}:{}", if host.trim().is_empty() { "localhost" } else { host.trim() }, std::process::id())
}
