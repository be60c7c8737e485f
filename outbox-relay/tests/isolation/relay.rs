//! A relay without a database and a broker: what `lead` does, with models of both.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    time::{Duration, Instant},
};

use chrono::Utc;
use outbox_relay::{
    event::Event,
    evidence::PublishFailure,
    publish::{Fate, MAX_UNANSWERED, Proof},
    queue::{DEPTH, Item, Lost, Outcome, QUARANTINE_WINDOWS, Queue, Route, StoredIn, Window, pause},
    rules::{Policies, Rules},
    waiting::{Spilled, StoredRetry},
};
use uuid::Uuid;

use super::broker::Broker;

pub(crate) const LANES: usize = 3;
const WINDOW: usize = 8;

/// A row of `outbox.parked`.
#[derive(Clone, Debug)]
struct Stored {
    row: StoredIn,
    tries: u32,
    failure: Option<PublishFailure>,
    /// Of what waits, of the first of its aggregate; of what is set aside, unless by hand only.
    due: Option<Instant>,
}

/// A window at a lane: not published yet, or with what the broker did.
struct Under {
    window: Window,
    fates: Option<(Vec<Option<Fate>>, bool)>,
}

pub(crate) struct Relay {
    pub(crate) broker: Broker,
    queue: Queue,
    begin: Instant,
    now: Instant,
    /// Of how many events a lane finds out elsewhere what becomes of them.
    sample: usize,
    /// How many channels the broker ended.
    closed: usize,
    memory: usize,
    lanes: Vec<VecDeque<Under>>,
    stored: BTreeMap<i64, Event>,
    read: i64,
    rows: BTreeMap<i64, Stored>,
    settled: BTreeSet<i64>,
    /// Confirmed, by aggregate.
    taken: BTreeSet<i64>,
    retries_in_vain: u64,
    retries_taken: u64,
    pub(crate) parked_ever: u64,
    /// How many windows of lanes stood still over silent events.
    pub(crate) stood_still: usize,
}

fn retry(event: Event, tries: u32, failure: Option<PublishFailure>) -> StoredRetry {
    StoredRetry { event, tries, failure, age: Duration::ZERO }
}

impl Relay {
    pub(crate) fn new(broker: Broker, memory: usize) -> Self {
        let now = Instant::now();
        let policies =
            Policies { unroutable: Rules::default(), nacked: Rules::default(), exchange: "exchange".into() };
        Self {
            broker,
            queue: Queue::new(LANES, WINDOW, policies, now),
            begin: now,
            now,
            sample: 0,
            closed: 0,
            memory,
            lanes: (0..=LANES).map(|_| VecDeque::new()).collect(),
            stored: BTreeMap::new(),
            read: 0,
            rows: BTreeMap::new(),
            settled: BTreeSet::new(),
            taken: BTreeSet::new(),
            retries_in_vain: 0,
            retries_taken: 0,
            parked_ever: 0,
            stood_still: 0,
        }
    }

    pub(crate) fn append(&mut self, events: &[(u8, u8, bool)]) {
        for (aggregate, type_, large) in events {
            let position = self.stored.last_key_value().map_or(1, |(last, _)| last + 1);
            let event = Event {
                position,
                // Few, so that some are the same.
                id: Uuid::from_u128(u128::from(position.unsigned_abs() % 50)),
                aggregate_type: "thing".to_owned(),
                aggregate_id: aggregate.to_string(),
                version: position,
                type_: type_.to_string(),
                payload: "x".repeat(if *large { 20_000 } else { 2 }).into(),
                headers: None,
                created_at: Utc::now(),
                previous_id: None,
            };
            self.stored.insert(position, event);
        }
    }

    pub(crate) fn pass(&mut self, time: Duration) {
        self.now += time;
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.now - self.begin
    }

    /// As the loop of a leadership.
    pub(crate) fn round(&mut self) {
        self.hand_out();
        let most = (self.memory / 16).clamp(1, 500);
        let spilled = self.queue.spill(most, self.now, |_| true);
        self.spilled(spilled);
        if self.queue.events() * 2 <= self.memory {
            self.look_aside();
            let next: Vec<Event> =
                self.stored.range(self.read + 1..).take(20).map(|(_, e)| e.clone()).collect();
            for event in next {
                self.read = event.position;
                if self.waits(&event.aggregate_id) {
                    self.rows.insert(
                        event.position,
                        Stored { row: StoredIn::Waiting, tries: 0, failure: None, due: None },
                    );
                    self.settled.insert(event.position);
                } else {
                    self.queue.add(event);
                }
            }
        }
        self.hand_out();
        self.assert_within_budget();
    }

