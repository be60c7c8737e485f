//! Without the management API, AMQP says of a queue whether it exists, how many consume from it, and how many messages
//! it has: by a passive declaration, which changes nothing.

use std::time::Duration;

use amqp::{Connection, QueueState, Reconnect};
use lapin::{
    ErrorKind,
    options::QueueDeclareOptions,
    protocol::{AMQPErrorKind, AMQPSoftError},
    types::{FieldTable, ShortString},
};

use super::{Fault, Subscribers, look::State};

/// A queue that has lost its majority does not answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A connection for it, which stays between two looks.
#[derive(Debug, Default)]
pub struct Passive {
    name: String,
    reconnect: Reconnect,
    connection: Option<Connection>,
}

impl Passive {
    /// The broker's operators see the connection under this name.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// Closes the connection, if there is one.
    pub async fn close(&mut self) {
        if let Some(connection) = self.connection.take() {
            connection.close().await;
        }
    }

    /// What is known of each expected queue. An error says why the broker is away.
    pub(super) async fn states(&mut self, subscribers: &Subscribers) -> Result<Vec<State>, String> {
        if self.connection.as_ref().is_none_or(|connection| !connection.status().connected()) {
            self.connection = None;
            let connected = subscribers.nodes.connect(&self.name, &mut self.reconnect).await;
            self.connection = Some(connected.map_err(|unreachable| unreachable.to_string())?);
        }
        let Some(connection) = &self.connection else { return Err("no connection".to_owned()) };
        let mut states = Vec::new();
        for expectation in &subscribers.expectations {
            match tokio::time::timeout(TIMEOUT, state(connection, &expectation.queue)).await {
                Ok(Ok(state)) => states.push(state),
                Ok(Err(error)) => {
                    self.connection = None;
                    return Err(amqp::describe(&error));
                }
                Err(_) => states.push(State::Unknown(Fault {
                    finding: format!("the queue {} did not respond within {TIMEOUT:?}", expectation.queue),
                    advice: "see whether the majority of its nodes runs: rabbitmq-queues quorum_status QUEUE"
                        .to_owned(),
                })),
            }
        }
        Ok(states)
    }
}

/// A refusal closes the channel, so it is one of its own.
async fn state(connection: &Connection, queue: &str) -> lapin::Result<State> {
    let Ok(name) = ShortString::try_new(queue) else {
        // The setting has none.
        return Ok(State::Missing);
    };
    let channel = connection.create_channel().await?;
    let options = QueueDeclareOptions { passive: true, ..Default::default() };
    match channel.queue_declare(name, options, FieldTable::default()).await {
        Ok(declared) => {
            channel.close(200, ShortString::default()).await?;
            Ok(State::Exists(QueueState {
                consumers: Some(declared.consumer_count().into()),
                messages: Some(declared.message_count().into()),
            }))
        }
        Err(error) => match error.kind() {
            ErrorKind::ProtocolError(amqp) => match amqp.kind() {
                AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) => Ok(State::Missing),
                // RabbitMQ 4 says so of every queue to a user without a right to it, whether it exists or not.
                AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => Ok(State::Unknown(Fault {
                    finding: format!(
                        "the queue {queue} does not exist, or RabbitMQ does not let the relay's user see it"
                    ),
                    advice: "set MANAGEMENT_URL (or MANAGEMENT_URL_FILE), which also shows the bindings"
                        .to_owned(),
                })),
                AMQPErrorKind::Soft(AMQPSoftError::RESOURCELOCKED) => Ok(State::Exclusive),
                _ => Err(error),
            },
            _ => Err(error),
        },
    }
}
