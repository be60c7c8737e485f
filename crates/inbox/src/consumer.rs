use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use amqp::{Backoff, Nodes, Reconnect};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    Handler, Part, Sequencer, Status, Topology,
    alarms::{Alarms, Found, Most},
    erasure,
    handler::describe,
    stall::Stall,
    subscription::{Subscription, Trouble, answer},
};

/// How long the database may take to say whether it is there.
const ANSWER: Duration = Duration::from_secs(10);
/// Why nothing is consumed while nothing could be stored.
const READ_ONLY: &str = "the database takes no writes: it is a standby, or default_transaction_read_only is set for \
                         the role or the database; connect to the primary";
/// How often an idle consumer asks whether the database is still there.
const DATABASE_CHECK: Duration = Duration::from_secs(5);
/// How often it is looked for what needs somebody's attention.
const ALARMS: Duration = Duration::from_secs(5);
/// How often it is looked whether messages wait without being applied.
const STALLS: Duration = Duration::from_secs(1);

/// How to consume.
#[derive(Clone, Debug)]
pub struct Config {
    /// Exchanges and queues.
    pub topology: Topology,
    /// The broker's nodes, tried in turn.
    pub nodes: Nodes,
    /// What the broker's operators see the connection as.
    pub connection_name: String,
    /// How many messages one transaction takes at most. Twice as many are in memory, so their size
    /// bounds it; RabbitMQ cannot limit what it sends ahead by bytes.
    pub batch: u16,
    /// After so many events refused in a row, with none applied in between, it is the handler that is
    /// broken: nothing more is consumed until one of them succeeds. 0 for never.
    pub max_refused: u32,
    /// When more events than this were refused or wait behind one that was, nothing more is consumed
    /// until they are fewer. 0 for never.
    pub max_held: u32,
    /// How many messages that cannot be applied are kept, for each reason; further ones are only counted.
    /// 0 for any number.
    pub max_rejected: u32,
    /// How many events may wait for a version that has not arrived; further ones are rejected. 0 for any number.
    pub max_gaps: u32,
    /// For how long versions may be missing before somebody should look.
    pub hole_after: Duration,
}

impl Config {
    /// The defaults: 100 messages a transaction, 20 refused in a row, 10,000 held, 10,000 rejected for a reason,
    /// 1,000,000 that wait for missing versions, and a minute.
    pub fn new(topology: Topology, nodes: Nodes, connection_name: impl Into<String>) -> Self {
        Self {
            topology,
            nodes,
            connection_name: connection_name.into(),
            batch: 100,
            max_refused: 20,
            max_held: 10_000,
            max_rejected: 10_000,
            max_gaps: 1_000_000,
            hole_after: Duration::from_mins(1),
        }
    }
}

/// Consumes for as long as the process lives: connects, declares, subscribes, applies, and begins again
/// whenever one of these ends.
#[derive(Debug)]
pub struct Consumer<H> {
    config: Config,
    sequencer: Sequencer<H>,
    status: watch::Sender<Status>,
    /// Of the queue and of its dead letters.
    stalls: [Stall; 2],
}

impl<H: Handler> Consumer<H> {
    /// Nothing happens before [`run`](Self::run).
    pub fn new(config: Config, sequencer: Sequencer<H>) -> Self {
        sequencer.streaks().limit(config.max_refused);
        sequencer.limits.set_rejected(config.max_rejected);
        let status = watch::Sender::new(Status::starting());
        Self { config, sequencer, status, stalls: Default::default() }
    }

    /// What it waits for, now and later.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// Consumes until `stop`. Then the transaction under way is finished and acknowledged, and what
    /// else was received is given back.
    pub async fn run(self, stop: CancellationToken) {
        if self.sequencer.sources.is_all() {
            tracing::warn!(
                consumer = self.sequencer.consumer,
                "every source is followed and every user of the broker believed: whoever may write to the exchange \
                 can forge events. Name the sources and the users that publish them"
            );
        }
        let erased = erasure::keep(&self.sequencer.pool, &self.sequencer.consumer, &stop);
        tokio::join!(Box::pin(self.consume(&stop)), self.watch(&stop), self.watch_stalls(&stop), erased);
    }

