//! As whom the broker knows the relay. Each message says it in its property `user_id`, which RabbitMQ verifies, so
//! that subscribers can tell who published an event. A wrong name would have every event refused: it is tried
//! before any is published.

use std::{pin::pin, time::Duration};

use lapin::{
    BasicProperties, Connection, ErrorKind,
    options::BasicPublishOptions,
    protocol::{AMQPErrorKind, AMQPSoftError},
    types::ShortString,
};
use tokio::sync::watch;

use crate::condition::{BrokerError, Condition, Said};

/// The broker's reason comes right after the failures that it causes.
const REASON_TIMEOUT: Duration = Duration::from_secs(1);
/// The routing key of the message that is tried. No subscriber ever sees it.
const KEY: &str = "outbox-relay.user_id";

/// Tries whether the broker knows this connection as `user`: publishes a message in an AMQP transaction and rolls
/// it back. The broker checks the name when the message arrives, and would route it at the commit alone. So this
/// needs no other right than publishing does, and no queue gets anything.
///
/// Where the broker lets this user write only some routing keys, it refuses this one before it looks at the name:
/// then the name stays unproven, and is believed.
pub async fn prove(
    connection: &Connection,
    exchange: &ShortString,
    user: &ShortString,
    mut said: Said,
) -> Result<(), BrokerError> {
    said.refused.mark_unchanged();
    let away = |error: lapin::Error| BrokerError::Away(error.to_string());
    let channel = connection.create_channel().await.map_err(away)?;
    let attempt = async {
        channel.tx_select().await?;
        let properties = BasicProperties::default().with_user_id(user.clone());
        let options = BasicPublishOptions::default();
        channel.basic_publish(exchange.clone(), KEY.into(), options, &[], properties).await?;
        channel.tx_rollback().await
    };
    let tried = tokio::select! {
        biased;
        tried = attempt => tried,
        // Nothing is answered then.
        reason = blocked(said.condition) => return Err(BrokerError::Blocked(reason)),
    };
    match tried {
        Ok(()) => channel.close(200, ShortString::default()).await.map_err(away),
        Err(error) => {
            let error = reason(error, said.refused).await;
            match error.kind() {
                ErrorKind::ProtocolError(amqp) => match amqp.kind() {
                    AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED) => {
                        Err(BrokerError::WrongName(user.to_string()))
                    }
                    AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => {
                        tracing::debug!(
                            user = user.as_str(),
                            "the broker lets nobody prove this user's name here"
                        );
                        Ok(())
                    }
                    _ => Err(away(error)),
                },
                _ => Err(away(error)),
            }
        }
    }
}

/// The broker's own words. When it closes the channel just before the next request, that request only tells that the
/// channel is closed, and the reason comes beside it.
async fn reason(error: lapin::Error, mut refused: watch::Receiver<Option<lapin::Error>>) -> lapin::Error {
    if matches!(error.kind(), ErrorKind::ProtocolError(_)) {
        return error;
    }
    match tokio::time::timeout(REASON_TIMEOUT, refused.changed()).await {
        Ok(Ok(())) => refused.borrow().clone().unwrap_or(error),
        _ => error,
    }
}

/// Ends when the broker blocks publishers, with its reason.
async fn blocked(mut condition: watch::Receiver<Condition>) -> String {
    let mut blocks = pin!(condition.wait_for(|condition| matches!(condition, Ok(Some(_)))));
    match blocks.as_mut().await.map(|condition| condition.clone()) {
        Ok(Ok(Some(reason))) => reason,
        // The connection has ended, which the attempt notices.
        _ => std::future::pending().await,
    }
}
