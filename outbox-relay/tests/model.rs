//! The positions against a model of the server: transactions that take positions under the shared lock,
//! commit, roll back, roll back to savepoints, are prepared and fall asleep, in any order and between
//! any two steps of the relay, which restarts from what it stored. Nothing is lost, nothing of an
//! aggregate is out of order on first delivery, nothing is settled that may still come.

#![expect(clippy::unwrap_used, reason = "a panic is the report of a test")]

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::{Duration, Instant},
};

use chrono::{DateTime, TimeDelta, Utc};
use outbox_relay::position::{Holder, Positions, SECOND_LOOK, Sample, Vxid};
use proptest::prelude::*;

#[derive(Clone, Copy, Debug)]
enum Step {
    /// A transaction locks an aggregate, if it is free.
    Begin(u8),
    /// One of the transactions appends an event.
    Append(u8),
    Savepoint(u8),
    RollbackToSavepoint(u8),
    Commit(u8),
    Rollback(u8),
    Prepare(u8),
    /// A busy transaction becomes idle, or an idle one busy.
    Sleep(u8),
    /// The relay samples the sequence's mark and looks at the lock's holders.
    Look,
    /// The relay reads, at most so many events.
    Read(u8),
    /// The oldest or the newest event in flight is settled.
    Settle(bool),
    Save,
    /// The relay restarts from what it saved.
    Restart,
}

#[derive(Debug)]
struct Transaction {
    vxid: Vxid,
    aggregate: u8,
    /// Its events: position and version.
    events: Vec<(i64, i64)>,
    savepoint: Option<usize>,
    prepared: bool,
    began: i64,
    asleep_since: Option<i64>,
}

/// What PostgreSQL does.
#[derive(Debug, Default)]
struct Server {
    clock: i64,
    last_value: i64,
    last_xid: u32,
    open: Vec<Transaction>,
    versions: HashMap<u8, i64>,
    /// Committed events: aggregate and version, by position.
    visible: BTreeMap<i64, (u8, i64)>,
}

fn time(clock: i64) -> DateTime<Utc> {
    DateTime::UNIX_EPOCH + TimeDelta::milliseconds(clock)
}

impl Server {
    fn tick(&mut self) -> i64 {
        self.clock += 1;
        self.clock
    }

    fn nth(&mut self, n: u8) -> Option<usize> {
        (!self.open.is_empty()).then(|| usize::from(n) % self.open.len())
    }

    fn begin(&mut self, aggregate: u8) {
        if self.open.iter().any(|t| t.aggregate == aggregate) {
            return; // the row lock makes it wait
        }
        self.last_xid += 1;
        let began = self.tick();
        let vxid = Vxid(3, self.last_xid);
        self.open.push(Transaction {
            vxid,
            aggregate,
            events: vec![],
            savepoint: None,
            prepared: false,
            began,
            asleep_since: None,
        });
    }

    /// A statement of a transaction's: never of a prepared one, and it wakes a sleeper.
    fn busy(&mut self, n: u8) -> Option<&mut Transaction> {
        let n = self.nth(n)?;
        self.tick();
        let transaction = &mut self.open[n];
        (!transaction.prepared).then(|| {
            transaction.asleep_since = None;
            transaction
        })
    }

    fn append(&mut self, n: u8) {
        let position = self.last_value + 1;
        let versions = self.versions.clone();
        let Some(transaction) = self.busy(n) else { return };
        let last = transaction.events.last().map(|e| e.1);
        let version = last.or(versions.get(&transaction.aggregate).copied()).unwrap_or(0) + 1;
        transaction.events.push((position, version));
        self.last_value = position;
    }

    fn finish(&mut self, n: u8, commit: bool) {
        let Some(n) = self.nth(n) else { return };
        self.tick();
        let transaction = self.open.swap_remove(n);
        if commit {
            for (position, version) in transaction.events {
                self.versions.insert(transaction.aggregate, version);
                self.visible.insert(position, (transaction.aggregate, version));
            }
        }
    }

    fn prepare(&mut self, n: u8) {
        self.last_xid += 1;
        let (vxid, now) = (Vxid(-1, self.last_xid), self.clock + 1);
        if let Some(transaction) = self.busy(n) {
            transaction.prepared = true;
            transaction.vxid = vxid;
            transaction.asleep_since = Some(now);
        }
    }

