//! The budget that all retries share. A nack repeats the event in the queues that took it, so this alone bounds
//! the copies in healthy queues, however many events wait. No I/O.

use std::time::{Duration, Instant};

/// Retries in a second, and at once after a pause.
const RETRIES: f64 = 10.0;
/// Their bytes in a second.
const BYTES: f64 = 1_000_000.0;
/// It opens no further than for so many retries at once.
const OPEN: f64 = 1_000.0;

/// What may be tried again now. A retry that is taken allows two more, so a queue that is emptied gets its events
/// soon; one that is not taken closes it to its beginning.
#[derive(Debug)]
pub struct Budget {
    retries: f64,
    bytes: f64,
    at: Instant,
}

impl Budget {
    /// Full.
    pub fn new(now: Instant) -> Self {
        Self { retries: RETRIES, bytes: BYTES, at: now }
    }

    /// Takes the place of one retry of so many bytes, if there is one. One that is larger than what is left may go,
    /// and the next ones wait for as long as it takes.
    pub fn take(&mut self, size: usize, now: Instant) -> bool {
        self.refill(now);
        if self.retries < 1.0 || self.bytes <= 0.0 {
            return false;
        }
        self.retries -= 1.0;
        self.bytes -= bytes(size);
        true
    }

    /// When there is a place again; in the past when there is one.
    pub fn next(&self) -> Instant {
        let retry = ((1.0 - self.retries) / RETRIES).max(0.0);
        let bytes = ((1.0 - self.bytes) / BYTES).max(0.0);
        self.at + Duration::from_secs_f64(retry.max(bytes))
    }

    /// A retry of so many bytes was taken.
    pub fn succeeded(&mut self, size: usize) {
        self.retries = (self.retries + 2.0).min(OPEN);
        self.bytes = (self.bytes + 2.0 * bytes(size)).min(OPEN * BYTES / RETRIES);
    }

    /// A retry was not taken.
    pub fn failed(&mut self) {
        self.retries = self.retries.min(RETRIES);
        self.bytes = self.bytes.min(BYTES);
    }

    /// How many retries it is open for.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is from 0 to 1,000")]
    pub fn open(&mut self, now: Instant) -> usize {
        self.refill(now);
        self.retries as usize
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = self.at.max(now);
        if self.retries < RETRIES {
            self.retries = (self.retries + passed * RETRIES).min(RETRIES);
        }
        if self.bytes < BYTES {
            self.bytes = (self.bytes + passed * BYTES).min(BYTES);
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a size is far below 2^52")]
fn bytes(size: usize) -> f64 {
    size as f64
}