    async fn consume(&self, stop: &CancellationToken) {
        let mut reconnect = Reconnect::default();
        let mut said = None;
        while !stop.is_cancelled() {
            let progress = AtomicBool::new(false);
            let Err(trouble) = self.session(&mut reconnect, stop, &progress).await else { continue };
            if progress.into_inner() {
                reconnect.works();
            }
            // The same trouble once more is news only after it had passed.
            if self.status.borrow().consuming.is_ok() {
                said = None;
            }
            match &trouble {
                Trouble::Broker(reason) => {
                    reconnect.lost();
                    self.set(|status| &mut status.broker, Err(reason.clone()));
                    self.set(|status| &mut status.consuming, Err("waiting for the broker".to_owned()));
                }
                Trouble::Database(reason) => {
                    self.set(|status| &mut status.database, Err(reason.clone()));
                    self.set(|status| &mut status.consuming, Err("waiting for the database".to_owned()));
                }
                Trouble::Handler(reason) => {
                    self.mend(stop, reason).await;
                    continue;
                }
            }
            let pause = reconnect.pause();
            if said.as_ref() == Some(&trouble) {
                tracing::debug!(?trouble, ?pause, "consuming was interrupted again");
            } else {
                tracing::warn!(?trouble, ?pause, "consuming was interrupted");
                said = Some(trouble);
            }
            stop.run_until_cancelled(tokio::time::sleep(pause)).await;
        }
    }

    /// Consumes nothing until the handler has applied one of those that it refused, and not too many
    /// are left. Nothing is subscribed to meanwhile, so no deliveries are used up.
    async fn mend(&self, stop: &CancellationToken, reason: &str) {
        tracing::error!(reason, "consuming has stopped; what was refused is tried again from time to time");
        let open = metrics::gauge!("inbox_breaker_open", "consumer" => self.sequencer.consumer.clone());
        open.set(1);
        self.set(|status| &mut status.consuming, Err(reason.to_owned()));
        let mut backoff = Backoff::default();
        while stop.run_until_cancelled(tokio::time::sleep(backoff.step())).await.is_some() {
            match self.sequencer.mend(self.config.max_held).await {
                Ok(None) => {
                    tracing::info!("consuming goes on");
                    open.set(0);
                    return;
                }
                Ok(Some(reason)) => {
                    self.set(|status| &mut status.database, Ok(()));
                    self.set(|status| &mut status.consuming, Err(reason));
                }
                Err(stop) => {
                    self.set(|status| &mut status.database, Err(stop.reason()));
                }
            }
        }
    }

    /// One connection's life. Nothing is consumed before the database answers: a message that is
    /// delivered only to be given back uses up one of its deliveries.
    async fn session(
        &self,
        reconnect: &mut Reconnect,
        stop: &CancellationToken,
        progress: &AtomicBool,
    ) -> Result<(), Trouble> {
        let prepare = async {
            self.ask_database().await?;
            self.ask_held().await?;
            let name = &self.config.connection_name;
            let connection = self.config.nodes.connect(name, reconnect).await?;
            let channel = answer(connection.create_channel()).await?;
            answer(self.config.topology.declare(&channel)).await?;
            answer(channel.close(200, "bye".into())).await?;
            self.set(|status| &mut status.broker, Ok(()));
            let topology = &self.config.topology;
            let main = Subscription::open(&connection, topology.queue(), self.config.batch, false).await?;
            let dead = Subscription::open(&connection, topology.dead(), self.config.batch, true).await?;
            Ok::<_, Trouble>((connection, main, dead))
        };
        // Only waiting so far, so it may be cut off.
        let Some(prepared) = stop.run_until_cancelled(prepare).await else { return Ok(()) };
        let (connection, main, dead) = prepared?;
        self.set(|status| &mut status.consuming, Ok(()));

        // Whichever ends ends the others, each after the work it has begun.
        let session = stop.child_token();
        let settled = || progress.store(true, Ordering::Relaxed);
        let [of_main, of_dead] = &self.stalls;
        let (main, dead, database) = tokio::join!(
            Box::pin(ending(&session, main.run(&self.sequencer, &session, of_main, settled))),
            Box::pin(ending(&session, dead.run(&self.sequencer, &session, of_dead, settled))),
            ending(&session, self.watch_database(&session)),
        );
        connection.close().await;
        database.and(main).and(dead)
    }

