//! What is in memory between having been read and being settled: what may be published next, what waits for
//! another try, and what waits behind it. No I/O.
//!
//! An aggregate has at most one event under way, and its next one waits until that is settled, so that a nack, a
//! return or a lost connection never lets a later event through first. Its trouble is its own: other aggregates
//! go on. Any connection may publish any aggregate, so one that is away keeps none.
//!
//! An aggregate that is in memory and has nothing under way stands in one place, by its first event:
//!
//! | place | its first event |
//! |---|---|
//! | ready | was not tried yet |
//! | blocked | was not tried yet, its kind is in trouble, and so may everything be: one at a time finds out |
//! | apart | may end the channel, or have no answer: it goes over a channel of its own, on a connection with nothing else |
//! | retry | was not taken, and is tried again within the [budget](Budget) |

mod aggregate;
mod outcome;
mod places;
mod spill;

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    hash::{BuildHasher, RandomState},
    ops::Bound,
    sync::Arc,
    time::Instant,
};

use crate::{
    budget::Budget,
    event::Event,
    evidence::{Danger, Evidence, Failure, Kind, Stamp},
    publish::MAX_UNANSWERED,
    rules::{Policies, Unroutable},
    waiting::Waiter,
};

use aggregate::{Aggregate, Place};
pub use aggregate::{Item, Row, Trouble};
pub use outcome::{Done, Lost, pause};
use places::Retries;

/// Windows of a lane that are under way or ready to be: the lane does not idle while the relay reads.
pub const DEPTH: usize = 3;

/// Events that are under way apart, each on a channel of its own. Those without an answer take seconds.
pub const APART: usize = 64;
/// Their bytes, and one event more.
const APART_BYTES: usize = 4 * 1024 * 1024;

/// Over which connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// One that publishes many events together.
    Lane,
    /// The one on which each window has a channel of its own.
    Apart,
}

/// Events that are published together: at most one of each aggregate, and no two with the same id.
#[derive(Debug)]
pub struct Window {
    /// When it was handed out.
    pub published: Stamp,
    /// Over which connection.
    pub route: Route,
    /// The events.
    pub items: Vec<Item>,
}

impl Window {
    /// What its events take.
    pub fn bytes(&self) -> usize {
        self.items.iter().map(|item| item.event.size()).sum()
    }
}

/// What is under way apart.
#[derive(Clone, Copy, Debug, Default)]
struct UnderWayApart {
    windows: usize,
    bytes: usize,
    /// It may end the connection, so that nothing else may be on it.
    dangerous: bool,
}

/// The events in memory.
#[derive(Debug)]
pub struct Queue {
    lanes: usize,
    window: usize,
    policies: Policies,
    hasher: RandomState,
    aggregates: HashMap<u64, Aggregate>,
    /// What was put here is skipped when its place is another one by now.
    ready: VecDeque<u64>,
    apart: VecDeque<u64>,
    blocked: BTreeMap<Kind, VecDeque<u64>>,
    retries: Retries,
    /// Where the round over the blocked kinds stands.
    turn: Option<Kind>,
    /// Probes of what is blocked, and retries, take turns.
    probes_first: bool,
    /// So do first tries apart, and further ones.
    untried_first: bool,
    /// Aggregates whose first event is set aside once something that was handed out later is confirmed.
    guesses: BTreeMap<Stamp, Vec<u64>>,
    /// What is known of the broker.
    pub evidence: Evidence,
    budget: Budget,
    events: usize,
    bytes: usize,
    windows: usize,
    under_way_apart: UnderWayApart,
    /// An event would be set aside and may not, because too many are.
    crowded: bool,
    /// When events that have rows were first not taken.
    failed: HashMap<i64, Stamp>,
    /// Of those that are not in there, no later than this.
    forgotten: Stamp,
}

