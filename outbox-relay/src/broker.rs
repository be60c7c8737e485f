//! The connection to RabbitMQ: one connection with one channel that publishes, in confirm mode.

use std::time::Duration;

use broker::Wire;
use futures_util::StreamExt;
use lapin::{
    Channel, Connection, ConnectionProperties, ErrorKind, Event as ConnectionEvent, ExchangeKind,
    options::{ConfirmSelectOptions, ExchangeDeclareOptions},
    protocol::{AMQPErrorKind, AMQPSoftError},
    types::{FieldTable, ShortString},
};
use service::config::broker::Node;
use tokio::sync::watch;

/// Connecting and declaring take no longer, or the node counts as away.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The broker's reason comes right after the failures that it causes.
const REASON_TIMEOUT: Duration = Duration::from_millis(100);
/// Closing is a courtesy.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// The broker and the relay tell each other that they are there, so that a half-open connection ends.
const HEARTBEAT_SECONDS: u16 = 10;

/// Why nothing can be published right now.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BrokerError {
    /// No node answered, or none let the relay in.
    #[error("no connection to RabbitMQ: {0}")]
    Away(String),
    /// The exchange is not there, and declaring it is not the relay's business or right.
    #[error(
        "the exchange {0:?} does not exist; declare it (topic, durable), or start with --declare-exchange"
    )]
    NoExchange(String),
    /// The exchange may not be declared like this.
    #[error("the exchange {exchange:?} cannot be declared: {reason}")]
    NotDeclared {
        /// The exchange.
        exchange: String,
        /// The broker's words.
        reason: String,
    },
    /// The broker closed the channel or the connection, or did not answer in time. What was on its way
    /// is unknown.
    #[error("publishing failed: {0}")]
    Publish(String),
    /// The broker closed the channel over what was published: over which of the window's events, only
    /// another try can tell.
    #[error("the broker refused: {0}")]
    Refused(String),
    /// The broker keeps refusing events on this connection.
    #[error("the broker keeps refusing events on this connection; trying another")]
    Refusing,
    /// The leader has not heard from its database for as long as its lease lasts.
    #[error("publishing was cut off: leadership is not certain")]
    NoLease,
}

/// The nodes of a cluster, and what to find there.
#[derive(Clone, Debug)]
pub struct Nodes {
    /// Where to connect; the first that answers is used.
    pub nodes: Vec<Node>,
    /// The exchange to publish to.
    pub exchange: ShortString,
    /// Declare the exchange if it does not exist.
    pub declare: bool,
    /// The connection's name in the management interface.
    pub name: String,
}

/// Whether the broker takes anything: why not at the moment (memory or disk alarm), or why the connection
/// has ended.
pub type Condition = Result<Option<String>, BrokerError>;

/// An open connection with its publishing channel.
#[derive(Debug)]
pub struct Link {
    connection: Connection,
    /// In confirm mode.
    pub channel: Channel,
    condition: watch::Receiver<Condition>,
    /// Ends the connection with the link.
    _wire: Wire,
}

impl Nodes {
    /// Connects to the first node that answers, beginning with a different one at each `attempt`.
    pub async fn connect(&self, attempt: usize) -> Result<Link, BrokerError> {
        let mut last = BrokerError::Away("no node is configured".to_owned());
        for n in 0..self.nodes.len() {
            let node = self.nodes[(attempt + n) % self.nodes.len()].clone();
            let address = format!("{}:{}", node.uri.authority.host, node.uri.authority.port);
            match tokio::time::timeout(TIMEOUT, self.open(node)).await {
                Ok(Ok(link)) => return Ok(link),
                Ok(Err(BrokerError::Away(reason))) => {
                    last = BrokerError::Away(format!("{address}: {reason}"));
                }
                // The node is there; another one of the same cluster would say the same.
                Ok(Err(other)) => return Err(other),
                Err(_) => last = BrokerError::Away(format!("{address} did not answer within {TIMEOUT:?}")),
            }
        }
        Err(last)
    }

    async fn open(&self, node: Node) -> Result<Link, BrokerError> {
        let Node { mut uri, tls } = node;
        let away = |e: lapin::Error| BrokerError::Away(e.to_string());
        uri.query.heartbeat.get_or_insert(HEARTBEAT_SECONDS);
        let properties = ConnectionProperties::default().with_connection_name(self.name.as_str().into());
        let (connection, wire) = broker::connect(uri, tls, properties).await.map_err(away)?;
        let condition = follow(&connection);

        let options = ExchangeDeclareOptions { passive: !self.declare, durable: true, ..Default::default() };
        let channel = connection.create_channel().await.map_err(away)?;
        let declared = channel.exchange_declare(
            self.exchange.clone(),
            ExchangeKind::Topic,
            options,
            FieldTable::default(),
        );
        if let Err(error) = declared.await {
            return Err(match error.kind() {
                ErrorKind::ProtocolError(amqp) => match amqp.kind() {
                    AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) => {
                        BrokerError::NoExchange(self.exchange.to_string())
                    }
                    _ => BrokerError::NotDeclared {
                        exchange: self.exchange.to_string(),
                        reason: amqp.get_message().to_string(),
                    },
                },
                _ => away(error),
            });
        }
        // Without this a publish would count as done once it is written to the socket.
        channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(away)?;
        Ok(Link { connection, channel, condition, _wire: wire })
    }
}

impl Link {
    /// How it is now.
    pub fn condition(&self) -> Condition {
        self.condition.borrow().clone()
    }

    /// Follows [`condition`](Self::condition).
    pub fn changes(&self) -> watch::Receiver<Condition> {
        self.condition.clone()
    }

    /// What the broker said when it ended the connection, if it did; or else `error`, which is what was
    /// noticed of that.
    pub async fn reason(&self, error: BrokerError) -> BrokerError {
        let mut condition = self.condition.clone();
        let _ = tokio::time::timeout(REASON_TIMEOUT, condition.wait_for(Result::is_err)).await;
        self.condition().err().unwrap_or(error)
    }

    /// Closes in good order, so that no confirm is left dangling on a live connection.
    pub async fn close(self) {
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, self.connection.close(200, ShortString::default())).await;
    }
}

/// Follows what the broker says of the connection. While it blocks, publishing hangs without a word, so the
/// reason has to be known from elsewhere.
fn follow(connection: &Connection) -> watch::Receiver<Condition> {
    let (said, condition) = watch::channel(Ok(None));
    let mut events = connection.events_listener();
    tokio::spawn(async move {
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = said.closed() => return,
            };
            let now = match event {
                Some(ConnectionEvent::ConnectionBlocked(reason)) => Ok(Some(reason)),
                Some(ConnectionEvent::ConnectionUnblocked) => Ok(None),
                Some(ConnectionEvent::Error(error)) => Err(BrokerError::Publish(error.to_string())),
                Some(_) => continue,
                None => Err(BrokerError::Publish("the connection ended".to_owned())),
            };
            let ended = now.is_err();
            // Nobody listens any more when the link is gone.
            if said.send(now).is_err() || ended {
                return;
            }
        }
    });
    condition
}
