//! A subscriber's queues without its consumer: declares them before it starts, deletes them after its end.

use lapin::{Channel, ConnectionProperties};

use crate::{
    Config,
    subscription::{Trouble, answer},
};

/// Declares the exchanges and queues of a consumer with this configuration. From then on its queue receives events.
///
/// ```
/// # async fn example(config: inbox::Config) -> Result<(), String> {
/// // Before the source publishes what the queue must receive:
/// inbox::declare(&config).await?;
/// # Ok(())
/// # }
/// ```
pub async fn declare(config: &Config) -> Result<(), String> {
    at_some_node(config, async |channel| answer(config.topology.declare(channel)).await).await
}

/// Deletes a subscriber's queue, its dead letters' queue and exchange, with all messages in them. A missing queue is no
/// error. End the consumer first: it would declare them again.
///
/// ```
/// # async fn example(config: inbox::Config) -> Result<(), String> {
/// // After the end of the consumer:
/// inbox::remove(&config).await?;
/// # Ok(())
/// # }
/// ```
pub async fn remove(config: &Config) -> Result<(), String> {
    at_some_node(config, async |channel| answer(config.topology.delete(channel)).await).await
}

async fn at_some_node(
    config: &Config,
    work: impl AsyncFn(&Channel) -> Result<(), Trouble>,
) -> Result<(), String> {
    let mut reason = "no node of the broker is configured".to_owned();
    for node in &config.nodes {
        let done = async {
            let properties =
                ConnectionProperties::default().with_connection_name(config.connection_name.as_str().into());
            let (uri, tls) = node.clone().into_parts();
            let (connection, _wire) = answer(amqp::connect(uri, tls, properties)).await?;
            let channel = answer(connection.create_channel()).await?;
            work(&channel).await?;
            answer(channel.close(200, "bye".into())).await?;
            answer(connection.close(200, "bye".into())).await
        };
        match done.await {
            Ok(()) => return Ok(()),
            Err(Trouble::Broker(trouble) | Trouble::Database(trouble) | Trouble::Handler(trouble)) => {
                reason = trouble;
            }
        }
    }
    Err(reason)
}
