//! How long a leader may publish without having heard that it still leads.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::time::{ClockId, clock_gettime};

/// The server ends a leader's session that says nothing for this long, and its leadership with it; the
/// leader itself publishes nothing once its last good word is older. Both count from the same statement,
/// the leader from before it was sent, so the leader stops first.
#[derive(Clone, Debug)]
pub struct Lease {
    length: Duration,
    /// When the last statement that was answered was sent, in milliseconds since boot.
    renewed: Arc<AtomicU64>,
}

/// Milliseconds since boot, the time in which the machine was suspended included: a leader that sleeps
/// has lost its lease when it wakes up.
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::Boottime);
    // The clock begins with zero at boot.
    let (seconds, nanos) = (time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs());
    seconds * 1_000 + nanos / 1_000_000
}

impl Lease {
    /// A lease that begins now.
    pub fn new(length: Duration) -> Self {
        Self { length, renewed: Arc::new(AtomicU64::new(now())) }
    }

    /// The database answered a statement that was sent at `sent`, a time of [`now`].
    pub fn renew(&self, sent: u64) {
        self.renewed.fetch_max(sent, Ordering::Relaxed);
    }

    /// Whether it may publish.
    pub fn is_valid(&self) -> bool {
        u128::from(now().saturating_sub(self.renewed.load(Ordering::Relaxed))) < self.length.as_millis()
    }

    /// Whether it is the same one.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.renewed, &other.renewed)
    }

    /// How long it lasts.
    pub fn length(&self) -> Duration {
        self.length
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_unless_it_is_renewed() {
        let lease = Lease::new(Duration::from_secs(2));
        assert!(lease.is_valid());
        lease.renewed.store(now() - 2_000, Ordering::Relaxed);
        assert!(!lease.is_valid());
        lease.renew(now());
        assert!(lease.is_valid());
        // A late answer takes nothing back.
        lease.renew(now() - 2_000);
        assert!(lease.is_valid());
    }
}
