use std::ops::AddAssign;

/// How many messages had which result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Applied, including events that were held before.
    pub applied: u64,
    /// Ignored: applied or held before.
    pub duplicates: u64,
    /// Newly held because an earlier version is missing or is poison.
    pub held: u64,
    /// Newly refused by the handler.
    pub poison: u64,
    /// Rejected: not an event.
    pub rejected: u64,
    /// Rejected: from a source that is not followed.
    pub foreign: u64,
    /// Rejected: of a followed source, from a broker user that does not publish it.
    pub wrong_user: u64,
    /// Rejected: suspected forks.
    pub forks: u64,
    /// Rejected: of an incarnation that a later one of the source has superseded.
    pub superseded: u64,
    /// Rejected: of a newer incarnation that does not follow the newest known one.
    pub unrelated: u64,
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
        self.superseded += other.superseded;
        self.unrelated += other.unrelated;
    }
}

/// Why not all messages were settled. Deliver those from number `settled` on again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Interrupted {
    /// How many messages, from the first on, are settled nevertheless.
    pub settled: usize,
    /// What happened, for logs and readiness.
    pub reason: String,
    /// Whether another try would fail too: the database refused the inbox's own statements for the first unsettled
    /// message. False when the failure passes.
    pub refused: bool,
}
