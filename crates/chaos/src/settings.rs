//! What a run does.

use std::time::Duration;

use super::{fault::Fault, sabotage::Sabotage, schedule};

/// What to do.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Which run it is: the same one has the same faults at the same times.
    pub seed: u64,
    /// For how long there are faults.
    pub length: Duration,
    /// A guard that is taken out, and whose faults are the plan then.
    pub sabotage: Option<Sabotage>,
}

impl Settings {
    /// The command that runs it.
    pub fn command(&self) -> String {
        let what = match self.sabotage {
            Some(sabotage) => format!("--sabotage {}", sabotage.name()),
            None => format!("--seconds {}", self.length.as_secs()),
        };
        format!("make chaos CHAOS_ARGS=\"--seed {} {what}\"", self.seed)
    }

    /// Its faults.
    pub fn plan(&self) -> Vec<Fault> {
        match self.sabotage {
            Some(sabotage) => sabotage.plan(self.seed),
            None => schedule::plan(self.seed, self.length),
        }
    }
}
