use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use amqp::{Backoff, Nodes, Reconnect};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    Handler, Part, Sequencer, Status, Topology,
    alarms::{Alarms, Findings, StorageCaps},
    erasure,
    handler::describe,
    requests, series,
    stall::StallDetector,
    subscription::{Subscription, Trouble, answer},
};

/// How long the database may take to say whether it is there.
const ANSWER: Duration = Duration::from_secs(10);
/// Why nothing is consumed while nothing could be stored.
const READ_ONLY: &str = "the database takes no writes: it is a standby, or default_transaction_read_only is set for \
                         the role or the database; connect to the primary";
/// How often an idle consumer asks whether the database is still there.
const DATABASE_CHECK: Duration = Duration::from_secs(5);
/// How often the alarms are read.
const ALARMS: Duration = Duration::from_secs(5);
/// How often the stall detectors are read.
const STALLS: Duration = Duration::from_secs(1);

/// The settings of a consumer.
#[derive(Clone, Debug)]
pub struct Config {
    /// Exchanges and queues.
    pub topology: Topology,
    /// The broker's nodes, tried in turn.
    pub nodes: Nodes,
    /// The connection's name in the broker's management.
    pub connection_name: String,
    /// How many messages one transaction takes at most. Up to twice as many are in memory: RabbitMQ cannot limit its
    /// prefetch by bytes.
    pub batch: u16,
    /// After this many refused events in a row, the handler counts as broken: consuming stops until one of them succeeds.
    /// 0 for no limit.
    pub max_refused: u32,
    /// How many events may be refused or wait behind a refused one. Above it, consuming stops until they are fewer. 0
    /// for no limit.
    pub max_held: u32,
    /// How many messages that cannot be applied are stored for each reason. Further ones are only counted. 0 for no
    /// limit.
    pub max_rejected: u32,
    /// How many events may wait for versions that have not arrived. Further ones are rejected. 0 for no limit.
    pub max_gaps: u32,
    /// How long versions may be missing before the status reports them.
    pub hole_after: Duration,
}

impl Config {
    /// The defaults: 100 messages a transaction; limits of 20 refused in a row, 10,000 held, 10,000 stored for each
    /// reason of rejection, and 1,000,000 that wait for missing versions; and one minute.
    ///
    /// ```
    /// use inbox::{Config, Topology};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let topology = Topology::new("event_dispatcher", "event_dispatcher.by_aggregate", "stock", &["order"])?;
    /// let nodes = "amqp://stock@rabbit-1,amqp://stock@rabbit-2".parse()?;
    /// let config = Config { batch: 50, ..Config::new(topology, nodes, "stock") };
    /// # Ok(())
    /// # }
    /// ```
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

/// Consumes for as long as the process lives: connects, declares, subscribes and applies, and starts again when one of
/// these fails.
#[derive(Debug)]
pub struct Consumer<H> {
    config: Config,
    sequencer: Sequencer<H>,
    status: watch::Sender<Status>,
    /// Of the queue and of its dead letters.
    stalls: [StallDetector; 2],
}

impl<H: Handler> Consumer<H> {
    /// A consumer that does nothing before [`run`](Self::run).
    ///
    /// ```
    /// use inbox::{Config, Consumer, Handler, Sequencer};
    ///
    /// fn consumer<H: Handler>(config: Config, sequencer: Sequencer<H>) -> Consumer<H> {
    ///     Consumer::new(config, sequencer)
    /// }
    /// ```
    pub fn new(config: Config, sequencer: Sequencer<H>) -> Self {
        sequencer.streaks().limit(config.max_refused);
        sequencer.limits.set_rejected(config.max_rejected);
        let status = watch::Sender::new(Status::starting());
        Self { config, sequencer, status, stalls: Default::default() }
    }