    fn waits(&self, aggregate: &str) -> bool {
        self.first_waiting(aggregate).is_some()
    }

    fn first_waiting(&self, aggregate: &str) -> Option<i64> {
        let waiting = self.rows.iter().filter(|(_, row)| row.row == StoredIn::Waiting);
        waiting.map(|(position, _)| *position).find(|p| self.stored[p].aggregate_id == aggregate)
    }

    fn promote(&mut self, aggregate: &str) {
        if let Some(first) = self.first_waiting(aggregate) {
            self.rows.get_mut(&first).unwrap().due.get_or_insert(self.now);
        }
    }

    fn spilled(&mut self, spilled: Vec<Spilled>) {
        for Spilled { position, reason, tries, retry, .. } in spilled {
            let due = retry.map(|pause| self.now + pause);
            let row = Stored { row: StoredIn::Waiting, tries, failure: PublishFailure::stored(reason), due };
            self.rows.insert(position, row);
            assert!(self.settled.insert(position));
        }
    }

    fn look_aside(&mut self) {
        let in_memory = self.queue.rows();
        if in_memory.len() >= 100 {
            return;
        }
        let flows = self.queue.evidence.flows();
        let mut tried = self.queue.open(self.now).saturating_sub(self.queue.retries());
        if !flows {
            tried = tried.min(1);
        }
        let mut untried = if flows { 20 } else { 1 };
        let due: Vec<(i64, Stored)> = self
            .rows
            .iter()
            .filter(|(position, row)| {
                row.due.is_some_and(|due| due <= self.now) && !in_memory.contains(position)
            })
            .map(|(position, row)| (*position, row.clone()))
            .collect();
        for (position, stored) in due {
            let count = if stored.tries > 0 { &mut tried } else { &mut untried };
            if *count == 0 {
                continue;
            }
            *count -= 1;
            let event = self.stored[&position].clone();
            let aggregate = event.aggregate_id.clone();
            let behind: Vec<i64> = self
                .rows
                .range(position + 1..)
                .filter(|(p, row)| row.row == StoredIn::Waiting && self.stored[p].aggregate_id == aggregate)
                .map(|(p, _)| *p)
                .take(if stored.row == StoredIn::Waiting { 2 } else { 0 })
                .collect();
            self.queue.add_stored(retry(event, stored.tries, stored.failure), stored.row, self.now);
            for p in behind {
                self.queue.add_stored(retry(self.stored[&p].clone(), 0, None), StoredIn::Waiting, self.now);
            }
        }
    }

    fn hand_out(&mut self) {
        for lane in 0..=LANES {
            while lane == LANES || self.lanes[lane].len() < DEPTH {
                let route = if lane == LANES { Route::Quarantine } else { Route::Lane };
                let Some(window) = self.queue.next(route, self.now) else { break };
                assert_eq!(window.route, route);
                assert!(self.lanes[LANES].len() < QUARANTINE_WINDOWS);
                self.assert_window(&window);
                self.lanes[lane].push_back(Under { window, fates: None });
            }
        }
    }

