//! Which faults happen when: the same list for the same seed, on every machine.

use std::{collections::BTreeMap, time::Duration};

use super::fault::{Database, Direction, Fault, Member, Open, Place, What};
use rand::{
    RngExt, SeedableRng,
    rngs::Xoshiro256PlusPlus,
    seq::{IndexedRandom, SliceRandom},
};

/// Between the beginnings of two faults, in milliseconds.
const PAUSE: std::ops::Range<u64> = 900..3_600;
/// Nothing begins before everybody has had time to begin.
const BEGIN: u64 = 3_000;

/// The faults of a run of this length, in the order of their beginnings. A run of one and a half minutes has seen
/// about every kind.
pub fn plan(seed: u64, length: Duration) -> Vec<Fault> {
    deal(&DECK, PAUSE, seed, length)
}

/// Faults from a deck that has each kind, the frequent ones several times: it is shuffled, dealt and shuffled
/// again. `pause`: milliseconds between two of them.
pub(crate) fn deal(cards: &[Card], pause: std::ops::Range<u64>, seed: u64, length: Duration) -> Vec<Fault> {
    let length = u64::try_from(length.as_millis()).unwrap_or(u64::MAX);
    // A named algorithm: the list of a seed stays the same when the library's default changes.
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut free: BTreeMap<String, u64> = BTreeMap::new();
    let mut faults = Vec::new();
    let mut deck = Vec::new();
    let mut now = BEGIN;
    while now < length {
        if deck.is_empty() {
            deck = cards.to_vec();
            deck.shuffle(&mut random);
        }
        let Some(card) = deck.pop() else { break };
        let (what, lasts) = card.draw(&mut random);
        let mut at = now;
        if let Some((subject, rest)) = what.subject() {
            let free = free.entry(subject).or_default();
            at = at.max(*free);
            *free = at + lasts + rest;
        }
        if at + lasts < length {
            faults.push(Fault { at, lasts, what });
        }
        now += random.random_range(pause.clone());
    }
    faults.sort_unstable();
    faults
}

/// A kind of fault, without its particulars.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Card {
    Kill,
    Stop,
    Plain(What, u64, u64),
    Transaction(Open),
    Slow,
    Cut,
    Silent,
}

const DECK: [Card; 46] = [
    Card::Kill,
    Card::Kill,
    Card::Kill,
    Card::Kill,
    Card::Kill,
    Card::Kill,
    Card::Stop,
    Card::Stop,
    Card::Stop,
    Card::Stop,
    Card::Plain(What::BrokerKilled, 500, 3_000),
    Card::Plain(What::BrokerApp, 500, 3_000),
    Card::Plain(What::BrokerStopped, 1_000, 6_000),
    Card::Plain(What::BrokerBlocked, 1_000, 6_000),
    Card::Plain(What::ConnectionsClosed, 0, 1),
    Card::Plain(What::ChannelsClosed, 0, 1),
    Card::Plain(What::ScoreUnbound, 500, 3_000),
    Card::Plain(What::NotesUnbound, 1_000, 5_000),
    Card::Plain(What::MemosUnbound, 1_000, 5_000),
    Card::Plain(What::QueueFull, 2_000, 8_000),
    Card::Plain(What::TypeDenied, 1_000, 5_000),
    Card::Plain(What::BodyTooLarge, 0, 1),
    Card::Plain(What::RowUnsendable, 0, 1),
    Card::Plain(What::ForeignSender, 0, 1),
    Card::Plain(What::ReadOnly(Database::Person), 500, 3_000),
    Card::Plain(What::ReadOnly(Database::Score), 500, 3_000),
    Card::Plain(What::DatabaseCrashed, 200, 4_000),
    Card::Plain(What::DatabaseCrashed, 200, 4_000),
    Card::Plain(What::SessionsEnded, 0, 1),
    Card::Plain(What::SessionsEnded, 0, 1),
    Card::Transaction(Open::Reading),
    Card::Transaction(Open::ReadingElsewhere),
    Card::Transaction(Open::Appending),
    Card::Transaction(Open::Appending),
    Card::Transaction(Open::Prepared),
    Card::Transaction(Open::PreparedElsewhere),
    Card::Slow,
    Card::Slow,
    Card::Slow,
    Card::Slow,
    Card::Cut,
    Card::Cut,
    Card::Cut,
    Card::Silent,
    Card::Silent,
    Card::Silent,
];

