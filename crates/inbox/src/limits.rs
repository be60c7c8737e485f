//! The limits of what is stored of received messages.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// The limits of a consumer, as far as they are set.
#[derive(Debug, Default)]
pub(crate) struct Limits {
    /// How many messages are stored for each reason of rejection; 0 for no limit.
    rejected: AtomicU32,
    /// The limit of events that wait for missing versions is reached.
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