    fn assert_window(&self, window: &Window) {
        assert!((1..WINDOW + MAX_UNANSWERED).contains(&window.items.len()));
        let mut ids: Vec<Uuid> = window.items.iter().map(|item| item.event.id).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), window.items.len(), "an id twice in a window");
        let under_way: Vec<&Item> =
            self.lanes.iter().flatten().flat_map(|under| &under.window.items).collect();
        for item in &window.items {
            let (position, aggregate) = (item.event.position, &item.event.aggregate_id);
            let mut same = window.items.iter().chain(under_way.iter().copied());
            assert!(
                same.all(|other| other.event.position == position
                    || other.event.aggregate_id != *aggregate
                    || item.is_chained()),
                "two of an aggregate under way"
            );
            if !item.is_chained() {
                self.assert_turn(&item.event);
            }
        }
        let mut last = HashMap::new();
        for item in &window.items {
            let before = last.insert(&item.event.aggregate_id, item.event.position);
            assert!(before.is_none_or(|before| before < item.event.position), "in their order");
        }
    }

    /// Every event of the aggregate before this one was taken, or set aside.
    fn assert_turn(&self, event: &Event) {
        for (before, other) in self.stored.range(..event.position) {
            let aside = self.rows.get(before).is_some_and(|row| row.row == StoredIn::Parked);
            assert!(
                other.aggregate_id != event.aggregate_id || self.taken.contains(before) || aside,
                "{} overtakes {before}",
                event.position
            );
        }
    }

    pub(crate) fn publish(&mut self, lane: usize) {
        let Some(under) = self.lanes[lane].iter_mut().find(|under| under.fates.is_none()) else { return };
        let (mut fates, mut ended, mut still) = (Vec::new(), false, false);
        for item in &under.window.items {
            if ended {
                fates.push(None);
                continue;
            }
            let fate = self.broker.take(&item.event).ok();
            ended = fate.is_none();
            still |= fate == Some(Fate::Silent);
            fates.push(fate);
        }
        self.closed += usize::from(ended);
        if still && under.window.route == Route::Lane {
            // What came behind the silent ones has no answer either. Asked elsewhere, the broker answered some of it, of
            // each aggregate the first.
            ended = false;
            self.stood_still += 1;
            let silent = fates.iter().position(|fate| *fate == Some(Fate::Silent)).unwrap();
            let mut asked = HashSet::new();
            for (n, fate) in fates.iter_mut().enumerate().skip(silent) {
                if !asked.insert(&under.window.items[n].event.aggregate_id)
                    || n > silent + self.sample && *fate != Some(Fate::Confirmed)
                    || n > silent && self.sample == 0
                {
                    *fate = None;
                }
            }
            self.sample = (self.sample + 1) % 3;
        } else if ended && self.closed.is_multiple_of(2) {
            // What was confirmed before may be known, or not.
            fates.fill(None);
        }
        under.fates = Some((fates, ended));
    }

    pub(crate) fn answer(&mut self, lane: usize) {
        if self.lanes[lane].front().is_none_or(|under| under.fates.is_none()) {
            return;
        }
        let Under { window, fates } = self.lanes[lane].pop_front().unwrap();
        let (fates, ended) = fates.unwrap();
        let (route, bytes) = (window.route, window.bytes());
        let (mut known, mut unknown) = (Vec::new(), Vec::new());
        for (item, fate) in window.items.into_iter().zip(fates) {
            match fate {
                Some(fate) => known.push((item, fate)),
                None => unknown.push(item),
            }
        }
        if ended && unknown.len() == 1 {
            known.push((
                unknown.pop().unwrap(),
                Fate::Refused { why: "refused".to_owned(), proof: Proof::Reason },
            ));
        }
        self.queue.lost(unknown, if ended { Lost::Suspect } else { Lost::Unbegun });
        self.queue.ended(route, bytes);
        for (item, fate) in known.iter().filter(|(item, _)| item.tries > 0) {
            match fate {
                Fate::Confirmed => self.retries_taken += 1,
                Fate::Nacked => self.retries_in_vain += 1,
                _ => {}
            }
            assert!(item.tries < 1_000_000);
        }
        let done = self.queue.settle(known, 1_000, self.now);
        self.store(done);
    }

    fn store(&mut self, done: Outcome) {
        assert!(done.dropped.is_empty());
        for (item, failure, _) in done.park {
            let position = item.event.position;
            self.settle(&item);
            self.parked_ever += 1;
            let due = (failure != PublishFailure::Refused).then(|| self.now + Duration::from_secs(1));
            let row = Stored { row: StoredIn::Parked, tries: item.tries, failure: Some(failure), due };
            self.rows.insert(position, row);
            self.promote(&item.event.aggregate_id);
        }
        for item in done.confirmed {
            let position = item.event.position;
            if item.stored_in != StoredIn::Parked {
                self.assert_turn(&item.event);
            }
            self.taken.insert(position);
            self.settle(&item);
            self.rows.remove(&position);
            self.promote(&item.event.aggregate_id);
        }
        for (item, failure, _) in done.postpone {
            let position = item.event.position;
            let row = self.rows.get_mut(&position).unwrap();
            row.tries += 1;
            row.failure = Some(failure);
            row.due = match (row.row, failure) {
                (StoredIn::Parked, PublishFailure::Refused) => None,
                _ => Some(self.now + pause(failure, row.tries, position)),
            };
        }
    }

    fn settle(&mut self, item: &Item) {
        if item.stored_in == StoredIn::Outbox {
            assert!(self.settled.insert(item.event.position), "settled twice");
        }
    }

    pub(crate) fn lose(&mut self, lane: usize) {
        for Under { window, fates } in std::mem::take(&mut self.lanes[lane]) {
            if fates.is_some() {
                let (route, bytes) = (window.route, window.bytes());
                self.queue.lost(window.items, Lost::Connection);
                self.queue.ended(route, bytes);
            } else {
                self.queue.back(window);
            }
        }
    }

    /// An operator closes all channels: each lane hears of its oldest window that the broker failed internally.
    pub(crate) fn close_channels(&mut self) {
        for lane in 0..=LANES {
            let Some(Under { window, .. }) = self.lanes[lane].pop_front() else { continue };
            let (route, bytes, mut items) = (window.route, window.bytes(), window.items);
            let internal = || Fate::Refused { why: "INTERNAL_ERROR".to_owned(), proof: Proof::Internal };
            let alone = if items.len() == 1 { items.pop() } else { None };
            self.queue.lost(items, Lost::Suspect);
            self.queue.ended(route, bytes);
            let known = alone.into_iter().map(|item| (item, internal())).collect();
            let done = self.queue.settle(known, 1_000, self.now);
            self.store(done);
        }
    }

    /// Rounds in which everything works that can, until `done`.
    pub(crate) fn rounds(&mut self, count: usize, done: impl Fn(&Self) -> bool) {
        for _ in 0..count {
            if done(self) {
                return;
            }
            self.pass(Duration::from_secs(1));
            for _ in 0..4 {
                self.round();
                self.work();
            }
        }
    }

    /// Everything that was handed out is published and answered.
    pub(crate) fn work(&mut self) {
        for lane in 0..=LANES {
            for _ in 0..DEPTH {
                self.publish(lane);
            }
            for _ in 0..DEPTH {
                self.answer(lane);
            }
        }
    }

    /// Whether several events of an aggregate are under way.
    pub(crate) fn together(&self) -> bool {
        self.lanes.iter().flatten().any(|under| under.window.items.iter().any(Item::is_chained))
    }

    fn assert_within_budget(&self) {
        let seconds = self.elapsed().as_secs();
        let most = 10 * seconds + 20 + 2 * self.retries_taken;
        assert!(self.retries_in_vain <= most, "{} retries in {seconds} s", self.retries_in_vain);
    }

    /// Whether all is taken of the aggregates of which the broker takes everything.
    pub(crate) fn healthy_is_done(&self) -> bool {
        let mut healthy: HashMap<&str, bool> = HashMap::new();
        for (position, event) in &self.stored {
            let takes =
                matches!(self.broker.fate(event), Ok(Fate::Confirmed)) || self.taken.contains(position);
            *healthy.entry(&event.aggregate_id).or_insert(true) &= takes;
        }
        self.stored.iter().all(|(position, event)| {
            let aside = self.rows.get(position).is_some_and(|row| row.row == StoredIn::Parked);
            !healthy[&*event.aggregate_id] || self.taken.contains(position) || aside
        })
    }

    /// Whether everything is taken, but for what was refused and is tried again by hand only.
    pub(crate) fn is_done(&self) -> bool {
        self.open().is_empty()
    }

    /// What is not taken.
    pub(crate) fn open(&self) -> Vec<(i64, String)> {
        let left = self.stored.keys().filter(|position| {
            let refused =
                self.rows.get(position).is_some_and(|row| row.row == StoredIn::Parked && row.due.is_none());
            !self.taken.contains(position) && !refused
        });
        left.map(|p| (*p, format!("{:?}", self.rows.get(p)))).take(20).collect()
    }

    /// Every position up to here is settled.
    pub(crate) fn settled_up_to(&self) -> i64 {
        (1..=i64::MAX).find(|position| !self.settled.contains(position)).unwrap() - 1
    }
}
