//! The goal of a figure.

use std::fmt;

use serde::Serialize;

/// What system and ceiling have to reach. It is computed in each round, and the median decides.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// The system reaches at least this part of its ceiling.
    RatioAtLeast(f64),
    /// The system takes at most this many times its floor.
    RatioAtMost(f64),
    /// The system takes at most this much more than its floor.
    DifferenceAtMost(f64),
    /// The system takes less than this.
    Below(f64),
    /// The system reaches at least this.
    AtLeast(f64),
}

impl Goal {
    /// The value that is compared with the goal.
    pub(crate) fn value(self, system: f64, ceiling: f64) -> f64 {
        match self {
            Self::RatioAtLeast(_) | Self::RatioAtMost(_) => system / ceiling,
            Self::DifferenceAtMost(_) => system - ceiling,
            Self::Below(_) | Self::AtLeast(_) => system,
        }
    }

    pub(crate) fn is_met_by(self, value: f64) -> bool {
        match self {
            Self::RatioAtLeast(goal) | Self::AtLeast(goal) => value >= goal,
            Self::RatioAtMost(goal) | Self::DifferenceAtMost(goal) => value <= goal,
            Self::Below(goal) => value < goal,
        }
    }

    /// The number that is the goal.
    pub(crate) fn limit(self) -> f64 {
        let (Self::RatioAtLeast(limit)
        | Self::RatioAtMost(limit)
        | Self::DifferenceAtMost(limit)
        | Self::Below(limit)
        | Self::AtLeast(limit)) = self;
        limit
    }
}

/// For a table with the ceiling in an earlier column.
impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RatioAtLeast(ratio) => write!(f, "≥ {ratio} of it"),
            Self::RatioAtMost(ratio) => write!(f, "≤ {ratio} times it"),
            Self::DifferenceAtMost(more) => write!(f, "≤ {more} more"),
            Self::Below(limit) => write!(f, "< {limit}"),
            Self::AtLeast(limit) => write!(f, "≥ {limit}"),
        }
    }
}
