//! The connection to RabbitMQ: one connection with one channel that publishes, in confirm mode.

use std::time::Duration;

use amqp::{Nodes, Reconnect};
use futures_util::StreamExt;
use lapin::{
    Channel, Connection, ErrorKind, Event as ConnectionEvent, ExchangeKind,
    options::{ConfirmSelectOptions, ExchangeDeclareOptions},
    protocol::{AMQPErrorKind, AMQPSoftError},
    types::{FieldTable, ShortString},
};
use tokio::sync::watch;

use crate::identity;

/// Declaring and opening a channel take no longer, or the node counts as away.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The broker's reason comes right after the failures that it causes.
const REASON_TIMEOUT: Duration = Duration::from_millis(100);

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
    /// The broker knows the connection by another name, so it would refuse every event.
    #[error(
        "RabbitMQ knows this connection by another name than {0:?}, the user in AMQP_URL, so it would refuse every \
         event. Write the name of the relay's user into AMQP_URL: with auth_mechanism=external it is the \
         certificate's, with OAuth 2 the token's"
    )]
    WrongName(String),
    /// The broker takes nothing from anybody, for this reason.
    #[error("the broker blocks publishers: {0}")]
    Blocked(String),
    /// RabbitMQ says no more to a user without rights, whether or not the exchange is there.
    #[error(
        "the exchange {exchange:?} does not exist, or this user has no right to it: {reason}; declare it (topic, \
         durable), and give the user configure, write or read on it"
    )]
    Forbidden {
        /// The exchange.
        exchange: String,
        /// The broker's words.
        reason: String,
    },
    /// The exchange has another kind, by which nothing is routed as subscribers expect it.
    #[error(
        "the exchange {exchange:?} exists, and is not the durable topic exchange that the relay publishes to: \
         {reason}; delete it and declare it anew (topic, durable), or name another one with --exchange"
    )]
    OtherKind {
        /// The exchange.
        exchange: String,
        /// The broker's words, which name both kinds.
        reason: String,
    },
    /// The broker closed the channel or the connection, or did not answer in time. What was on its way
    /// is unknown.
    #[error("publishing failed: {0}")]
    Publish(String),
    /// The broker closed the channel over what was published: over which of the window's events, only
    /// another try can tell.
    #[error("the broker refused: {why}")]
    Refused {
        /// The broker's words.
        why: String,
        /// Code 541: the channel's process in the broker failed over an event, or somebody killed it.
        internal: bool,
    },
    /// The broker did not answer for these, while the channel stood still.
    #[error("the broker did not answer for {0} events")]
    Silent(usize),
    /// The broker keeps refusing events on this connection.
    #[error("the broker keeps refusing events on this connection; trying another")]
    Refusing,
    /// The leader has not heard from its database for as long as its lease lasts.
    #[error("publishing was cut off: leadership is not certain")]
    NoLease,
}

/// Where to publish, and what to find there.
#[derive(Clone, Debug)]
pub struct Broker {
    /// Where to connect.
    pub nodes: Nodes,
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
    /// In confirm mode.
    pub channel: Channel,
    /// As whom it publishes: RabbitMQ verifies a message's `user_id`.
    pub user: ShortString,
    condition: watch::Receiver<Condition>,
    connection: amqp::Connection,
}

impl Broker {
    /// Connects to the first node that has everything, beginning with the one that `reconnect` remembers.
    pub async fn connect(&self, reconnect: &mut Reconnect) -> Result<Link, BrokerError> {
        let prepare = async |connection| match tokio::time::timeout(TIMEOUT, self.prepare(connection)).await {
            Ok(Err(BrokerError::Away(reason))) => Err(reason),
            // When it is there, another node of the same cluster would say the same.
            Ok(prepared) => Ok(prepared),
            Err(_) => Err(format!("it did not answer within {TIMEOUT:?}")),
        };
        let connected = self.nodes.connect_with(&self.name, reconnect, prepare).await;
        let link = connected.map_err(|unreachable| BrokerError::Away(unreachable.to_string()))??;
        if !self.declare {
            self.check_kind(&link.connection).await?;
        }
        Ok(link)
    }

    async fn prepare(&self, connection: amqp::Connection) -> Result<Link, BrokerError> {
        let away = |e: lapin::Error| BrokerError::Away(amqp::describe(&e));
        let user = ShortString::try_new(connection.user())
            .map_err(|_| BrokerError::Away("the user's name is longer than 255 bytes".to_owned()))?;
        let said = Said::of(&connection);
        let condition = said.condition.clone();

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
                    AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) if !self.declare => {
                        BrokerError::Forbidden {
                            exchange: self.exchange.to_string(),
                            reason: amqp.get_message().to_string(),
                        }
                    }
                    AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED) => BrokerError::OtherKind {
                        exchange: self.exchange.to_string(),
                        reason: amqp.get_message().to_string(),
                    },
                    _ => BrokerError::NotDeclared {
                        exchange: self.exchange.to_string(),
                        reason: amqp::without_users(amqp.get_message().as_str()),
                    },
                },
                _ => away(error),
            });
        }
        identity::prove(&connection, &self.exchange, &user, said).await?;
        confirming(&channel).await.map_err(away)?;
        Ok(Link { channel, user, condition, connection })
    }
}

