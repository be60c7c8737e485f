//! Waits of a round, each with a timeout.

use std::time::Duration;

use anyhow::ensure;

/// How long a program may take to be ready.
pub(crate) const READY_TIMEOUT: Duration = Duration::from_mins(1);
/// How long a round waits for anything.
const TIMEOUT: Duration = Duration::from_mins(10);
/// How often it is checked. A check costs a round next to nothing.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Polls until there is a result. `what` is for the error at the timeout.
pub(crate) async fn until<T>(
    what: &str,
    mut look: impl AsyncFnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let end = tokio::time::Instant::now() + TIMEOUT;
    loop {
        if let Some(answer) = look().await? {
            return Ok(answer);
        }
        ensure!(tokio::time::Instant::now() < end, "this did not happen within {TIMEOUT:?}: {what}");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}
