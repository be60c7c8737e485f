//! Faults of the whole broker.

use std::time::Duration;

use crate::{fault::What, field::Field};

/// What the broker takes before its memory alarm, in its own words.
const MEMORY: &str = "1GB";

pub(crate) async fn broker(field: &Field, what: What, lasts: Duration) -> anyhow::Result<()> {
    let mut rabbitmq = field.rabbitmq.lock().await;
    match what {
        What::BrokerKilled => {
            rabbitmq.kill().await;
            tokio::time::sleep(lasts).await;
            rabbitmq.start().await
        }
        What::BrokerApp => {
            rabbitmq.control(&["stop_app"]).await?;
            tokio::time::sleep(lasts).await;
            rabbitmq.control(&["start_app"]).await?;
            rabbitmq.ready().await
        }
        What::BrokerBlocked => {
            rabbitmq.control(&["set_vm_memory_high_watermark", "absolute", "1"]).await?;
            tokio::time::sleep(lasts).await;
            rabbitmq.control(&["set_vm_memory_high_watermark", "absolute", MEMORY]).await
        }
        What::ConnectionsClosed => rabbitmq.control(&["close_all_connections", "an operator"]).await,
        What::ChannelsClosed => {
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
