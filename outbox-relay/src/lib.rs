//! Publishes any database's outbox to RabbitMQ. It knows nothing of what the events are about.
//!
//! The way of an event: [`reader`] finds it by its position, [`queue`] has it wait for its turn, a lane
//! [`publish`]es it and learns its fate, [`queue`] decides by the [`evidence`] what that means, `lead` settles it, has
//! it wait ([`waiting`]) or sets it aside ([`parked`]), and the [`session`] stores the progress. [`position`] remembers
//! what was read and what is missing.

pub mod broker;
pub mod budget;
pub mod cli;
pub mod command;
pub mod condition;
pub mod config;
pub mod erasure;
pub mod event;
pub mod evidence;
mod failpoint;
mod frame;
pub mod identity;
pub mod lane;
mod lead;
pub mod lease;
pub mod message;
mod migrate;
pub mod parked;
pub mod partition;
pub mod position;
pub mod publish;
pub mod queue;
pub mod reader;
pub mod relay;
pub mod row;
pub mod rules;
pub mod session;
mod standby;
mod systemd;
mod task_connection;
pub mod unreadable;
pub mod waiting;
mod wake;

use std::sync::{Arc, atomic::AtomicBool};

use daemon::{
    health::{Health, Identity},
    probes,
    shutdown::Shutdown,
};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use config::{RunArgs, STATEMENT_TIMEOUT};
use lease::Lease;
use relay::{Limits, Relay};
use rules::Policies;

pub use migrate::migrate;

/// Relays until `shutdown`.
pub async fn run(args: RunArgs, metrics: PrometheusHandle, shutdown: Shutdown) -> anyhow::Result<()> {
    let database = args.database.options("outbox-relay", STATEMENT_TIMEOUT)?.by_index();
    database.warn();
    let identity = identity();
    let nodes = args.broker.nodes(args.database.require_tls)?;
    daemon::config::broker::warn(&nodes);
    let broker = broker::Broker {
        nodes,
        exchange: args.exchange.clone(),
        declare: args.declare_exchange,
        name: format!("outbox-relay {} {identity}", args.name),
        was_missing: Arc::default(),
    };
    let health = Health::of(Identity::of("outbox-relay").with("relay", &args.name).at(&database));
    let (events_health, paused_health) = (health.part("events"), health.part("paused"));
    let partitions_health = health.part("partitions");
    let erasures_health = health.part("erasures");
    let server_health = health.part("server");
    let sequence_health = health.part("sequence");
    let exchange_health = health.part("exchange");
    // There is nothing to wait for before there is an event, or a pause.
    let others = [&partitions_health, &erasures_health, &server_health, &sequence_health, &exchange_health];
    for part in [&events_health, &paused_health].into_iter().chain(others) {
        part.ready();
    }
    let wake = Arc::new(Notify::new());
    let pulse = Lease::new(systemd::PULSE);
    let connected = CancellationToken::new();
    let relay = Relay {
        database: database.clone(),
        name: args.name,
        begin: args.begin,
        identity,
        broker,
        policies: Policies { unroutable: args.unroutable, nacked: args.nacked, exchange: args.exchange },
        lease: args.lease,
        limits: Limits {
            lanes: args.lanes,
            events: args.max_events,
            bytes: args.max_bytes,
            parked: args.max_parked,
            waiting: args.max_waiting,
        },
        wake: Arc::clone(&wake),
        pulse: pulse.clone(),
        connected: connected.clone(),
        health: health.clone(),
        database_health: health.part("database"),
        broker_health: health.part("broker"),
        events_health,
        nothing_flows: AtomicBool::new(false),
        paused_health,
        server_health,
        sequence_health,
        exchange_health,
        // The rest is for closing the connections.
        grace: args.shutdown.drain_timeout * 3 / 4,
    };
    let service_health = health.clone();
    probes::serve(&shutdown, args.listen.listen, &args.probes, &health, Some(metrics))?;
    let stop = shutdown.requested().clone();
    shutdown.spawn("relay", standby::run(relay, stop.clone()));
    shutdown.spawn("wake-up", wake::listen(database.clone(), wake, stop.clone()));
    let erasures = erasure::work_off(database.clone(), args.erasure_step, erasures_health, stop.clone());
    shutdown.spawn("erasures", when_connected(connected.clone(), stop.clone(), erasures));
    let partitions = partition::maintain(database, args.partitions, partitions_health, stop.clone());
    shutdown.spawn("partitions", when_connected(connected, stop.clone(), partitions));
    shutdown.spawn("service manager", systemd::notify(service_health, pulse, stop));
    shutdown.finish(args.shutdown.drain_timeout).await
}

/// Begins with a task only when the relay has connected: before, the task could only repeat what the relay says of the
/// database.
async fn when_connected(
    connected: CancellationToken,
    stop: CancellationToken,
    task: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<()> {
    match stop.run_until_cancelled(connected.cancelled()).await {
        Some(()) => task.await,
        None => Ok(()),
    }
}

/// Who this process is, for people who look at the leader's row.
fn identity() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}:{}", if host.trim().is_empty() { "localhost" } else { host.trim() }, std::process::id())
}