impl Queue {
    /// For `lanes` connections that publish up to `window` events together.
    pub fn new(lanes: usize, window: usize, policies: Policies, now: Instant) -> Self {
        Self {
            lanes,
            window,
            policies,
            hasher: RandomState::new(),
            aggregates: HashMap::new(),
            ready: VecDeque::new(),
            apart: VecDeque::new(),
            blocked: BTreeMap::new(),
            retries: Retries::default(),
            turn: None,
            probes_first: true,
            untried_first: true,
            guesses: BTreeMap::new(),
            evidence: Evidence::default(),
            budget: Budget::new(now),
            events: 0,
            bytes: 0,
            windows: 0,
            under_way_apart: UnderWayApart::default(),
            crowded: false,
            failed: HashMap::new(),
            forgotten: 0,
        }
    }

    /// Adds an event that was read, behind all of its aggregate that were.
    pub fn add(&mut self, event: Event) {
        self.insert(Item::new(event, Row::Outbox, 0));
    }

    /// Adds an event that has a row in `outbox.parked`: before all of its aggregate that are younger.
    pub fn add_row(&mut self, waiter: Waiter, row: Row, now: Instant) {
        let Waiter { event, tries, failure, age } = waiter;
        let first = self.failed.get(&event.position).copied().unwrap_or(self.forgotten);
        let mut item = Item::new(event, row, tries);
        item.trouble = failure.map(|failure| Trouble {
            failure,
            first,
            since: now.checked_sub(age).unwrap_or(now),
            retry_at: now,
            why: String::new(),
        });
        self.insert(item);
    }

    fn insert(&mut self, item: Item) {
        self.events += 1;
        self.bytes += item.event.size();
        let id = self.hasher.hash_one((&*item.event.aggregate_type, &*item.event.aggregate_id));
        self.aggregates.entry(id).or_default().insert(item);
        self.place(id);
    }

    /// How many events are in memory.
    pub fn events(&self) -> usize {
        self.events
    }

    /// About how many bytes they take.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many windows are under way.
    pub fn windows(&self) -> usize {
        self.windows
    }

    /// The positions of the events in memory that have a row.
    pub fn rows(&self) -> HashSet<i64> {
        let aggregates = self.aggregates.values();
        let items = aggregates.flat_map(|a| a.items.iter().chain(&a.under_way));
        items.filter(|item| item.row != Row::Outbox).map(|item| item.event.position).collect()
    }

    /// Whether an event would be set aside and may not, because too many are.
    pub fn is_crowded(&self) -> bool {
        self.crowded
    }

    /// How many retries the budget is open for.
    pub fn open(&mut self, now: Instant) -> usize {
        self.budget.open(now)
    }

    /// How many aggregates wait for another try.
    pub fn retries(&self) -> usize {
        self.retries.len()
    }

    /// Picks what a connection publishes next; none when there is nothing that may go out now.
    pub fn next(&mut self, route: Route, now: Instant) -> Option<Window> {
        let published = self.evidence.tick();
        let mut picked = Vec::new();
        match route {
            Route::Lane => self.pick(published, now, &mut picked),
            Route::Apart => self.pick_apart(published, now, &mut picked),
        }
        if picked.is_empty() {
            return None;
        }
        let window = Window { published, route, items: picked };
        self.windows += 1;
        if route == Route::Apart {
            let dangerous = window.items.iter().any(|item| self.danger(item) == Danger::Channel);
            let under_way = &mut self.under_way_apart;
            under_way.windows += 1;
            under_way.bytes += window.bytes();
            under_way.dangerous = dangerous;
        }
        Some(window)
    }

    /// When something may go out that may not now, unless something else happens before.
    pub fn wake_at(&self) -> Option<Instant> {
        let probe = (!self.evidence.flows() && !self.blocked.is_empty()).then(|| self.budget.next());
        let retry = self.retries.first().map(|at| at.max(self.budget.next()));
        probe.into_iter().chain(retry).min()
    }

    fn pick(&mut self, published: Stamp, now: Instant, picked: &mut Vec<Item>) {
        if self.evidence.flows() {
            self.unblock();
        }
        // What is there is shared by the lanes, so that all of them publish.
        let most = (self.ready.len() + self.retries.len()).div_ceil(self.lanes).clamp(1, self.window);
        let mut ids = HashSet::new();
        self.pick_tries(Danger::None, published, now, most, &mut ids, picked);
        let mut twins = Vec::new();
        while picked.len() < most
            && let Some(id) = self.ready.pop_front()
        {
            let Some((Place::Ready, first)) = self.first(id) else { continue };
            // A returned message is known by its id, and nothing in the schema keeps a writer from using one twice.
            if ids.contains(&first.event.id) {
                twins.push(id);
                continue;
            }
            let place = self.fitting(first);
            if place == Place::Ready {
                ids.insert(first.event.id);
                picked.extend(self.begin(id, published));
            } else {
                self.put(id, place);
            }
        }
        for id in twins.into_iter().rev() {
            self.ready.push_front(id);
        }
    }

