//! Pauses between attempts.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use tokio_util::sync::CancellationToken;

/// The pauses of a loop whose work may fail: each is twice the one before, up to a cap, and a random part as long
/// again at most is added to each, so that what failed together does not come back together.
///
/// ```
/// use std::time::Duration;
///
/// let (first, longest) = (Duration::from_millis(100), Duration::from_secs(5));
/// let mut backoff = amqp::Backoff::new(first, longest);
/// assert!((first..=first * 2).contains(&backoff.step()));
/// for _ in 0..10 {
///     backoff.step();
/// }
/// assert!((longest..=longest * 2).contains(&backoff.step()));
/// backoff.reset();
/// assert!(backoff.step() <= first * 2);
/// ```
#[derive(Debug)]
pub struct Backoff {
    builder: ExponentialBuilder,
    steps: ExponentialBackoff,
    longest: Duration,
}

/// From 100 ms up to 5 s.
impl Default for Backoff {
    fn default() -> Self {
        Self::new(Duration::from_millis(100), Duration::from_secs(5))
    }
}

impl Backoff {
    /// From `first` up to `longest`, both without the random part.
    ///
    /// ```
    /// # use std::time::Duration;
    /// let mut backoff = amqp::Backoff::new(Duration::from_millis(10), Duration::from_secs(1));
    /// assert!(backoff.step() < Duration::from_secs(1));
    /// ```
    pub fn new(first: Duration, longest: Duration) -> Self {
        let builder = ExponentialBuilder::new()
            .with_min_delay(first)
            .with_max_delay(longest)
            .without_max_times()
            .with_jitter();
        Self { builder, steps: builder.build(), longest }
    }

    /// The work succeeded: the next pause is a first one.
    ///
    /// ```
    /// let mut backoff = amqp::Backoff::default();
    /// backoff.step();
    /// backoff.reset();
    /// ```
    pub fn reset(&mut self) {
        self.steps = self.builder.build();
    }

    /// How long to pause now.
    ///
    /// ```
    /// # use std::time::Duration;
    /// assert!(amqp::Backoff::default().step() >= Duration::from_millis(100));
    /// ```
    pub fn step(&mut self) -> Duration {
        self.steps.next().unwrap_or(self.longest)
    }

    /// Pauses; shorter once `stop` is cancelled.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// let stop = tokio_util::sync::CancellationToken::new();
    /// let mut backoff = amqp::Backoff::default();
    /// backoff.wait(&stop).await;
    /// # }
    /// ```
    pub async fn wait(&mut self, stop: &CancellationToken) {
        stop.run_until_cancelled(tokio::time::sleep(self.step())).await;
    }
}
