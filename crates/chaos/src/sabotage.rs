//! Shows that the oracle can see: a program runs with one guard taken out, under the faults that the guard is for, and
//! the verdict has to be red. Each guard is taken out by a patch, in a copy of the sources that is built for it.

use std::time::Duration;

use super::{
    fault::{Direction, Fault, Member, Place, What},
    load::CLIENTS,
    notes::Pen,
    schedule::{Card, deal},
    verdict::Charge,
};

/// A guard that is taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Sabotage {
    /// The relay does not wait for confirms.
    Confirms,
    /// The relay's `low_water` runs ahead of the confirms.
    LowWater,
    /// The relay reads gaps first, and what lies above in a second statement.
    Snapshot,
    /// The relay keeps its memory when the database crashes.
    Memory,
    /// The projector acknowledges before it commits.
    Commit,
    /// The projector applies what it has applied.
    Duplicates,
}

impl Sabotage {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Confirms, Self::LowWater, Self::Snapshot, Self::Memory, Self::Commit, Self::Duplicates];

    /// What the programs do without it, in words.
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

    /// As the command line spells it.
    pub fn name(self) -> String {
        use clap::ValueEnum;
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// The patch that takes it out.
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

    /// What the oracle has to find, at least one of it.
    pub fn seen_as(self) -> &'static [Charge] {
        match self {
            Self::Confirms | Self::LowWater | Self::Memory => &[Charge::EventLost],
            Self::Snapshot => &[Charge::EventOutOfOrder],
            Self::Commit => &[Charge::InboxBehind],
            Self::Duplicates => &[Charge::InboxBehind, Charge::ModelWrong, Charge::LeftOver],
        }
    }

    /// How long its faults take.
    pub fn length(self) -> Duration {
        Duration::from_secs(match self {
            Self::Memory => 60,
            Self::Snapshot => 45,
            _ => 30,
        })
    }

    /// How many clients write, and how notes are written.
    pub(crate) fn load(self) -> (u64, Pen) {
        match self {
            // What a person's client writes is on disk when it is answered, and takes along what else is not.
            Self::Memory => (0, Pen { writers: 8, notes: 500, pause: 90, hold: 20 }),
            // A position is missing for longer than from one read to the next, and what follows is soon there.
            Self::Snapshot => (CLIENTS, Pen { writers: 12, notes: 4, pause: 20, hold: 1_500 }),
            _ => (CLIENTS, Pen::USUAL),
        }
    }

    /// The faults that the guard is for.
    pub(crate) fn plan(self, seed: u64) -> Vec<Fault> {
        let relays = [Member::PersonRelay1, Member::PersonRelay2];
        let projectors = [Member::Projector1, Member::Projector2];
        let each = |members: [Member; 2], what: fn(Member) -> What, from: u64, to: u64| {
            members.map(|member| Card::Plain(what(member), from, to))
        };
        let slow = |delay: fn(Member) -> What| each(relays, delay, 6_000, 7_000);
        let cards: Vec<Card> = match self {
            // What was sent into the silence is gone.
            Self::Confirms => {
                let silent = |member| What::Silent(Place::Broker(member), Direction::ToServer);
                each(relays, silent, 3_000, 5_000).to_vec()
            }
            // There is something on its way when the relay is killed.
            Self::LowWater => [
                slow(|member| What::Slow(Place::Broker(member), 300)),
                each(relays, What::Killed, 100, 300),
                each(relays, What::Killed, 100, 300),
            ]
            .concat(),
            // Much can happen between two statements.
            Self::Snapshot => slow(|member| What::Slow(Place::Database(member), 60)).to_vec(),
            // Much is read before it is flushed.
            Self::Memory => vec![
                Card::Plain(What::Slow(Place::Database(Member::PersonRelay1), 50), 5_000, 6_000),
                Card::Plain(What::CommitsLost, 500, 1_500),
                Card::Plain(What::CommitsLost, 500, 1_500),
            ],
            Self::Commit | Self::Duplicates => [
                &each(projectors, What::Killed, 100, 300)[..],
                &each(relays, What::Killed, 100, 300)[..],
                &[
                    Card::Plain(What::DatabaseCrashed, 100, 500),
                    Card::Plain(What::SessionsEnded, 0, 1),
                    Card::Plain(What::ConnectionsClosed, 0, 1),
                ],
            ]
            .concat(),
        };
        let mut plan = deal(&cards, 500..1_500, seed, self.length());
        if self == Self::Memory {
            // Nobody else leads, and nobody's progress flushes what others wrote.
            let lasts = u64::try_from(self.length().as_millis()).unwrap_or(0);
            let stopped = [Member::PersonRelay2, Member::ScoreRelay].map(What::Stopped);
            plan.splice(0..0, stopped.map(|what| Fault { at: 0, lasts, what }));
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