    /// Picks one event that has a channel of its own. What may end the connection has that to itself, too, and is not
    /// kept waiting by what has no answer.
    fn pick_apart(&mut self, published: Stamp, now: Instant, picked: &mut Vec<Item>) {
        let UnderWayApart { windows, bytes, dangerous } = self.under_way_apart;
        if dangerous || windows >= APART || bytes >= APART_BYTES {
            return;
        }
        let mut ids = HashSet::new();
        while let Some(id) = self.apart.front().copied() {
            let Some((Place::Apart, first)) = self.first(id) else {
                self.apart.pop_front();
                continue;
            };
            let place = self.fitting(first);
            if place != Place::Apart {
                self.apart.pop_front();
                self.put(id, place);
                continue;
            }
            if self.danger(first) == Danger::Channel && windows > 0 {
                return;
            }
            break;
        }
        if windows > 0 && self.budget.next() <= now && self.is_due(Danger::Channel, now) {
            return;
        }
        // Who was tried already, and who was not, take turns.
        self.untried_first = !self.untried_first;
        for untried in [self.untried_first, !self.untried_first] {
            if !picked.is_empty() {
                break;
            }
            if untried {
                if let Some(id) = self.apart.pop_front() {
                    picked.extend(self.begin(id, published));
                }
            } else {
                if windows == 0 {
                    self.pick_tries(Danger::Channel, published, now, 1, &mut ids, picked);
                }
                if picked.is_empty() {
                    self.pick_tries(Danger::Silence, published, now, 1, &mut ids, picked);
                }
            }
        }
    }

    /// Retries that are due, and probes of what is blocked, in turn of the kinds and within the budget.
    fn pick_tries(
        &mut self,
        danger: Danger,
        published: Stamp,
        now: Instant,
        most: usize,
        ids: &mut HashSet<uuid::Uuid>,
        picked: &mut Vec<Item>,
    ) {
        while picked.len() < most {
            self.probes_first = !self.probes_first;
            let id = if self.probes_first {
                self.probe(danger, now).or_else(|| self.retry(danger, now))
            } else {
                self.retry(danger, now).or_else(|| self.probe(danger, now))
            };
            let Some(id) = id else { return };
            let Some((place, first)) = self.first(id) else { continue };
            if ids.insert(first.event.id) {
                let behind = self.chain(id, ids);
                picked.extend(self.begin(id, published));
                for _ in 0..behind {
                    picked.extend(self.begin(id, published).map(|item| Item { chained: true, ..item }));
                }
                if behind > 0
                    && let Some(first) = picked.iter_mut().rev().nth(behind)
                {
                    first.chained = true;
                }
            } else {
                self.put(id, place);
                return;
            }
        }
    }

    /// How many events behind the first of an aggregate go out with it: when no queue takes the first events, and nothing
    /// was taken since, the next one of another kind may be the only one that tells that somebody listens. They are
    /// published in their order, so none overtakes another that is taken.
    fn chain(&self, id: u64, ids: &mut HashSet<uuid::Uuid>) -> usize {
        let Some(aggregate) = self.aggregates.get(&id) else { return 0 };
        let unroutable = |item: &Item| {
            self.evidence.is_unroutable(&item.event)
                && self.policies.unroutable.of(&item.event.type_) == Unroutable::Park
        };
        let tried = |item: &Item| item.tries > 1;
        let alone = |item: &Item| {
            item.trouble.as_ref().is_some_and(|trouble| !self.evidence.taken_since(trouble.first))
        };
        if !aggregate.items.front().is_some_and(|item| tried(item) && alone(item) && unroutable(item)) {
            return 0;
        }
        let rest = aggregate.items.iter().skip(1).take(MAX_UNANSWERED - 1);
        let Some(last) = rest.clone().position(|item| !unroutable(item)).map(|n| n + 1) else { return 0 };
        let other = &aggregate.items[last];
        let known = self.evidence.is_blocked(&other.event) || self.danger(other) > Danger::None;
        let new: HashSet<uuid::Uuid> = rest.take(last).map(|item| item.event.id).collect();
        if known || new.len() < last || !new.is_disjoint(ids) {
            return 0;
        }
        ids.extend(new);
        last
    }

