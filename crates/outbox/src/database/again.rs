//! Work that the server rolled back in favour of another transaction is sent again, a bounded number of times.

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

use super::Failure;

/// How often the same work is tried.
pub const ATTEMPTS: u32 = 6;

/// Counts the attempts at one piece of work, and pauses between them.
#[derive(Debug)]
pub struct Attempts(u32);

impl Default for Attempts {
    /// The first one is under way.
    fn default() -> Self {
        Self(1)
    }
}

impl Attempts {
    /// Pauses, if there is another attempt; whether there is one.
    pub async fn again(&mut self) -> bool {
        if self.0 >= ATTEMPTS {
            return false;
        }
        tokio::time::sleep(pause(self.0)).await;
        self.0 += 1;
        true
    }
}

/// Whether the server rolled a transaction back in favour of another one (40001, 40P01 and their class).
pub fn is_conflict<T>(done: &sqlx::Result<T>) -> bool {
    done.as_ref().is_err_and(|error| Failure::of(error) == Failure::Conflict)
}

/// Does `work` until it meets no conflict, at most [`ATTEMPTS`] times. It has to be a whole transaction: the server has
/// rolled back what it did before.
pub async fn again<T>(mut work: impl AsyncFnMut() -> sqlx::Result<T>) -> sqlx::Result<T> {
    let mut attempts = Attempts::default();
    loop {
        let done = work().await;
        if !is_conflict(&done) || !attempts.again().await {
            return done;
        }
    }
}

/// The pause after the attempt of this number: at most 20 ms, 40 ms, 80 ms and so on up to 640 ms, and half of it by
/// chance, so that two transactions that met do not meet again.
fn pause(attempt: u32) -> Duration {
    let most = Duration::from_millis(10) * (1 << attempt.clamp(1, ATTEMPTS));
    // Each `RandomState` has its own keys.
    let chance = u32::from(RandomState::new().hash_one(attempt).to_be_bytes()[0]);
    most / 2 + most / 2 * chance / 255
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_are_bounded() {
        for attempt in 0..40 {
            let pause = pause(attempt);
            assert!(
                pause >= Duration::from_millis(10) && pause <= Duration::from_millis(640),
                "{attempt}: {pause:?}"
            );
        }
        assert!(pause(1) <= Duration::from_millis(20) && pause(6) >= Duration::from_millis(320));
    }
}
