use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use lapin::{Connection, ConnectionProperties, tcp::OwnedTLSConfig, uri::AMQPUri};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    Handler, Part, Sequencer, Status, Topology,
    backoff::Backoff,
    handler::describe,
    subscription::{Subscription, Trouble, answer},
};

/// How long connecting to one node may take, the handshake included.
const CONNECT: Duration = Duration::from_secs(10);
/// Seconds between heartbeats, unless the URL says otherwise: a dead peer is noticed within two.
const HEARTBEAT: u16 = 10;
/// How often an idle consumer asks whether the database is still there.
const DATABASE_CHECK: Duration = Duration::from_secs(5);
/// A session that lived this long was a success, even if nothing came.
const HEALTHY: Duration = Duration::from_secs(30);

/// A node of the broker.
#[derive(Clone)]
pub struct Node {
    uri: AMQPUri,
    tls: OwnedTLSConfig,
}

impl Node {
    /// Where it is, and with `amqps` whom to trust.
    pub fn new(mut uri: AMQPUri, tls: OwnedTLSConfig) -> Self {
        uri.query.heartbeat.get_or_insert(HEARTBEAT);
        uri.query.connection_timeout.get_or_insert(u64::try_from(CONNECT.as_millis()).unwrap_or(u64::MAX));
        Self { uri, tls }
    }
}

/// Where it is, without the password.
impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.uri.authority.host, self.uri.authority.port, self.uri.vhost)
    }
}

/// How to consume.
#[derive(Clone, Debug)]
pub struct Config {
    /// Exchanges and queues.
    pub topology: Topology,
    /// The broker's nodes, tried in turn.
    pub nodes: Vec<Node>,
    /// What the broker's operators see the connection as.
    pub connection_name: String,
    /// How many messages one transaction takes at most. Twice as many are in memory, so their size
    /// bounds it; RabbitMQ cannot limit what it sends ahead by bytes.
    pub batch: u16,
}

/// Consumes for as long as the process lives: connects, declares, subscribes, applies, and begins again
/// whenever one of these ends.
#[derive(Debug)]
pub struct Consumer<H> {
    config: Config,
    sequencer: Sequencer<H>,
    status: watch::Sender<Status>,
}

impl<H: Handler> Consumer<H> {
    /// Nothing happens before [`run`](Self::run).
    pub fn new(config: Config, sequencer: Sequencer<H>) -> Self {
        Self { config, sequencer, status: watch::Sender::new(Status::starting()) }
    }

    /// What it waits for, now and later.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// Consumes until `stop`. Then the transaction under way is finished and acknowledged, and what
    /// else was received is given back.
    pub async fn run(self, stop: CancellationToken) {
        let mut backoff = Backoff::new();
        let mut node = 0;
        while !stop.is_cancelled() {
            let started = Instant::now();
            let progress = AtomicBool::new(false);
            let Err(trouble) = self.session(&mut node, &stop, &progress).await else { continue };
            if progress.into_inner() || started.elapsed() >= HEALTHY {
                backoff = Backoff::new();
            }
            match &trouble {
                Trouble::Broker(reason) => {
                    // The next node may be better off.
                    node += 1;
                    self.set(|status| &mut status.broker, Err(reason.clone()));
                    self.set(|status| &mut status.consuming, Err("waiting for the broker".to_owned()));
                }
                Trouble::Database(reason) => {
                    self.set(|status| &mut status.database, Err(reason.clone()));
                    self.set(|status| &mut status.consuming, Err("waiting for the database".to_owned()));
                }
            }
            let pause = backoff.pause();
            tracing::warn!(?trouble, ?pause, "consuming was interrupted");
            stop.run_until_cancelled(tokio::time::sleep(pause)).await;
        }
    }

    /// One connection's life. Nothing is consumed before the database answers: a message that is
    /// delivered only to be given back uses up one of its deliveries.
    async fn session(
        &self,
        node: &mut usize,
        stop: &CancellationToken,
        progress: &AtomicBool,
    ) -> Result<(), Trouble> {
        let prepare = async {
            self.ask_database().await?;
            let connection = self.connect(node).await?;
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
        let (main, dead, database) = tokio::join!(
            Box::pin(ending(&session, main.run(&self.sequencer, &session, settled))),
            Box::pin(ending(&session, dead.run(&self.sequencer, &session, settled))),
            ending(&session, self.watch_database(&session)),
        );
        if let Err(trouble) = answer(connection.close(200, "bye".into())).await {
            tracing::debug!(?trouble, "the connection was not closed in order");
        }
        database.and(main).and(dead)
    }

    /// Tries the nodes in turn, beginning with `node`, and leaves there the one that answered.
    async fn connect(&self, node: &mut usize) -> Result<Connection, Trouble> {
        let mut trouble = Trouble::Broker("no node of the broker is configured".to_owned());
        for attempt in 0..self.config.nodes.len() {
            let n = (*node + attempt) % self.config.nodes.len();
            let Node { uri, tls } = self.config.nodes[n].clone();
            // lapin's own recovery stays off: it is this loop that begins anew.
            let properties = ConnectionProperties::default()
                .with_connection_name(self.config.connection_name.as_str().into());
            let runtime = lapin::runtime::default_runtime()?;
            let connect = Connection::connect_uri_with_config(uri, properties, tls, runtime);
            match tokio::time::timeout(CONNECT, connect).await {
                Ok(Ok(connection)) => {
                    *node = n;
                    return Ok(connection);
                }
                Ok(Err(error)) => trouble = error.into(),
                Err(_) => trouble = Trouble::Broker(format!("no connection within {CONNECT:?}")),
            }
            tracing::debug!(node = ?self.config.nodes[n], ?trouble, "a node cannot be reached");
        }
        Err(trouble)
    }

    async fn ask_database(&self) -> Result<(), Trouble> {
        let question = sqlx::query("SELECT 1").execute(&self.sequencer.pool);
        let answer = match tokio::time::timeout(CONNECT, question).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(describe(&error)),
            Err(_) => Err(format!("the database did not answer within {CONNECT:?}")),
        };
        self.set(|status| &mut status.database, answer.clone());
        answer.map_err(Trouble::Database)
    }

    /// An idle consumer notices, too, that it could do nothing if a message came.
    async fn watch_database(&self, stop: &CancellationToken) -> Result<(), Trouble> {
        while stop.run_until_cancelled(tokio::time::sleep(DATABASE_CHECK)).await.is_some() {
            self.ask_database().await?;
        }
        Ok(())
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
