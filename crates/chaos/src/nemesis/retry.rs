//! Trying again while another fault is in the way.

use std::time::Duration;

use tokio::time::Instant;

/// For how long it is tried to begin a fault, or to undo it, while another one is in the way.
const PATIENCE: Duration = Duration::from_mins(5);
/// The pause before another try.
const PAUSE: Duration = Duration::from_millis(100);

/// Tries until it is done: the server may be away just now, by another fault.
pub(crate) async fn until_done<T>(mut work: impl AsyncFnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let end = Instant::now() + PATIENCE;
    loop {
        match work().await {
            Ok(done) => return Ok(done),
            Err(error) if Instant::now() > end => return Err(error),
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}