/// Without this a publish would count as done once it is written to the socket.
async fn confirming(channel: &Channel) -> lapin::Result<()> {
    channel.confirm_select(ConfirmSelectOptions::default()).await
}

impl Broker {
    /// A passive declaration says nothing of the exchange's kind; only what contradicts an active one does. An
    /// exchange that is there is not changed by it.
    async fn check_kind(&self, connection: &Connection) -> Result<(), BrokerError> {
        let away = |e: lapin::Error| BrokerError::Away(e.to_string());
        let channel = connection.create_channel().await.map_err(away)?;
        let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
        let (exchange, none) = (self.exchange.clone(), FieldTable::default());
        let declare = channel.exchange_declare(exchange, ExchangeKind::Topic, options, none);
        match tokio::time::timeout(TIMEOUT, declare).await {
            Ok(Ok(())) => {
                let _ = channel.close(200, ShortString::default()).await;
                Ok(())
            }
            Ok(Err(error)) => match error.kind() {
                // Other arguments, such as an alternate exchange, are the operator's business, and have the same code.
                ErrorKind::ProtocolError(amqp)
                    if amqp.kind() == &AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED)
                        && amqp.get_message().as_str().contains("arg 'type'") =>
                {
                    let (exchange, reason) = (self.exchange.to_string(), amqp.get_message().to_string());
                    Err(BrokerError::OtherKind { exchange, reason })
                }
                // Without the right to declare there is no knowing.
                _ => Ok(()),
            },
            Err(_) => Ok(()),
        }
    }
}

impl Link {
    /// A new channel on the same connection, after the broker closed the one before over a message.
    pub async fn reopen(&mut self) -> Result<(), BrokerError> {
        self.channel = self.another_channel().await?;
        Ok(())
    }

    /// One more channel on the same connection.
    pub async fn another_channel(&self) -> Result<Channel, BrokerError> {
        let open = async {
            let channel = self.connection.create_channel().await?;
            confirming(&channel).await?;
            Ok(channel)
        };
        let opened: Result<lapin::Result<Channel>, _> = tokio::time::timeout(TIMEOUT, open).await;
        let failed = |why: String| BrokerError::Publish(format!("no new channel: {why}"));
        opened
            .map_err(|_| failed(format!("no response within {TIMEOUT:?}")))?
            .map_err(|error| failed(error.to_string()))
    }

    /// Whether the connection is there, as far as is known.
    pub fn is_open(&self) -> bool {
        self.connection.status().connected()
    }

    /// The largest frame that both sides agreed on.
    pub fn frame_max(&self) -> usize {
        usize::try_from(self.connection.configuration().frame_max()).unwrap_or(usize::MAX)
    }

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
        self.connection.close().await;
    }
}

/// Whether the broker closed a channel over it, and not the connection.
fn is_soft(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(amqp) if matches!(amqp.kind(), AMQPErrorKind::Soft(_)))
}

/// What the broker says of a connection.
#[derive(Clone, Debug)]
pub struct Said {
    /// Of the connection as a whole.
    pub condition: watch::Receiver<Condition>,
    /// Why it closed the last channel that it closed, if it did.
    pub refused: watch::Receiver<Option<lapin::Error>>,
}

impl Said {
    /// Follows what the broker says of the connection. While it blocks, publishing hangs without a word, so the
    /// reason has to be known from elsewhere. Each event reaches one listener alone, so this is the only one.
    pub fn of(connection: &Connection) -> Self {
        let (say, condition) = watch::channel(Ok(None));
        let (refuse, refused) = watch::channel(None);
        let mut events = connection.events_listener();
        tokio::spawn(async move {
            loop {
                let event = tokio::select! {
                    event = events.next() => event,
                    () = say.closed() => return,
                };
                let now = match event {
                    Some(ConnectionEvent::ConnectionBlocked(reason)) => Ok(Some(reason)),
                    Some(ConnectionEvent::ConnectionUnblocked) => Ok(None),
                    // One channel's alone.
                    Some(ConnectionEvent::Error(error)) if is_soft(&error) => {
                        refuse.send_replace(Some(error));
                        continue;
                    }
                    Some(ConnectionEvent::Error(error)) => Err(BrokerError::Publish(amqp::describe(&error))),
                    Some(_) => continue,
                    None => Err(BrokerError::Publish("the connection ended".to_owned())),
                };
                let ended = now.is_err();
                // Nobody listens any more when the link is gone.
                if say.send(now).is_err() || ended {
                    return;
                }
            }
        });
        Self { condition, refused }
    }
}
