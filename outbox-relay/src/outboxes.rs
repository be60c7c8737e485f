//! The process: one outbox by flags and variables, or all that the configuration file has, side by side.

use std::{collections::BTreeMap, time::Duration};

use amqp::Backoff;
use anyhow::Context;
use daemon::{
    cli::Table,
    config::SettingError,
    health::{Health, Identity, Part},
    probes,
    shutdown::Shutdown,
};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{
    signal::unix::{SignalKind, signal},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::{
    cli::{Cli, Command, TABLES},
    config::{HealthArgs, OutboxArgs, RunArgs},
    serve::Outbox,
    systemd::{self, Pulses},
};

/// An outbox whose relay cannot go on is tried again after so long: what it lacks is mended by somebody.
const AGAIN: (Duration, Duration) = (Duration::from_secs(5), Duration::from_mins(1));

/// The settings of each outbox of the file, by name.
pub type Outboxes = Vec<(String, OutboxArgs)>;

/// Relays until `shutdown`: the one outbox of `args`, or each of `tables`. On SIGHUP, `reload` says which there are by now.
pub async fn run(
    args: RunArgs,
    tables: Outboxes,
    reload: impl Fn() -> Result<Outboxes, String> + Send + 'static,
    metrics: PrometheusHandle,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    let drain = args.shutdown.drain_timeout;
    let pulses = Pulses::default();
    if tables.is_empty() {
        let outbox = Outbox::new(args.outbox)?;
        outbox.warn();
        let health = Health::of(outbox.identify(Identity::of("outbox-relay")));
        health.has_version(env!("CARGO_PKG_VERSION"));
        let pulse = pulses.begin();
        // Before anybody can ask: a process without parts would be ready.
        health.part("database");
        probes::serve(&shutdown, args.listen.listen, &args.probes, &health, Some(metrics))?;
        outbox.start(&health, pulse.lease(), drain, &shutdown);
        let stop = shutdown.requested().clone();
        shutdown.spawn("service manager", systemd::notify(health, pulses, stop));
        return shutdown.finish(drain).await;
    }
    let outboxes = checked(tables)?;
    outboxes.values().for_each(Outbox::warn);
    let health = Health::of(Identity::of("outbox-relay"));
    health.has_version(env!("CARGO_PKG_VERSION"));
    // As above.
    let settings = health.part("settings");
    probes::serve(&shutdown, args.listen.listen, &args.probes, &health, Some(metrics))?;
    let supervisor = Supervisor {
        settings,
        health: health.clone(),
        pulses: pulses.clone(),
        stop: shutdown.requested().clone(),
        drain,
        running: BTreeMap::new(),
        tasks: JoinSet::new(),
    };
    shutdown.spawn("outboxes", supervisor.run(outboxes, reload));
    let stop = shutdown.requested().clone();
    shutdown.spawn("service manager", systemd::notify(health, pulses, stop));
    shutdown.finish(drain).await
}

/// The outboxes, if each can be used, and no two are the same.
pub(crate) fn checked(tables: Outboxes) -> Result<BTreeMap<String, Outbox>, SettingError> {
    let mut outboxes: BTreeMap<String, Outbox> = BTreeMap::new();
    for (name, args) in tables {
        let outbox = Outbox::new(args)
            .map_err(|error| SettingError::new(format!("[outbox.{name}] {}", error.name), error.problem))?;
        let identity = outbox.identify(Identity::default());
        let same = |(_, other): &(&String, &Outbox)| other.identify(Identity::default()) == identity;
        if let Some((other, _)) = outboxes.iter().find(same) {
            let problem = format!(
                "has the same database and the same relay name as [outbox.{other}]; leave one of them out, or give it \
                 another name (name = \"second\"), which publishes everything once more"
            );
            return Err(SettingError::new(format!("[outbox.{name}]"), problem));
        }
        outboxes.insert(name, outbox);
    }
    Ok(outboxes)
}

/// The outboxes of the parsed tables, for `run`.
pub fn outboxes(tables: Vec<Table<Cli>>) -> Outboxes {
    let outbox = |table: Table<Cli>| match table.cli.command {
        Command::Run(args) => Some((table.name, args.outbox)),
        _ => None,
    };
    tables.into_iter().filter_map(outbox).collect()
}

/// Whom `health` asks for.
pub fn asked(args: HealthArgs, tables: Vec<Table<Cli>>) -> Result<Identity, SettingError> {
    let of = |args: HealthArgs, identity: Identity| {
        identity.with("relay", args.name).with_some("source", args.source).at_known(&args.database)
    };
    let program = Identity::of("outbox-relay");
    if tables.is_empty() {
        return of(args, program);
    }
    tables.into_iter().try_fold(program, |asked, table| match table.cli.command {
        Command::Health(args) => {
            Ok(asked.with_member(TABLES.kind, &table.name, of(args, Identity::default())?))
        }
        _ => Ok(asked),
    })
}

/// Keeps a relay for each outbox.
struct Supervisor {
    /// Whether the file could be used when it was last read.
    settings: Part,
    health: Health,
    pulses: Pulses,
    stop: CancellationToken,
    /// How long each may finish its work.
    drain: Duration,
    running: BTreeMap<String, Running>,
    tasks: JoinSet<()>,
}

/// An outbox with a relay.
struct Running {
    outbox: Outbox,
    /// Its own parts of the health.
    health: Health,
    /// Ends its relay.
    stop: CancellationToken,
    /// Cancelled when it has ended.
    ended: CancellationToken,
}

impl Supervisor {
    async fn run(
        mut self,
        outboxes: BTreeMap<String, Outbox>,
        reload: impl Fn() -> Result<Outboxes, String>,
    ) -> anyhow::Result<()> {
        let mut hangup = signal(SignalKind::hangup()).context("SIGHUP cannot be handled")?;
        let stop = self.stop.clone();
        for (name, outbox) in outboxes {
            self.start(name, outbox);
        }
        self.settings.ready();
        while stop.run_until_cancelled(hangup.recv()).await.is_some() {
            let outboxes = reload().and_then(|tables| checked(tables).map_err(|error| error.to_string()));
            match outboxes {
                Ok(outboxes) if outboxes.is_empty() => self.refuse("the file has no outbox any more"),
                Ok(outboxes) => {
                    let _stopped = stop.run_until_cancelled(self.change(outboxes)).await;
                }
                Err(error) => self.refuse(&error),
            }
        }
        while self.tasks.join_next().await.is_some() {}
        Ok(())
    }

    /// What runs goes on as it was.
    fn refuse(&self, why: &str) {
        tracing::warn!(why, "the file of settings cannot be used; every outbox goes on as before");
        self.settings.attention(format!(
            "the file of settings cannot be used: {why}. Every outbox goes on as before. Correct the file and send SIGHUP \
             again"
        ));
    }

    /// Ends what is not there any more, begins what is new, and begins anew what has changed.
    async fn change(&mut self, outboxes: BTreeMap<String, Outbox>) {
        let is_same = |name: &String, running: &Running| {
            outboxes.get(name).is_some_and(|outbox| outbox.is_as(&running.outbox))
        };
        let (kept, ended): (BTreeMap<_, _>, BTreeMap<_, _>) =
            std::mem::take(&mut self.running).into_iter().partition(|(name, running)| is_same(name, running));
        for running in ended.values() {
            running.stop.cancel();
        }
        for (name, running) in &ended {
            running.ended.cancelled().await;
            running.health.remove();
            tracing::info!(
                outbox = name,
                "the relay of an outbox ended, since its settings were removed or changed"
            );
        }
        self.running = kept;
        for (name, outbox) in outboxes {
            if !self.running.contains_key(&name) {
                self.start(name, outbox);
            }
        }
        self.settings.ready();
        tracing::info!(outboxes = self.running.len(), "the file of settings was read again");
    }

    fn start(&mut self, name: String, outbox: Outbox) {
        let health = self.health.member(TABLES.kind, &name, outbox.identify(Identity::default()));
        let running =
            Running { outbox, health, stop: self.stop.child_token(), ended: CancellationToken::new() };
        let keep = keep(
            running.outbox.clone(),
            running.health.clone(),
            self.pulses.clone(),
            self.drain,
            running.stop.clone(),
        );
        let ended = running.ended.clone().drop_guard();
        let span = tracing::info_span!("outbox", outbox = name);
        self.tasks.spawn(
            async move {
                keep.await;
                drop(ended);
            }
            .instrument(span),
        );
        self.running.insert(name, running);
    }
}

/// Has an outbox relayed until the end. What ends a process with one outbox alone is waited out here: the others go on.
async fn keep(outbox: Outbox, health: Health, pulses: Pulses, drain: Duration, stop: CancellationToken) {
    let relay = health.part("relay");
    relay.ready();
    let mut pause = Backoff::new(AGAIN.0, AGAIN.1);
    while !stop.is_cancelled() {
        let pulse = pulses.begin();
        let attempt = Shutdown::part(&stop);
        let connected = outbox.start(&health, pulse.lease(), drain, &attempt);
        let ended = attempt.finish(drain);
        tokio::pin!(ended);
        let ended = tokio::select! {
            ended = &mut ended => ended,
            () = connected.cancelled() => {
                relay.ready();
                pause.reset();
                ended.await
            }
        };
        drop(pulse);
        match ended {
            Ok(()) => break,
            Err(error) if stop.is_cancelled() => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "the relay of an outbox did not end as it should"
                );
            }
            Err(error) => {
                relay.waiting(format!("{error:#}. The relay tries again; other outboxes go on"));
                pause.wait(&stop).await;
            }
        }
    }
}
