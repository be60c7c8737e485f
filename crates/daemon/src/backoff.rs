//! Pauses between attempts at what may be away for a while.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};

/// The pauses of a loop whose work may fail, without end: each is twice the one before, up to a cap, and a random part
/// as long again at most is added to each, so that what failed together does not come back together. After a success
/// begin with new ones.
///
/// ```
/// use std::time::Duration;
///
/// let (first, longest) = (Duration::from_millis(100), Duration::from_secs(2));
/// let mut pauses = daemon::backoff(first, longest);
/// assert!((first..=first * 2).contains(&pauses.next().unwrap()));
/// assert!((longest..=longest * 2).contains(&pauses.nth(10).unwrap()));
/// ```
pub fn backoff(first: Duration, longest: Duration) -> impl Iterator<Item = Duration> + Send {
    ExponentialBuilder::new()
        .with_min_delay(first)
        .with_max_delay(longest)
        .without_max_times()
        .with_jitter()
        .build()
}
