//! A subscriber's queues without its consumer: declared before it lives, deleted after its end.

use amqp::{Connection, Reconnect};
use lapin::Channel;

use crate::{
    Config,
    subscription::{Trouble, answer},
};

/// Declares what a consumer with this configuration would: from then on its queue receives.
pub async fn declare(config: &Config) -> Result<(), String> {
    at_some_node(config, async |channel| answer(config.topology.declare(channel)).await).await
}

/// Deletes a subscriber's queue, the queue of its dead letters and their exchange, with all that is in
/// them. What is not there is no error. Its consumer must have ended: it would declare them again.
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