    /// Whether there is a retry or a probe that is due, with this danger.
    fn is_due(&self, danger: Danger, now: Instant) -> bool {
        let retries = self.retries.due(now);
        let probes = self.blocked.values().filter_map(VecDeque::front).copied();
        let probes = probes.filter(|_| !self.evidence.flows());
        retries.chain(probes).any(|id| {
            let first = self.first(id).filter(|(place, _)| matches!(place, Place::Retry | Place::Blocked));
            first.is_some_and(|(_, first)| self.danger(first) == danger)
        })
    }

    /// The next retry, in turn of the kinds. The second try of an event that no queue took makes no copy anywhere
    /// and decides whether it is set aside, so it is no part of the budget.
    fn retry(&mut self, danger: Danger, now: Instant) -> Option<u64> {
        let (aggregates, evidence, budget) = (&self.aggregates, &self.evidence, &mut self.budget);
        self.retries.next(now, |id| {
            let Some(first) = aggregates.get(&id).and_then(|a| a.items.front()) else { return false };
            let decides = first.trouble.as_ref().is_some_and(|trouble| {
                trouble.failure == Failure::Unroutable && evidence.taken_since(trouble.first)
            });
            first.danger().max(evidence.danger(&first.event)) == danger
                && (decides || budget.take(first.event.size(), now))
        })
    }

    /// One event of a kind that is blocked.
    fn probe(&mut self, danger: Danger, now: Instant) -> Option<u64> {
        if self.evidence.flows() {
            return None;
        }
        for _ in 0..self.blocked.len() {
            let after = self.turn.as_ref().and_then(|turn| {
                let after = (Bound::Excluded(turn), Bound::Unbounded);
                self.blocked.range::<Kind, _>(after).next()
            });
            let kind = after.or_else(|| self.blocked.iter().next()).map(|(kind, _)| kind.clone())?;
            self.turn = Some(kind.clone());
            while let Some(id) = self.blocked.get_mut(&kind).and_then(VecDeque::pop_front) {
                let Some((Place::Blocked, first)) = self.first(id) else { continue };
                let (fits, size) = (self.danger(first) == danger, first.event.size());
                if fits && self.budget.take(size, now) {
                    return Some(id);
                }
                self.blocked.entry(kind.clone()).or_default().push_front(id);
                break;
            }
            if self.blocked.get(&kind).is_some_and(VecDeque::is_empty) {
                self.blocked.remove(&kind);
            }
        }
        None
    }

    fn unblock(&mut self) {
        for (_, ids) in std::mem::take(&mut self.blocked) {
            for id in ids {
                if matches!(self.first(id), Some((Place::Blocked, _))) {
                    self.put(id, Place::Ready);
                }
            }
        }
    }

    /// Takes the first event of an aggregate that has nothing under way.
    fn begin(&mut self, id: u64, published: Stamp) -> Option<Item> {
        let aggregate = self.aggregates.get_mut(&id)?;
        let mut item = aggregate.items.pop_front()?;
        let evidence = &self.evidence;
        item.published = published;
        item.decides = item.trouble.as_ref().is_some_and(|trouble| evidence.taken_since(trouble.first));
        item.guessed = item.trouble.is_none() && evidence.is_proven(&item.event);
        item.aggregate = id;
        aggregate.place = Place::UnderWay;
        aggregate.retry = None;
        aggregate.under_way.push(item.clone());
        Some(item)
    }
}

impl Item {
    fn new(event: Event, row: Row, tries: u32) -> Self {
        Self {
            event: Arc::new(event),
            row,
            tries,
            trouble: None,
            losses: 0,
            published: 0,
            decides: false,
            guessed: false,
            chained: false,
            aggregate: 0,
        }
    }
}
