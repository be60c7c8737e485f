//! The plan: which fault happens when. The same seed has the same plan on every machine.

use std::{collections::BTreeMap, time::Duration};

use super::fault::{Database, Direction, Fault, Instance, Link, OpenTransaction, ScheduledFault};
use rand::{
    RngExt, SeedableRng,
    rngs::Xoshiro256PlusPlus,
    seq::{IndexedRandom, SliceRandom},
};

/// Between the beginnings of two faults, in milliseconds.
const PAUSE: std::ops::Range<u64> = 900..3_600;
/// The first fault begins after so many milliseconds, when every client has written.
const FIRST: u64 = 3_000;

/// Runs from this length on, in milliseconds, send databases back in time, in both ways. The procedure after each of them
/// takes half a minute, or minutes beside other faults on a busy machine.
const LOST_TIMES: u64 = 120_000;
/// They come within so much of the run, so that a copy of the database takes seconds.
const EARLY: u64 = 10 * 60_000;

/// The plan of a run of this length, in the order of time. 90 seconds have nearly every kind of fault.
pub fn plan(seed: u64, length: Duration) -> Vec<ScheduledFault> {
    let mut plan = plan_from(&TEMPLATES, PAUSE, seed, length);
    plan.extend(lost_times(seed, length));
    plan.sort_unstable();
    plan
}

/// Nothing but these faults: each in the second quarter of its share of the run.
pub(crate) fn alone(faults: &[Fault], length: Duration) -> Vec<ScheduledFault> {
    let shares = u64::try_from(faults.len()).unwrap_or(1).max(1);
    let share = u64::try_from(length.as_millis()).unwrap_or(u64::MAX) / shares;
    let at = (0..shares).map(|number| number * share + share / 4);
    faults.iter().zip(at).map(|(fault, at)| ScheduledFault { at, lasts: share / 4, fault: *fault }).collect()
}

/// When databases go back in time: each kind once, if the run is long enough.
fn lost_times(seed: u64, length: Duration) -> Vec<ScheduledFault> {
    let length = u64::try_from(length.as_millis()).unwrap_or(u64::MAX);
    // Numbers of their own, so that the other faults do not depend on them.
    let mut random = Xoshiro256PlusPlus::seed_from_u64(!seed);
    let mut kinds = [Fault::Restored, Fault::FailedOver];
    kinds.shuffle(&mut random);
    if length < LOST_TIMES {
        return Vec::new();
    }
    // Where they begin, in hundredths of the length.
    let places = [(10, 25), (50, 65)];
    let early = length.min(EARLY);
    let lost_time = |(fault, (from, to))| ScheduledFault {
        at: early * random.random_range(from..to) / 100,
        lasts: early * random.random_range(8..15) / 100,
        fault,
    };
    kinds.into_iter().zip(places).map(lost_time).collect()
}

/// A plan from these templates: they are shuffled and used one after the other, then shuffled again. `pause` is the time
/// between the beginnings of two faults, in milliseconds.
pub(crate) fn plan_from(
    templates: &[Template],
    pause: std::ops::Range<u64>,
    seed: u64,
    length: Duration,
) -> Vec<ScheduledFault> {
    let length = u64::try_from(length.as_millis()).unwrap_or(u64::MAX);
    // A named algorithm, so the plan of a seed does not change with the library's default.
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut free_from: BTreeMap<String, u64> = BTreeMap::new();
    let mut faults = Vec::new();
    let mut shuffled = Vec::new();
    let mut now = FIRST;
    while now < length {
        if shuffled.is_empty() {
            shuffled = templates.to_vec();
            shuffled.shuffle(&mut random);
        }
        let Some(template) = shuffled.pop() else { break };
        let (fault, lasts) = template.draw(&mut random);
        let mut at = now;
        if let Some((subject, rest)) = fault.subject() {
            let free = free_from.entry(subject).or_default();
            at = at.max(*free);
            *free = at + lasts + rest;
        }
        if at + lasts < length {
            faults.push(ScheduledFault { at, lasts, fault });
        }
        now += random.random_range(pause.clone());
    }
    faults.sort_unstable();
    faults
}

/// A kind of fault, without its particulars. Frequent kinds are listed several times.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Template {
    Kill,
    Stop,
    Plain(Fault, u64, u64),
    Transaction(OpenTransaction),
    Slow,
    Cut,
    HalfOpen,
}