impl Card {
    fn draw(self, random: &mut Xoshiro256PlusPlus) -> (What, u64) {
        let member = *Member::ALL.choose(random).unwrap_or(&Member::PersonApi);
        let place = *Place::all().choose(random).unwrap_or(&Place::Clients);
        match self {
            Self::Kill => (What::Killed(member), random.random_range(100..1_000)),
            Self::Stop => (What::Stopped(member), random.random_range(500..6_000)),
            Self::Plain(what, from, to) => (what, random.random_range(from..to)),
            Self::Transaction(open) => {
                (What::Transaction(open, random.random()), random.random_range(2_000..12_000))
            }
            Self::Slow => {
                (What::Slow(place, random.random_range(20..400)), random.random_range(2_000..8_000))
            }
            Self::Cut => (What::Cut(place), random.random_range(100..3_000)),
            Self::Silent => {
                let directions = [Direction::Both, Direction::ToServer, Direction::FromServer];
                let direction = *directions.choose(random).unwrap_or(&Direction::Both);
                (What::Silent(place, direction), random.random_range(1_000..8_000))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_seed_has_one_plan() {
        let minute = Duration::from_mins(1);
        assert_eq!(plan(7, minute), plan(7, minute));
        assert_ne!(plan(7, minute), plan(8, minute));
        let shown: Vec<_> = plan(1, Duration::from_secs(25)).iter().map(Fault::to_string).collect();
        insta::assert_snapshot!(shown.join("\n"), @r"
          3.0 s  for  3.4 s  a half-open wire: person-api to PostgreSQL, FromServer
          6.3 s  for  2.0 s  a program stopped and continued: score-api
          7.4 s  for  5.3 s  a slow wire: person-api to PostgreSQL, 79 ms
          9.3 s  for  0.8 s  a cut wire: score-projector-2 to PostgreSQL
         11.8 s  for  0.6 s  a program killed: person-relay-1
         14.7 s  for  0.0 s  all sessions ended
         17.3 s  for  0.0 s  an event that the broker refuses
         20.2 s  for  4.5 s  a half-open wire: person-relay-1 to RabbitMQ, ToServer
         22.1 s  for  0.0 s  all sessions ended
        ");
    }

    #[test]
    fn a_minute_and_a_half_sees_every_kind() {
        let all: BTreeSet<_> =
            plan(0, Duration::from_mins(30)).iter().map(|fault| fault.what.kind()).collect();
        assert_eq!(all.len(), 25);
        for seed in 0..20 {
            let kinds: BTreeSet<_> =
                plan(seed, Duration::from_secs(90)).iter().map(|fault| fault.what.kind()).collect();
            assert!(kinds.len() >= 14, "seed {seed} has only {kinds:?}");
        }
    }

    #[test]
    fn nothing_is_done_twice_at_a_time() {
        for seed in 0..20 {
            let length = Duration::from_mins(10);
            let mut until: BTreeMap<String, u64> = BTreeMap::new();
            for fault in plan(seed, length) {
                assert!(u128::from(fault.at + fault.lasts) < length.as_millis(), "it ends in time");
                if let Some((subject, _)) = fault.what.subject() {
                    let until = until.entry(subject).or_default();
                    assert!(fault.at >= *until, "seed {seed}: {fault}");
                    *until = fault.at + fault.lasts;
                }
            }
        }
    }
}
