//! Faults of the whole broker.

use std::time::Duration;

use crate::{fault::Fault, testbed::Testbed};

/// The memory limit of the broker at which it raises its alarm, as the testbed configures it.
const MEMORY_LIMIT: &str = "1GB";

pub(crate) async fn broker(testbed: &Testbed, what: Fault, lasts: Duration) -> anyhow::Result<()> {
    let mut rabbitmq = testbed.rabbitmq.lock().await;
    match what {
        Fault::BrokerKilled => {
            rabbitmq.kill().await;
            tokio::time::sleep(lasts).await;
            rabbitmq.start().await
        }
        Fault::BrokerApp => {
            rabbitmq.control(&["stop_app"]).await?;
            tokio::time::sleep(lasts).await;
            rabbitmq.control(&["start_app"]).await?;
            rabbitmq.ready().await
        }
        Fault::BrokerBlocked => {
            rabbitmq.control(&["set_vm_memory_high_watermark", "absolute", "1"]).await?;
            tokio::time::sleep(lasts).await;
            rabbitmq.control(&["set_vm_memory_high_watermark", "absolute", MEMORY_LIMIT]).await
        }
        Fault::ConnectionsClosed => rabbitmq.control(&["close_all_connections", "an operator"]).await,
        Fault::ChannelsClosed => {
            let end = "[exit(Channel, kill) || Channel <- rabbit_channel:list_local()], ok.";
            rabbitmq.control(&["eval", end]).await
        }
        _ => {
            rabbitmq.pause();
            tokio::time::sleep(lasts).await;
            rabbitmq.resume();
            Ok(())
        }
    }
}
