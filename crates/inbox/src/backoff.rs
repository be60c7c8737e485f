use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

/// Pauses that double up to a cap, with jitter, so that many consumers do not come back in step.
pub(crate) struct Backoff(ExponentialBackoff);

/// The longest pause, before jitter adds up to as much again.
const CAP: Duration = Duration::from_secs(5);

impl Backoff {
    pub(crate) fn new() -> Self {
        Self(
            ExponentialBuilder::new()
                .with_jitter()
                .with_min_delay(Duration::from_millis(100))
                .with_max_delay(CAP)
                .without_max_times()
                .build(),
        )
    }

    pub(crate) fn pause(&mut self) -> Duration {
        self.0.next().unwrap_or(CAP)
    }
}
