//! How much may be stored of what comes from outside.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Limits of what a consumer stores, as far as it is told any.
#[derive(Debug, Default)]
pub(crate) struct Limits {
    /// How many messages are kept of those that are rejected for one reason; 0 for any number.
    rejected: AtomicU32,
    /// As many events wait for missing versions as may.
    full: AtomicBool,
}

impl Limits {
    pub(crate) fn set_rejected(&self, most: u32) {
        self.rejected.store(most, Ordering::Relaxed);
    }

    pub(crate) fn rejected(&self) -> u32 {
        self.rejected.load(Ordering::Relaxed)
    }

    pub(crate) fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::Relaxed);
    }

    pub(crate) fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }
}
