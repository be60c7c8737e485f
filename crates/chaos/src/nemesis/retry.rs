//! Retries while another fault is in the way.

use std::time::Duration;

use tokio::time::Instant;

/// How long the start or the end of a fault is retried.
const TIMEOUT: Duration = Duration::from_mins(5);
/// The pause before a retry.
const PAUSE: Duration = Duration::from_millis(100);

/// Retries `work` until it succeeds. A server may be down because of another fault.
pub(crate) async fn until_done<T>(mut work: impl AsyncFnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let end = Instant::now() + TIMEOUT;
    loop {
        match work().await {
            Ok(done) => return Ok(done),
            Err(error) if Instant::now() > end => return Err(error),
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}
