//! What `make bench` measures, and how: a figure is the system in some work, round after round, each
//! next to its ceiling: the same work by the barest means on the same servers, in the same minutes.

pub mod command;
pub mod figure;
pub mod ground;
pub mod report;

mod bare;
mod events;
mod growth;
mod http;
mod idle;
mod latency;
mod memory;
mod pgbench;
mod plot;
mod processor;
mod project;
mod read;
mod relay;
mod write;

use std::time::Duration;

use anyhow::ensure;
pub use growth::Growth;
pub use idle::Idle;
pub use latency::Latency;
pub use memory::Memory;
pub use project::Project;
pub use read::Read;
pub use relay::Relay;
pub use write::Write;

/// How long a program may take until it is ready.
const READY: Duration = Duration::from_mins(1);
/// What a round waits for takes no longer.
const PATIENCE: Duration = Duration::from_mins(10);
/// How often it is looked for. A look costs a round next to nothing.
const LOOK: Duration = Duration::from_millis(10);

/// Looks again and again until there is an answer.
async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> anyhow::Result<Option<T>>) -> anyhow::Result<T> {
    let end = tokio::time::Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = look().await? {
            return Ok(answer);
        }
        ensure!(tokio::time::Instant::now() < end, "this did not happen within {PATIENCE:?}: {what}");
        tokio::time::sleep(LOOK).await;
    }
}
