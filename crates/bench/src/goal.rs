//! What a figure has to come to.

use std::fmt;

use serde::Serialize;

/// What the system and its ceiling have to come to, round by round; the median decides.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// The system does at least so much of its ceiling.
    RatioAtLeast(f64),
    /// The system takes at most so many times its floor.
    RatioAtMost(f64),
    /// The system takes at most so much more.
    DifferenceAtMost(f64),
    /// The system takes less than this.
    Below(f64),
}

impl Goal {
    /// What is held against the goal.
    pub(crate) fn value(self, system: f64, ceiling: f64) -> f64 {
        match self {
            Self::RatioAtLeast(_) | Self::RatioAtMost(_) => system / ceiling,
            Self::DifferenceAtMost(_) => system - ceiling,
            Self::Below(_) => system,
        }
    }

    pub(crate) fn is_met_by(self, value: f64) -> bool {
        match self {
            Self::RatioAtLeast(goal) => value >= goal,
            Self::RatioAtMost(goal) | Self::DifferenceAtMost(goal) => value <= goal,
            Self::Below(goal) => value < goal,
        }
    }

    /// The number that is the goal.
    pub(crate) fn limit(self) -> f64 {
        let (Self::RatioAtLeast(limit)
        | Self::RatioAtMost(limit)
        | Self::DifferenceAtMost(limit)
        | Self::Below(limit)) = self;
        limit
    }
}

/// In words, for a table in which the ceiling stands to the left.
impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RatioAtLeast(ratio) => write!(f, "≥ {ratio} of it"),
            Self::RatioAtMost(ratio) => write!(f, "≤ {ratio} times it"),
            Self::DifferenceAtMost(more) => write!(f, "≤ {more} more"),
            Self::Below(limit) => write!(f, "< {limit}"),
        }
    }
}
