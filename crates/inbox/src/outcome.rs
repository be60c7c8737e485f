use std::ops::AddAssign;

/// What became of messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Applied, those that had been held included.
    pub applied: u64,
    /// Nothing to do: applied or held before.
    pub duplicates: u64,
    /// Newly held because an earlier version is missing or is poison.
    pub held: u64,
    /// Newly refused by the handler.
    pub poison: u64,
    /// No events.
    pub rejected: u64,
    /// From sources that are not followed.
    pub foreign: u64,
    /// Of a followed source, from a user that does not publish it.
    pub wrong_user: u64,
    /// Suspected forks.
    pub forks: u64,
}

impl AddAssign for Outcome {
    fn add_assign(&mut self, other: Self) {
        self.applied += other.applied;
        self.duplicates += other.duplicates;
        self.held += other.held;
        self.poison += other.poison;
        self.rejected += other.rejected;
        self.foreign += other.foreign;
        self.wrong_user += other.wrong_user;
        self.forks += other.forks;
    }
}

/// Why messages were not settled. Deliver those from `settled` on again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Interrupted {
    /// How many messages from the start are settled all the same.
    pub settled: usize,
    /// What happened, for logs and readiness.
    pub reason: String,
    /// The database refused the inbox's own statements for the first unsettled message, and another
    /// try would end the same way. False when it passes.
    pub refused: bool,
}
