//! Shows that the oracle can see: a program runs without one of its guards, under the faults that the guard is for, and
//! the oracle has to find the violation. A patch removes the guard from a copy of the sources, which is then built.

pub mod build;

use std::time::Duration;

use super::{
    fault::{Direction, Fault, Instance, Link, ScheduledFault},
    schedule::{Template, plan_from},
    violation::Violation,
    workload::{CLIENTS, sql_writers::SqlWriters},
};

/// A guard that is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Sabotage {
    /// The relay does not wait for confirms.
    Confirms,
    /// The relay's `low_water` is ahead of the confirms.
    LowWater,
    /// The relay reads the gaps and the new events in two statements.
    Snapshot,
    /// The relay keeps its state in memory across a crash of the database.
    Memory,
    /// The projector acknowledges before it commits.
    Commit,
    /// The projector applies an event that it has applied before.
    Duplicates,
}

impl Sabotage {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Confirms, Self::LowWater, Self::Snapshot, Self::Memory, Self::Commit, Self::Duplicates];

    /// What the program does without the guard.
    pub fn words(self) -> &'static str {
        match self {
            Self::Confirms => "publishes without waiting for confirms",
            Self::LowWater => "has `low_water` ahead of the confirms",
            Self::Snapshot => "reads gaps first, the rest in a second statement",
            Self::Memory => "keeps its memory across a database crash",
            Self::Commit => "acknowledges before the commit",
            Self::Duplicates => "applies duplicates",
        }
    }

    /// Its name on the command line.
    pub fn name(self) -> String {
        use clap::ValueEnum;
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// The patch that removes it.
    pub(crate) fn patch(self) -> &'static str {
        match self {
            Self::Confirms => include_str!("../sabotage/confirms.patch"),
            Self::LowWater => include_str!("../sabotage/low-water.patch"),
            Self::Snapshot => include_str!("../sabotage/snapshot.patch"),
            Self::Memory => include_str!("../sabotage/memory.patch"),
            Self::Commit => include_str!("../sabotage/commit.patch"),
            Self::Duplicates => include_str!("../sabotage/duplicates.patch"),
        }
    }

    /// The violations of which the oracle has to find at least one.
    pub fn seen_as(self) -> &'static [Violation] {
        match self {
            Self::Confirms | Self::LowWater | Self::Memory => &[Violation::EventLost],
            Self::Snapshot => &[Violation::EventOutOfOrder],
            Self::Commit => &[Violation::InboxBehind],
            Self::Duplicates => &[Violation::InboxBehind, Violation::ModelWrong, Violation::LeftOver],
        }
    }

    /// How long the faults last.
    pub fn length(self) -> Duration {
        Duration::from_secs(match self {
            Self::Memory => 60,
            Self::Snapshot => 45,
            _ => 30,
        })
    }

    /// The workload: how many clients write, and how the SQL writers work.
    pub(crate) fn load(self) -> (u64, SqlWriters) {
        match self {
            // A client's commit is synchronous, and would flush the asynchronous commits before it.
            Self::Memory => (0, SqlWriters { writers: 8, notes: 500, pause: 90, hold: 20 }),
            // A position is missing for longer than from one read to the next, and the next positions follow soon.
            Self::Snapshot => (CLIENTS, SqlWriters { writers: 12, notes: 4, pause: 20, hold: 1_500 }),
            _ => (CLIENTS, SqlWriters::USUAL),
        }
    }

    /// The faults that the guard is for.
    pub(crate) fn plan(self, seed: u64) -> Vec<ScheduledFault> {
        let relays = [Instance::PersonRelay1, Instance::PersonRelay2];
        let projectors = [Instance::Projector1, Instance::Projector2];
        let each = |instances: [Instance; 2], fault: fn(Instance) -> Fault, from: u64, to: u64| {
            instances.map(|instance| Template::Plain(fault(instance), from, to))
        };
        let slow = |delay: fn(Instance) -> Fault| each(relays, delay, 6_000, 7_000);
        let templates: Vec<Template> = match self {
            // Messages that are sent in this direction are lost.
            Self::Confirms => {
                let silent = |instance| Fault::HalfOpen(Link::Broker(instance), Direction::ToServer);
                each(relays, silent, 3_000, 5_000).to_vec()
            }
            // Messages are in flight when the relay is killed.
            Self::LowWater => [
                slow(|instance| Fault::Slow(Link::Broker(instance), 300)),
                each(relays, Fault::Killed, 100, 300),
                each(relays, Fault::Killed, 100, 300),
            ]
            .concat(),
            // Much time passes between two statements.
            Self::Snapshot => slow(|instance| Fault::Slow(Link::Database(instance), 60)).to_vec(),
            // Many events are read before they are flushed.
            Self::Memory => vec![
                Template::Plain(Fault::Slow(Link::Database(Instance::PersonRelay1), 50), 5_000, 6_000),
                Template::Plain(Fault::CommitsLost, 500, 1_500),
                Template::Plain(Fault::CommitsLost, 500, 1_500),
            ],
            Self::Commit | Self::Duplicates => [
                &each(projectors, Fault::Killed, 100, 300)[..],
                &each(relays, Fault::Killed, 100, 300)[..],
                &[
                    Template::Plain(Fault::DatabaseCrashed, 100, 500),
                    Template::Plain(Fault::SessionsEnded, 0, 1),
                    Template::Plain(Fault::ConnectionsClosed, 0, 1),
                ],
            ]
            .concat(),
        };
        let mut plan = plan_from(&templates, 500..1_500, seed, self.length());
        if self == Self::Memory {
            // No other relay leads, and no progress of another program flushes the commits.
            let lasts = u64::try_from(self.length().as_millis()).unwrap_or(0);
            let stopped = [Instance::PersonRelay2, Instance::ScoreRelay].map(Fault::Stopped);
            plan.splice(0..0, stopped.map(|fault| ScheduledFault { at: 0, lasts, fault }));
        }
        plan
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_faults() {
        for sabotage in Sabotage::ALL {
            assert!(sabotage.plan(1).len() >= 4, "{sabotage:?}: {:?}", sabotage.plan(1));
        }
    }
}
