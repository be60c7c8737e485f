//! The pause between attempts: doubled each time up to a cap, jittered, reset by success.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use tokio_util::sync::CancellationToken;

/// The pauses of a loop that may fail.
#[derive(Debug)]
pub(crate) struct Pause {
    builder: ExponentialBuilder,
    steps: ExponentialBackoff,
    cap: Duration,
}

impl Default for Pause {
    fn default() -> Self {
        Self::new(Duration::from_millis(100), Duration::from_secs(5))
    }
}

impl Pause {
    /// From `first`, doubled up to `cap`, each with a random part so that many who failed together do
    /// not come back together.
    pub(crate) fn new(first: Duration, cap: Duration) -> Self {
        let builder = ExponentialBuilder::new()
            .with_min_delay(first)
            .with_max_delay(cap)
            .with_factor(2.0)
            .without_max_times()
            .with_jitter();
        Self { builder, steps: builder.build(), cap }
    }

    /// It works again.
    pub(crate) fn reset(&mut self) {
        self.steps = self.builder.build();
    }

    /// How long to pause now.
    pub(crate) fn step(&mut self) -> Duration {
        self.steps.next().unwrap_or(self.cap)
    }

    /// Pauses, or ends early when `stop` says so.
    pub(crate) async fn wait(&mut self, stop: &CancellationToken) {
        let pause = tokio::time::sleep(self.step());
        stop.run_until_cancelled(pause).await;
    }
}