    /// The consumer's status, now and after each change.
    ///
    /// ```
    /// # async fn example<H: inbox::Handler>(consumer: inbox::Consumer<H>) {
    /// let mut status = consumer.status();
    /// tokio::spawn(async move {
    ///     while status.changed().await.is_ok() {
    ///         println!("{:?}", status.borrow_and_update().waiting());
    ///     }
    /// });
    /// # }
    /// ```
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// Consumes until `stop`. Then it finishes and acknowledges the transaction under way, and returns the other received
    /// messages to the queue.
    ///
    /// ```
    /// use tokio_util::sync::CancellationToken;
    ///
    /// # async fn example<H: inbox::Handler>(consumer: inbox::Consumer<H>) {
    /// let stop = CancellationToken::new();
    /// let running = tokio::spawn(consumer.run(stop.clone()));
    /// // On SIGTERM:
    /// stop.cancel();
    /// let _ = running.await;
    /// # }
    /// ```
    pub async fn run(self, stop: CancellationToken) {
        if self.sequencer.sources.is_all() {
            tracing::warn!(
                consumer = self.sequencer.consumer,
                "every source is followed and every broker user believed: any user that may write to the exchange \
                 can forge events. Name the sources and the users that publish them"
            );
        }
        series::begin(&self.sequencer.consumer);
        let erased = erasure::keep(&self.sequencer.pool, &self.sequencer.consumer, &stop);
        let requested = Box::pin(requests::work_off(&self.sequencer, &stop));
        tokio::join!(
            Box::pin(self.consume(&stop)),
            self.watch(&stop),
            self.watch_stalls(&stop),
            erased,
            requested
        );
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
            if answer(self.config.topology.lacks_queue(&connection)).await? {
                self.ask_applied().await?;
            }
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
        let (main, dead, database, ()) = tokio::join!(
            Box::pin(ending(&session, main.run(&self.sequencer, &session, of_main, settled))),
            Box::pin(ending(&session, dead.run(&self.sequencer, &session, of_dead, settled))),
            ending(&session, self.watch_database(&session)),
            self.sequencer.backlog.ask(&connection, &self.config.topology, &session),
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

    /// The queue will be new: says so where events were applied before.
    async fn ask_applied(&self) -> Result<(), Trouble> {
        let Sequencer { consumer, pool, .. } = &self.sequencer;
        let question = sqlx::query_scalar(
            "SELECT EXISTS (SELECT FROM inbox.aggregate WHERE consumer = $1 AND version > 0)",
        );
        let applied: bool = match tokio::time::timeout(ANSWER, question.bind(consumer).fetch_one(pool)).await
        {
            Ok(applied) => applied.map_err(|error| Trouble::Database(describe(&error)))?,
            Err(_) => {
                return Err(Trouble::Database(format!("the database did not answer within {ANSWER:?}")));
            }
        };
        if applied {
            let lost = format!(
                "the queue {} did not exist, although events had been applied: the broker lost its data, or the queue \
                 was deleted. What lay in it is lost, and so is what was published while it did not exist. Have each \
                 source replay its events, from before that time on, to this queue. What was applied is ignored. This \
                 message ends when the program is restarted",
                self.config.topology.queue()
            );
            tracing::warn!(consumer, reason = lost, "the queue did not exist any more");
            self.status.send_modify(|status| status.queue = Some(lost));
        }
        Ok(())
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

    /// Reads the alarms, also while nothing is consumed.
    async fn watch(&self, stop: &CancellationToken) {
        let queue = self.config.topology.queue().as_str();
        let Sequencer { consumer, pool, .. } = &self.sequencer;
        let caps = StorageCaps { rejected: self.config.max_rejected, gaps: self.config.max_gaps };
        let mut alarms = Alarms::new(consumer, pool, queue, self.config.hole_after, caps);
        while stop.run_until_cancelled(tokio::time::sleep(ALARMS)).await.is_some() {
            self.sequencer.backlog.show(consumer);
            match alarms.look().await {
                Ok(Findings { holes, forks, forged, incarnations, limits, full }) => {
                    self.sequencer.limits.set_full(full);
                    self.set(|status| &mut status.sources, forged.map_or(Ok(()), Err));
                    self.status.send_if_modified(|status| {
                        let shown = (holes, forks, incarnations, limits);
                        let Status { holes, forks, incarnations, limits, .. } = status;
                        let modified = (&*holes, &*forks, &*incarnations, &*limits)
                            != (&shown.0, &shown.1, &shown.2, &shown.3);
                        (*holes, *forks, *incarnations, *limits) = shown;
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
            let stalled = self.stalls.iter().find_map(StallDetector::reason);
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
