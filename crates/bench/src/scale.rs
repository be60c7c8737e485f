//! How much a run does.

use std::time::Duration;

use serde::Serialize;

/// How much a run does.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Scale {
    /// Rounds of each figure.
    pub rounds: usize,
    /// Events of a drain.
    pub events: i64,
    /// Persons to write and to read.
    pub persons: i64,
    /// How long a load lasts.
    pub load: Duration,
    /// Between two writes of the latency figure.
    pub apart: Duration,
    /// How long the programs are watched while they have nothing to do.
    pub idle: Duration,
    /// Events of history.
    pub history: i64,
    /// Events that wait while the relay's memory is watched.
    pub waiting: i64,
}

impl Scale {
    /// The scale that the goals are set for.
    pub const FULL: Self = Self {
        rounds: 5,
        events: 100_000,
        persons: 100_000,
        load: Duration::from_secs(10),
        apart: Duration::from_millis(5),
        idle: Duration::from_secs(12),
        history: 5_000_000,
        waiting: 2_000_000,
    };
    /// Shows that every figure can be measured. The rounds are too short for numbers that mean something.
    pub const QUICK: Self = Self {
        rounds: 3,
        events: 15_000,
        persons: 20_000,
        load: Duration::from_secs(3),
        // What a debug build can do beside others.
        apart: Duration::from_millis(50),
        idle: Duration::from_secs(4),
        history: 200_000,
        waiting: 100_000,
    };
}
