//! A subscriber's queues without its consumer: declares them before it starts, deletes them after its end.

use amqp::{Connection, Reconnect};
use lapin::Channel;

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
    let work = &work;
    let prepare = async move |connection: Connection| {
        let done = async {
            let channel = answer(connection.create_channel()).await?;
            work(&channel).await?;
            answer(channel.close(200, "bye".into())).await
        };
        done.await.map_err(|trouble: Trouble| trouble.reason().to_owned())?;
        connection.close().await;
        Ok(())
    };
    let (name, mut first) = (&config.connection_name, Reconnect::default());
    let done = config.nodes.connect_with(name, &mut first, prepare).await;
    done.map_err(|unreachable| unreachable.to_string())
}
