//! What a run does.

use std::time::Duration;

use super::{fault::ScheduledFault, sabotage::Sabotage, schedule};

/// The settings of a run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The seed of the plan.
    pub seed: u64,
    /// How long the faults last.
    pub length: Duration,
    /// A guard to remove. The plan then has the faults that this guard is for.
    pub sabotage: Option<Sabotage>,
}

impl Settings {
    /// The command that runs it again.
    pub fn command(&self) -> String {
        let what = match self.sabotage {
            Some(sabotage) => format!("--sabotage {}", sabotage.name()),
            None => format!("--seconds {}", self.length.as_secs()),
        };
        format!("make chaos CHAOS_ARGS=\"--seed {} {what}\"", self.seed)
    }

    /// Its plan of faults.
    pub fn plan(&self) -> Vec<ScheduledFault> {
        match self.sabotage {
            Some(sabotage) => sabotage.plan(self.seed),
            None => schedule::plan(self.seed, self.length),
        }
    }
}