const TEMPLATES: [Template; 46] = [
    Template::Kill,
    Template::Kill,
    Template::Kill,
    Template::Kill,
    Template::Kill,
    Template::Kill,
    Template::Stop,
    Template::Stop,
    Template::Stop,
    Template::Stop,
    Template::Plain(Fault::BrokerKilled, 500, 3_000),
    Template::Plain(Fault::BrokerApp, 500, 3_000),
    Template::Plain(Fault::BrokerStopped, 1_000, 6_000),
    Template::Plain(Fault::BrokerBlocked, 1_000, 6_000),
    Template::Plain(Fault::ConnectionsClosed, 0, 1),
    Template::Plain(Fault::ChannelsClosed, 0, 1),
    Template::Plain(Fault::ScoreUnbound, 500, 3_000),
    Template::Plain(Fault::NotesUnbound, 1_000, 5_000),
    Template::Plain(Fault::MemosUnbound, 1_000, 5_000),
    Template::Plain(Fault::QueueFull, 2_000, 8_000),
    Template::Plain(Fault::TypeDenied, 1_000, 5_000),
    Template::Plain(Fault::BodyTooLarge, 0, 1),
    Template::Plain(Fault::RowUnsendable, 0, 1),
    Template::Plain(Fault::ForeignSender, 0, 1),
    Template::Plain(Fault::ReadOnly(Database::Person), 500, 3_000),
    Template::Plain(Fault::ReadOnly(Database::Score), 500, 3_000),
    Template::Plain(Fault::DatabaseCrashed, 200, 4_000),
    Template::Plain(Fault::DatabaseCrashed, 200, 4_000),
    Template::Plain(Fault::SessionsEnded, 0, 1),
    Template::Plain(Fault::SessionsEnded, 0, 1),
    Template::Transaction(OpenTransaction::Reading),
    Template::Transaction(OpenTransaction::ReadingElsewhere),
    Template::Transaction(OpenTransaction::Appending),
    Template::Transaction(OpenTransaction::Appending),
    Template::Transaction(OpenTransaction::Prepared),
    Template::Transaction(OpenTransaction::PreparedElsewhere),
    Template::Slow,
    Template::Slow,
    Template::Slow,
    Template::Slow,
    Template::Cut,
    Template::Cut,
    Template::Cut,
    Template::HalfOpen,
    Template::HalfOpen,
    Template::HalfOpen,
];

impl Template {
    fn draw(self, random: &mut Xoshiro256PlusPlus) -> (Fault, u64) {
        let instance = *Instance::ALL.choose(random).unwrap_or(&Instance::PersonApi);
        let link = *Link::all().choose(random).unwrap_or(&Link::Clients);
        match self {
            Self::Kill => (Fault::Killed(instance), random.random_range(100..1_000)),
            Self::Stop => (Fault::Stopped(instance), random.random_range(500..6_000)),
            Self::Plain(fault, from, to) => (fault, random.random_range(from..to)),
            Self::Transaction(open) => {
                (Fault::Transaction(open, random.random()), random.random_range(2_000..12_000))
            }
            Self::Slow => {
                (Fault::Slow(link, random.random_range(20..400)), random.random_range(2_000..8_000))
            }
            Self::Cut => (Fault::Cut(link), random.random_range(100..3_000)),
            Self::HalfOpen => {
                let directions = [Direction::Both, Direction::ToServer, Direction::FromServer];
                let direction = *directions.choose(random).unwrap_or(&Direction::Both);
                (Fault::HalfOpen(link, direction), random.random_range(1_000..8_000))
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
        let shown: Vec<_> = plan(1, Duration::from_secs(25)).iter().map(ScheduledFault::to_string).collect();
        insta::assert_snapshot!(shown.join("\n"), @r"
          3.0 s  for  3.4 s  a half-open link: person-api to PostgreSQL, FromServer
          6.3 s  for  2.0 s  a program stopped and continued: score-api
          7.4 s  for  5.3 s  a slow link: person-api to PostgreSQL, 79 ms
          9.3 s  for  0.8 s  a cut link: score-projector-2 to PostgreSQL
         11.8 s  for  0.6 s  a program killed: person-relay-1
         14.7 s  for  0.0 s  all sessions ended
         17.3 s  for  0.0 s  an event that the broker refuses
         20.2 s  for  4.5 s  a half-open link: person-relay-1 to RabbitMQ, ToServer
         22.1 s  for  0.0 s  all sessions ended
        ");
    }

    #[test]
    fn a_minute_and_a_half_sees_every_kind() {
        let all: BTreeSet<_> =
            plan(0, Duration::from_mins(30)).iter().map(|fault| fault.fault.kind()).collect();
        assert_eq!(all.len(), 27);
        for seed in 0..20 {
            let kinds: BTreeSet<_> =
                plan(seed, Duration::from_secs(90)).iter().map(|fault| fault.fault.kind()).collect();
            assert!(kinds.len() >= 14, "seed {seed} has only {kinds:?}");
        }
    }

    #[test]
    fn databases_go_back_in_time_once_in_each_way() {
        let kinds = |seed, seconds| {
            let plan = plan(seed, Duration::from_secs(seconds));
            plan.into_iter()
                .map(|fault| fault.fault)
                .filter(|fault| matches!(fault, Fault::Restored | Fault::FailedOver))
        };
        let mut first = BTreeSet::new();
        for seed in 0..20 {
            assert_eq!(kinds(seed, 119).count(), 0);
            for seconds in [120, 7_200] {
                assert_eq!(kinds(seed, seconds).collect::<BTreeSet<_>>().len(), 2, "seed {seed}");
            }
            first.extend(kinds(seed, 120).next());
        }
        assert_eq!(first.len(), 2, "the seed chooses which one comes first");
    }

    #[test]
    fn nothing_is_done_twice_at_a_time() {
        for seed in 0..20 {
            let length = Duration::from_mins(10);
            let mut until: BTreeMap<String, u64> = BTreeMap::new();
            for fault in plan(seed, length) {
                assert!(u128::from(fault.at + fault.lasts) < length.as_millis(), "it ends in time");
                if let Some((subject, _)) = fault.fault.subject() {
                    let until = until.entry(subject).or_default();
                    assert!(fault.at >= *until, "seed {seed}: {fault}");
                    *until = fault.at + fault.lasts;
                }
            }
        }
    }
}
