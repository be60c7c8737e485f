//! The rate of a replay. No I/O.

use std::time::{Duration, Instant};

/// Lets so many events go in a second. What was not used while nothing could go out comes back for a fifth of a second
/// alone, so that no burst follows.
#[derive(Debug)]
pub(super) struct Pace {
    rate: f64,
    open: f64,
    at: Instant,
}

impl Pace {
    pub(super) fn new(rate: u32, now: Instant) -> Self {
        Self { rate: rate.into(), open: 1.0, at: now }
    }

    fn most(&self) -> f64 {
        (self.rate / 5.0).max(1.0)
    }

    /// How many may go now.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "it is from 0 to a fifth of a u32"
    )]
    pub(super) fn open(&mut self, now: Instant) -> usize {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = self.at.max(now);
        self.open = (self.open + passed * self.rate).min(self.most());
        self.open as usize
    }

    /// So many go.
    #[expect(clippy::cast_precision_loss, reason = "it is at most a window")]
    pub(super) fn take(&mut self, count: usize) {
        self.open -= count as f64;
    }

    /// When so many may go, or as many as may ever go at once.
    #[expect(clippy::cast_precision_loss, reason = "it is at most a window")]
    pub(super) fn next(&self, count: usize) -> Instant {
        let wanted = (count as f64).min(self.most()).floor().max(1.0);
        self.at + Duration::from_secs_f64(((wanted - self.open) / self.rate).max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_go_in_a_second() {
        let begin = Instant::now();
        for (rate, seconds, most) in [(1, 10, 11), (1_000, 10, 10_001), (100_000, 1, 100_001)] {
            let (mut pace, mut now, mut gone) = (Pace::new(rate, begin), begin, 0);
            while now < begin + Duration::from_secs(seconds) {
                let open = pace.open(now).min(250);
                pace.take(open);
                gone += open;
                now = pace.next(250).max(now + Duration::from_micros(100));
            }
            assert!((most * 9 / 10..=most).contains(&gone), "{gone} at {rate}/s");
        }
    }

    #[test]
    fn after_a_pause_there_is_no_burst() {
        let begin = Instant::now();
        let mut pace = Pace::new(1_000, begin);
        assert_eq!(pace.open(begin + Duration::from_mins(1)), 200);
    }
}
