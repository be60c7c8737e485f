//! How long a connection is kept over which the broker refuses events.

use std::time::{Duration, Instant};

/// How long a connection is kept over which the broker refuses events. A node may refuse for ever what
/// another one would take: RabbitMQ 3.10 does when a connection first publishes to a quorum queue whose
/// leader has just died. When it is a queue that is full, a new connection changes nothing, so each is
/// kept for twice as long as the one before.
#[derive(Debug)]
pub(super) struct Patience {
    /// The first refusal on this connection, and the last on any.
    first: Option<Instant>,
    last: Option<Instant>,
    limit: Duration,
}

impl Patience {
    const SHORTEST: Duration = Duration::from_secs(5);
    const LONGEST: Duration = Duration::from_mins(5);
    /// What was refused is tried again within less; when nothing was refused for so long, nothing is.
    const OVER: Duration = Duration::from_secs(30);

    /// Whether it ends, after a window of which something was `nacked`, or nothing.
    pub(super) fn ends(&mut self, nacked: bool, now: Instant) -> bool {
        if !nacked {
            if self.last.is_some_and(|last| now.duration_since(last) >= Self::OVER) {
                *self = Self::default();
            }
            return false;
        }
        self.last = Some(now);
        let first = *self.first.get_or_insert(now);
        let ends = now.duration_since(first) >= self.limit;
        if ends {
            self.first = None;
            self.limit = (self.limit * 2).min(Self::LONGEST);
        }
        ends
    }
}

impl Default for Patience {
    fn default() -> Self {
        Self { first: None, last: None, limit: Self::SHORTEST }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The seconds at which connections are given up, when a window ends each second and `nacked` says
    /// of which something was refused.
    fn ends(seconds: u64, nacked: impl Fn(u64) -> bool) -> Vec<u64> {
        let (mut patience, begin) = (Patience::default(), Instant::now());
        (0..seconds).filter(|n| patience.ends(nacked(*n), begin + Duration::from_secs(*n))).collect()
    }

    #[test]
    fn a_connection_over_which_events_are_refused_is_given_up_ever_more_seldom() {
        assert_eq!(ends(20, |_| false), Vec::<u64>::new());
        assert_eq!(ends(2_000, |_| true), [5, 16, 37, 78, 159, 320, 621, 922, 1223, 1524, 1825]);
        // Other events pass meanwhile.
        assert_eq!(ends(100, |n| n % 10 == 0), [10, 30, 60]);
        // Then nothing is refused for half a minute.
        assert_eq!(ends(100, |n| !(7..=60).contains(&n)), [5, 66, 77, 98]);
    }
}
