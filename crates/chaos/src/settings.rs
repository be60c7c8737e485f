//! What a run does.

use std::time::Duration;

use super::{
    fault::{Fault, ScheduledFault},
    sabotage::Sabotage,
    schedule,
};

/// The settings of a run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The seed of the plan.
    pub seed: u64,
    /// How long the faults last.
    pub length: Duration,
    /// A guard to remove. The plan then has the faults that this guard is for.
    pub sabotage: Option<Sabotage>,
    /// Ways back in time. If there are any, the plan has these faults alone.
    pub only: Vec<LostTime>,
}

/// A way in which a database goes back in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LostTime {
    /// A backup is restored.
    Restore,
    /// A standby is promoted that lacked the last commits.
    Failover,
}

impl LostTime {
    fn name(self) -> &'static str {
        match self {
            Self::Restore => "restore",
            Self::Failover => "failover",
        }
    }

    fn fault(self) -> Fault {
        match self {
            Self::Restore => Fault::Restored,
            Self::Failover => Fault::FailedOver,
        }
    }
}

impl Settings {
    /// The command that runs it again.
    pub fn command(&self) -> String {
        let seconds = format!("--seconds {}", self.length.as_secs());
        let only = self.only.iter().flat_map(|only| [" --only ", only.name()]).collect::<String>();
        let what = match self.sabotage {
            Some(sabotage) => format!("--sabotage {}", sabotage.name()),
            None => seconds + &only,
        };
        format!("make chaos CHAOS_ARGS=\"--seed {} {what}\"", self.seed)
    }

    /// Its plan of faults.
    pub fn plan(&self) -> Vec<ScheduledFault> {
        match self.sabotage {
            Some(sabotage) => sabotage.plan(self.seed),
            None if self.only.is_empty() => schedule::plan(self.seed, self.length),
            None => {
                let faults: Vec<Fault> = self.only.iter().map(|only| only.fault()).collect();
                schedule::alone(&faults, self.length)
            }
        }
    }
}
