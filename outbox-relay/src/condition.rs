//! What the broker says of a connection, and why nothing can be published over it.

use futures_util::StreamExt;
use lapin::{Connection, ErrorKind, Event as ConnectionEvent, protocol::AMQPErrorKind};
use tokio::sync::watch;

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

/// Whether the broker takes anything: why not at the moment (memory or disk alarm), or why the connection
/// has ended.
pub type Condition = Result<Option<String>, BrokerError>;

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

/// Whether the broker closed a channel over it, and not the connection.
fn is_soft(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(amqp) if matches!(amqp.kind(), AMQPErrorKind::Soft(_)))
}