    fn holders(&self) -> Vec<Holder> {
        // A savepoint that is rolled back gives back a lock that was taken after it.
        let holding = self.open.iter().filter(|t| !t.events.is_empty());
        let holder = |t: &Transaction| Holder {
            vxid: t.vxid,
            prepared: t.prepared,
            asleep_since: t.asleep_since.map(time),
            began: (!t.prepared).then(|| time(t.began)),
        };
        holding.map(holder).collect()
    }
}

/// What the relay does, with what it remembers and what it stored.
struct Relay {
    positions: Positions,
    in_flight: BTreeSet<i64>,
    stored: (i64, Vec<(i64, i64)>),
    settled: BTreeSet<i64>,
    delivered: Vec<(u8, i64)>,
    most_gaps: usize,
    now: Instant,
}

impl Relay {
    fn look(&mut self, server: &mut Server) {
        let (before, last_value) = (server.tick(), server.last_value);
        let after = server.tick();
        self.positions.sample(Sample { before: time(before), last_value, after: time(after) });
        self.positions.look(&server.holders());
    }

    fn read(&mut self, server: &Server, limit: usize) -> usize {
        let (from, to) = self.positions.missing(self.now);
        let high = self.positions.high();
        let asked = |p: i64| p > high || from.iter().zip(&to).any(|(&from, &to)| (from..=to).contains(&p));
        let rows: Vec<i64> = server.visible.keys().copied().filter(|&p| asked(p)).collect();
        let found = &rows[..rows.len().min(limit)];
        let covered = if found.len() < rows.len() { found.last().map_or(high, |&p| p) } else { i64::MAX };
        let taken = self.positions.take(found.iter().copied(), covered, self.now);
        assert!(taken.late.is_empty(), "given up too early: {:?}", taken.late);
        for position in &taken.fresh {
            self.in_flight.insert(*position);
            self.delivered.push(server.visible[position]);
        }
        self.most_gaps = self.most_gaps.max(self.positions.gaps());
        taken.fresh.len()
    }

    fn settle(&mut self, oldest: bool) {
        let next = if oldest { self.in_flight.pop_first() } else { self.in_flight.pop_last() };
        if let Some(position) = next {
            self.settled.insert(position);
            self.positions.settle(position);
        }
    }

    /// Stores, and checks what a crash right now would lose: nothing that is or may become visible.
    fn save(&mut self, server: &Server, cap: usize) {
        let (high, open) = self.positions.open(cap);
        let may_come = server.open.iter().flat_map(|t| t.events.iter().map(|e| e.0));
        let unsettled = server.visible.keys().copied().filter(|p| !self.settled.contains(p));
        for position in may_come.chain(unsettled) {
            let kept = position > high || open.iter().any(|&(from, to)| (from..=to).contains(&position));
            assert!(kept, "position {position} is forgotten by high {high}, open {open:?}");
            assert!(position > self.positions.low_water(), "low water is above {position}");
        }
        self.stored = (high, open);
    }

    fn restart(&mut self) {
        self.positions = Positions::restore(self.stored.0, self.stored.1.iter().copied());
        self.in_flight.clear();
    }
}