    /// Whether the database answers, and takes writes: on the connection that the next transaction has.
    async fn ask_database(&self) -> Result<(), Trouble> {
        let session = &self.sequencer.session;
        let question = async {
            let mut conn = session.take().await?;
            let read_only: bool = sqlx::query_scalar(
                "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean",
            )
            .fetch_one(&mut *conn)
            .await?;
            session.keep(conn);
            Ok(read_only)
        };
        let answer = match tokio::time::timeout(ANSWER, question).await {
            Ok(Ok(false)) => Ok(()),
            Ok(Ok(true)) => Err(READ_ONLY.to_owned()),
            Ok(Err(error)) => Err(describe(&error)),
            Err(_) => Err(format!("the database did not answer within {ANSWER:?}")),
        };
        self.set(|status| &mut status.database, answer.clone());
        answer.map_err(Trouble::Database)
    }

    /// An idle consumer notices, too, that it could do nothing if a message came.
    async fn watch_database(&self, stop: &CancellationToken) -> Result<(), Trouble> {
        while stop.run_until_cancelled(tokio::time::sleep(DATABASE_CHECK)).await.is_some() {
            self.ask_database().await?;
            self.ask_held().await?;
        }
        Ok(())
    }

    /// Not more than may be held.
    async fn ask_held(&self) -> Result<(), Trouble> {
        match self.sequencer.overfull(self.config.max_held).await {
            Ok(None) => Ok(()),
            Ok(Some(reason)) => Err(Trouble::Handler(reason)),
            Err(error) => Err(Trouble::Database(describe(&error))),
        }
    }

    /// Looks at what needs somebody's attention, whatever else goes on.
    async fn watch(&self, stop: &CancellationToken) {
        let queue = self.config.topology.queue().as_str();
        let Sequencer { consumer, pool, .. } = &self.sequencer;
        let most = Most { rejected: self.config.max_rejected, gaps: self.config.max_gaps };
        let mut alarms = Alarms::new(consumer, pool, queue, self.config.hole_after, most);
        while stop.run_until_cancelled(tokio::time::sleep(ALARMS)).await.is_some() {
            match alarms.look().await {
                Ok(Found { holes, forks, forged, limits, full }) => {
                    self.sequencer.limits.set_full(full);
                    self.set(|status| &mut status.sources, forged.map_or(Ok(()), Err));
                    self.status.send_if_modified(|status| {
                        let modified =
                            (&status.holes, &status.forks, &status.limits) != (&holes, &forks, &limits);
                        (status.holes, status.forks, status.limits) = (holes, forks, limits);
                        modified
                    });
                }
                // Who consumes says so.
                Err(error) => tracing::debug!(error = describe(&error), "no look at what is held"),
            }
        }
    }

    /// Says when messages wait without being applied.
    async fn watch_stalls(&self, stop: &CancellationToken) {
        while stop.run_until_cancelled(tokio::time::sleep(STALLS)).await.is_some() {
            let stalled = self.stalls.iter().find_map(Stall::reason);
            self.set(|status| &mut status.applying, stalled.map_or(Ok(()), Err));
        }
    }

    fn set(&self, part: impl FnOnce(&mut Status) -> &mut Part, state: Part) {
        self.status.send_if_modified(|status| {
            let part = part(status);
            let modified = *part != state;
            *part = state;
            modified
        });
    }
}

/// Ends the session with `work`, however it ends.
async fn ending<T>(session: &CancellationToken, work: impl Future<Output = T>) -> T {
    let _guard = session.clone().drop_guard();
    work.await
}
