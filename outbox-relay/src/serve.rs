//! The tasks of one outbox: its relay, and what looks after its tables beside it.

use std::{
    sync::{Arc, OnceLock, atomic::AtomicBool},
    time::Duration,
};

use amqp::Nodes;
use daemon::{
    config::{SettingError, database::Database},
    health::{Health, Identity},
    shutdown::Shutdown,
};
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::{
    broker::Broker,
    config::{OutboxArgs, STATEMENT_TIMEOUT},
    erasure,
    lease::Lease,
    partition,
    relay::{Limits, Relay},
    rules::Policies,
    standby,
    subscribers::{self, Subscribers},
    wake,
};

/// An outbox whose settings can be used.
#[derive(Clone, Debug)]
pub(crate) struct Outbox {
    pub(crate) args: OutboxArgs,
    database: Database,
    nodes: Nodes,
    subscribers: Option<Subscribers>,
    /// Those of all servers, as they were read.
    urls: Vec<SecretString>,
}

impl Outbox {
    pub(crate) fn new(args: OutboxArgs) -> Result<Self, SettingError> {
        let database = args.database.options("outbox-relay", STATEMENT_TIMEOUT)?.by_index();
        let nodes = args.broker.nodes(args.database.require_tls)?;
        let subscribers = Subscribers::new(&args.expect, &nodes, &args.exchange, args.database.require_tls)?;
        let mut urls = vec![args.database.url()?, args.broker.urls()?];
        urls.extend(args.expect.management.url()?);
        Ok(Self { args, database, nodes, subscribers, urls })
    }

    /// Whether another has the same settings, secrets included.
    pub(crate) fn is_as(&self, other: &Self) -> bool {
        let urls =
            |outbox: &Self| outbox.urls.iter().map(|url| url.expose_secret().to_owned()).collect::<Vec<_>>();
        format!("{:?}", self.args) == format!("{:?}", other.args) && urls(self) == urls(other)
    }

    /// Warns of what may be read on its way. For the start.
    pub(crate) fn warn(&self) {
        self.database.warn();
        daemon::config::broker::warn(&self.nodes);
        if let Some(management) = self.subscribers.as_ref().and_then(Subscribers::management) {
            daemon::config::broker::warn_of_management(management);
        }
    }

    /// Where it leads, for people, without secrets.
    pub(crate) fn describe(&self) -> String {
        let brokers = self.nodes.as_ref().iter().map(|node| format!("broker: {node:?}\n"));
        let management = self.subscribers.as_ref().and_then(Subscribers::management);
        let management = management.map(|management| format!("management: {management:?}\n"));
        format!(
            "database: {}\n{}{}",
            self.database.address(),
            brokers.collect::<String>(),
            management.unwrap_or_default()
        )
    }

    /// Which relay of which database it is.
    pub(crate) fn identify(&self, identity: Identity) -> Identity {
        identity.with("relay", &self.args.name).at(&self.database)
    }

    /// Starts its tasks, which end at the latest with `shutdown`. `pulse` is renewed whenever the relay goes round. Returns
    /// what is cancelled once the database was found to be as it should be.
    pub(crate) fn start(
        &self,
        health: &Health,
        pulse: Lease,
        drain: Duration,
        shutdown: &Shutdown,
    ) -> CancellationToken {
        let args = self.args.clone();
        let identity = identity();
        let name = format!("outbox-relay {} {identity}", args.name);
        let broker = Broker {
            nodes: self.nodes.clone(),
            exchange: args.exchange.clone(),
            declare: args.declare_exchange,
            name: name.clone(),
            was_missing: Arc::default(),
        };
        // These wait from the beginning, so that the relay is not ready before they are.
        let [database_health, broker_health] = ["database", "broker"].map(|part| health.part(part));
        let [events_health, paused_health, server_health, sequence_health, exchange_health] =
            ["events", "paused", "server", "sequence", "exchange"].map(|part| health.part(part));
        let [partitions_health, erasures_health] = ["partitions", "erasures"].map(|part| health.part(part));
        // There is nothing to wait for before there is an event, or a pause.
        let of_the_relay =
            [&events_health, &paused_health, &server_health, &sequence_health, &exchange_health];
        for part in of_the_relay.into_iter().chain([&partitions_health, &erasures_health]) {
            part.ready();
        }
        let wake = Arc::new(Notify::new());
        let connected = CancellationToken::new();
        let series = Arc::new(OnceLock::new());
        let relay = Relay {
            database: self.database.clone(),
            name: args.name,
            begin: args.begin,
            identity,
            broker,
            cloudevents: args.cloudevents,
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
            pulse,
            series: Arc::clone(&series),
            connected: connected.clone(),
            health: health.clone(),
            database_health,
            broker_health,
            events_health,
            nothing_flows: AtomicBool::new(false),
            paused_health,
            server_health,
            sequence_health,
            exchange_health,
            // The rest is for closing the connections.
            grace: drain * 3 / 4,
        };
        let (database, stop) = (&self.database, shutdown.requested());
        shutdown.spawn("relay", standby::run(relay, stop.clone()));
        shutdown.spawn("wake-up", wake::listen(database.clone(), wake, stop.clone()));
        if let Some(subscribers) = self.subscribers.clone() {
            // What is missing stops no event.
            let part = health.part("subscribers");
            part.ready();
            let watch = subscribers::watch(
                subscribers,
                Arc::clone(&series),
                (health.clone(), part),
                name,
                stop.clone(),
            );
            shutdown.spawn("subscribers", when_connected(connected.clone(), stop.clone(), watch));
        }
        let erasures =
            erasure::work_off(database.clone(), args.erasure_step, series, erasures_health, stop.clone());
        shutdown.spawn("erasures", when_connected(connected.clone(), stop.clone(), erasures));
        let partitions =
            partition::maintain(database.clone(), args.partitions, partitions_health, stop.clone());
        shutdown.spawn("partitions", when_connected(connected.clone(), stop.clone(), partitions));
        connected
    }
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
