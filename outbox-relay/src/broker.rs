//! The connection to RabbitMQ: one connection with one channel that publishes, in confirm mode.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use amqp::{Nodes, Reconnect};
use lapin::{
    Channel, Connection, ErrorKind, ExchangeKind,
    options::{ConfirmSelectOptions, ExchangeBindOptions, ExchangeDeclareOptions},
    protocol::{AMQPErrorKind, AMQPSoftError},
    types::{FieldTable, ShortString},
};
use tokio::sync::watch;

use crate::{
    condition::{BrokerError, Condition, Said},
    identity,
};

/// Declaring and opening a channel take no longer, or the node counts as away.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The broker's reason comes right after the failures that it causes.
const REASON_TIMEOUT: Duration = Duration::from_millis(100);

/// What the name of the exchange by aggregate adds to that of the main exchange.
const BY_AGGREGATE: &str = ".by_aggregate";

/// Where to publish, and what to find there.
#[derive(Clone, Debug)]
pub struct Broker {
    /// Where to connect.
    pub nodes: Nodes,
    /// The exchange to publish to.
    pub exchange: ShortString,
    /// Declare the exchange if it does not exist, and the one by aggregate that it feeds.
    pub declare: bool,
    /// The connection's name in the management interface.
    pub name: String,
    /// Set when the exchange does not exist, also when it is declared then.
    pub was_missing: Arc<AtomicBool>,
}

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

        if self.declare {
            self.look_for_exchange(&connection).await.map_err(away)?;
        }
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
                        self.was_missing.store(true, Ordering::Relaxed);
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
        if self.declare {
            self.declare_by_aggregate(&connection).await.map_err(away)?;
        }
        identity::prove(&connection, &self.exchange, &user, said).await?;
        confirming(&channel).await.map_err(away)?;
        Ok(Link { channel, user, condition, connection })
    }
}

impl Broker {
    /// Declares the exchange of subscribers that follow versions, so that it is there before the first of them. Events are
    /// published without it, so a refusal is logged and no more. It closes the channel, so it is one of its own.
    async fn declare_by_aggregate(&self, connection: &Connection) -> lapin::Result<()> {
        let exchange = format!("{}{BY_AGGREGATE}", self.exchange);
        let Ok(name) = ShortString::try_new(exchange.as_str()) else {
            tracing::warn!(
                exchange,
                "the exchange by aggregate is not declared: its name is longer than 255 bytes"
            );
            return Ok(());
        };
        let channel = connection.create_channel().await?;
        let declare = async {
            let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
            channel
                .exchange_declare(name.clone(), ExchangeKind::Headers, options, FieldTable::default())
                .await?;
            let (options, none) = (ExchangeBindOptions::default(), FieldTable::default());
            channel.exchange_bind(name.clone(), self.exchange.clone(), "#".into(), options, none).await?;
            channel.close(200, ShortString::default()).await
        };
        let Err(error) = declare.await else { return Ok(()) };
        let ErrorKind::ProtocolError(amqp) = error.kind() else { return Err(error) };
        let why = amqp::without_users(amqp.get_message().as_str());
        tracing::warn!(
            exchange,
            why,
            "the exchange by aggregate is not declared; give this user the rights of a relay that declares, or declare it \
             (headers, durable) and bind it to the relay's exchange with the routing key #"
        );
        Ok(())
    }

    /// Notes whether the exchange is missing. A declaration alone does not tell: it makes it, or finds it. The refusal
    /// closes the channel, so it is one of its own.
    async fn look_for_exchange(&self, connection: &Connection) -> lapin::Result<()> {
        let channel = connection.create_channel().await?;
        let options = ExchangeDeclareOptions { passive: true, ..Default::default() };
        let (exchange, none) = (self.exchange.clone(), FieldTable::default());
        match channel.exchange_declare(exchange, ExchangeKind::Topic, options, none).await {
            Ok(()) => channel.close(200, ShortString::default()).await,
            Err(error) => match error.kind() {
                ErrorKind::ProtocolError(amqp) => {
                    if amqp.kind() == &AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) {
                        self.was_missing.store(true, Ordering::Relaxed);
                    }
                    // Whatever else it is, the declaration says so.
                    Ok(())
                }
                _ => Err(error),
            },
        }
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
