//! Waiting for what a round needs.

use std::time::Duration;

use anyhow::ensure;

/// How long a program may take until it is ready.
pub(crate) const READY: Duration = Duration::from_mins(1);
/// What a round waits for takes no longer.
const PATIENCE: Duration = Duration::from_mins(10);
/// How often it is looked for. A look costs a round next to nothing.
const LOOK: Duration = Duration::from_millis(10);

/// Looks again and again until there is an answer.
pub(crate) async fn until<T>(
    what: &str,
    mut look: impl AsyncFnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let end = tokio::time::Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = look().await? {
            return Ok(answer);
        }
        ensure!(tokio::time::Instant::now() < end, "this did not happen within {PATIENCE:?}: {what}");
        tokio::time::sleep(LOOK).await;
    }
}