fn step() -> impl Strategy<Value = Step> {
    let n = 0..8_u8;
    prop_oneof![
        3 => n.clone().prop_map(Step::Begin),
        6 => n.clone().prop_map(Step::Append),
        1 => n.clone().prop_map(Step::Savepoint),
        1 => n.clone().prop_map(Step::RollbackToSavepoint),
        3 => n.clone().prop_map(Step::Commit),
        2 => n.clone().prop_map(Step::Rollback),
        1 => n.clone().prop_map(Step::Prepare),
        2 => n.clone().prop_map(Step::Sleep),
        4 => Just(Step::Look),
        5 => (1..6_u8).prop_map(Step::Read),
        4 => any::<bool>().prop_map(Step::Settle),
        2 => Just(Step::Save),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 800, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn nothing_is_lost_overtaken_or_settled_too_early(steps in prop::collection::vec(step(), 1..250), cap in 1_usize..6) {
        let mut server = Server::default();
        let mut relay = relay();
        for step in steps {
            match step {
                Step::Begin(aggregate) => server.begin(aggregate),
                Step::Append(n) => server.append(n),
                Step::Savepoint(n) => {
                    if let Some(t) = server.busy(n) { t.savepoint = Some(t.events.len()); }
                }
                Step::RollbackToSavepoint(n) => {
                    if let Some(t) = server.busy(n) && let Some(savepoint) = t.savepoint {
                        t.events.truncate(savepoint);
                    }
                }
                Step::Commit(n) => server.finish(n, true),
                Step::Rollback(n) => server.finish(n, false),
                Step::Prepare(n) => server.prepare(n),
                Step::Sleep(n) => {
                    let now = server.clock + 1;
                    if let Some(t) = server.busy(n) { t.asleep_since = Some(now); }
                }
                Step::Look => relay.look(&mut server),
                Step::Read(limit) => { relay.read(&server, limit.into()); }
                Step::Settle(oldest) => relay.settle(oldest),
                Step::Save => relay.save(&server, cap),
                Step::Restart => relay.restart(),
            }
        }
        // Everybody who is still at work gives up; the relay catches up.
        while !server.open.is_empty() {
            server.finish(0, false);
        }
        for _ in 0..2 {
            relay.look(&mut server);
            while relay.read(&server, 5) > 0 {}
            while !relay.in_flight.is_empty() { relay.settle(true); }
        }
        relay.now += SECOND_LOOK + Duration::from_secs(1);
        relay.read(&server, usize::MAX);
        relay.save(&server, cap);

        prop_assert_eq!(&relay.settled, &server.visible.keys().copied().collect::<BTreeSet<_>>());
        prop_assert_eq!(relay.positions.gaps(), 0);
        prop_assert_eq!(relay.positions.low_water(), relay.positions.high());
        let mut first: HashMap<u8, i64> = HashMap::new();
        for (aggregate, version) in relay.delivered {
            let last = first.entry(aggregate).or_default();
            prop_assert!(version <= *last + 1, "aggregate {} jumped from {} to {}", aggregate, last, version);
            *last = version.max(*last);
        }
    }
}

fn relay() -> Relay {
    Relay {
        positions: Positions::restore(0, []),
        in_flight: BTreeSet::new(),
        stored: (0, vec![]),
        settled: BTreeSet::new(),
        delivered: vec![],
        most_gaps: 0,
        now: Instant::now(),
    }
}

/// A transaction of the model that appends one event and ends.
fn append_and_finish(server: &mut Server, aggregate: u8, commit: bool) {
    let n = u8::try_from(server.open.len()).unwrap();
    server.begin(aggregate);
    server.append(n);
    server.finish(n, commit);
}

/// One appender that went idle must not become a suspect of every rollback after it.
#[test]
fn a_sleeper_is_no_suspect_of_what_came_after_it() {
    let (mut server, mut relay) = (Server::default(), relay());
    server.begin(1);
    server.append(0);
    server.open[0].asleep_since = Some(server.tick());
    for _ in 0..100 {
        relay.look(&mut server);
        append_and_finish(&mut server, 2, false);
        append_and_finish(&mut server, 3, true);
        relay.read(&server, 10);
    }
    assert!(relay.most_gaps <= 3, "{} gaps are open", relay.most_gaps);
    server.finish(0, true);
    assert_eq!(relay.read(&server, 10), 1);
}

/// Nor may one that is busy all the time be a suspect of what was there before it began.
#[test]
fn a_latecomer_is_no_suspect_of_what_was_there_before_it() {
    let (mut server, mut relay) = (Server::default(), relay());
    for _ in 0..10 {
        append_and_finish(&mut server, 2, false);
        append_and_finish(&mut server, 3, true);
    }
    relay.look(&mut server);
    server.begin(1);
    server.append(0);
    relay.read(&server, 1_000);
    assert_eq!(relay.positions.gaps(), 10);
    relay.look(&mut server);
    relay.read(&server, 1_000);
    assert_eq!(relay.positions.gaps(), 0);
}

/// A prepared transaction keeps its lock under another id, and its suspicion with it.
#[test]
fn being_prepared_does_not_clear_a_suspect() {
    let (mut server, mut relay) = (Server::default(), relay());
    server.begin(1);
    server.append(0);
    append_and_finish(&mut server, 2, true);
    relay.read(&server, 10);
    relay.look(&mut server);
    server.prepare(0);
    for _ in 0..3 {
        relay.look(&mut server);
        relay.read(&server, 10);
    }
    server.finish(0, true);
    assert_eq!(relay.read(&server, 10), 1);
    assert_eq!(relay.positions.gaps(), 0);
}
