//! What is in memory between having been read and being settled: what may be published next, what waits for
//! another try, and what waits behind it. No I/O.
//!
//! An aggregate has at most one event under way, and its next one waits until that is settled, so that a nack, a
//! return or a lost connection never lets a later event through first. To find out whether any queue takes anything,
//! a few events of one aggregate may go out together, in their order (`chain` in `pick.rs`). Its trouble is its own:
//! other aggregates go on. Any connection may publish any aggregate, so one that is away keeps none.
//!
//! An aggregate that is in memory and has nothing under way has one state, by its first event:
//!
//! | state | its first event |
//! |---|---|
//! | ready | was not tried yet |
//! | blocked | was not tried yet, its kind is in trouble, and so may everything be: one at a time finds out |
//! | quarantine | may end the channel, or have no answer: it goes over a channel of its own, on a connection with nothing else |
//! | retry | was not taken, and is tried again within the [budget](Budget) |

mod aggregate;
mod outcome;
mod pick;
mod schedule;
mod spill;

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    hash::{BuildHasher, BuildHasherDefault, DefaultHasher},
    sync::Arc,
    time::Instant,
};

use crate::{
    budget::Budget,
    event::Event,
    evidence::{Danger, EventKind, Evidence, Stamp},
    rules::Policies,
    waiting::StoredRetry,
};

use aggregate::{Aggregate, AggregateState};
pub use aggregate::{Item, StoredIn, Trouble};
pub use outcome::{Lost, Outcome, pause};
use schedule::Retries;

/// Windows of a lane that are under way or ready to be: the lane does not idle while the relay reads.
pub const DEPTH: usize = 3;

/// Events that are under way apart, each on a channel of its own. Those without an answer take seconds.
pub const QUARANTINE_WINDOWS: usize = 64;
/// Their bytes, and one event more.
const QUARANTINE_BYTES: usize = 4 * 1024 * 1024;

/// Over which connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// One that publishes many events together.
    Lane,
    /// The one on which each window has a channel of its own.
    Quarantine,
}

/// Events that are published together: one of each aggregate, or a few in their order, and no two with the same id.
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
    /// Events that no queue has handed out.
    pub fn of(events: impl IntoIterator<Item = Arc<Event>>, route: Route) -> Self {
        let items = events.into_iter().map(|event| Item::new(event, StoredIn::Outbox, 0)).collect();
        Self { published: 0, route, items }
    }

    /// What its events take.
    pub fn bytes(&self) -> usize {
        self.items.iter().map(|item| item.event.size()).sum()
    }
}

/// What is under way apart.
#[derive(Clone, Copy, Debug, Default)]
struct QuarantineInFlight {
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
    /// Without a key, so that a run of the model can be repeated.
    hasher: BuildHasherDefault<DefaultHasher>,
    aggregates: HashMap<u64, Aggregate>,
    /// What was put here is skipped when its state is another one by now.
    ready: VecDeque<u64>,
    quarantine: VecDeque<u64>,
    blocked: BTreeMap<EventKind, VecDeque<u64>>,
    retries: Retries,
    /// Where the round over the blocked kinds stands.
    turn: Option<EventKind>,
    /// Probes of what is blocked, and retries, take turns.
    probes_first: bool,
    /// So do first tries apart, and further ones.
    untried_first: bool,
    /// What the last further try apart could do to others: that, and the other, take turns, too.
    last_danger: Danger,
    /// Aggregates whose first event is set aside once something that was handed out later is confirmed.
    guesses: BTreeMap<Stamp, Vec<u64>>,
    /// What is known of the broker.
    pub evidence: Evidence,
    budget: Budget,
    events: usize,
    bytes: usize,
    windows: usize,
    quarantine_in_flight: QuarantineInFlight,
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
            hasher: BuildHasherDefault::default(),
            aggregates: HashMap::new(),
            ready: VecDeque::new(),
            quarantine: VecDeque::new(),
            blocked: BTreeMap::new(),
            retries: Retries::default(),
            turn: None,
            probes_first: true,
            untried_first: true,
            last_danger: Danger::None,
            guesses: BTreeMap::new(),
            evidence: Evidence::default(),
            budget: Budget::new(now),
            events: 0,
            bytes: 0,
            windows: 0,
            quarantine_in_flight: QuarantineInFlight::default(),
            crowded: false,
            failed: HashMap::new(),
            forgotten: 0,
        }
    }

    /// Adds an event that was read, behind all of its aggregate that were.
    pub fn add(&mut self, event: Event) {
        self.insert(Item::new(Arc::new(event), StoredIn::Outbox, 0));
    }

    /// Adds an event that has a row in `outbox.parked`: before all of its aggregate that are younger.
    pub fn add_stored(&mut self, retry: StoredRetry, stored_in: StoredIn, now: Instant) {
        let StoredRetry { event, tries, failure, age } = retry;
        let first = self.failed.get(&event.position).copied().unwrap_or(self.forgotten);
        let mut item = Item::new(Arc::new(event), stored_in, tries);
        item.trouble = failure.map(|failure| Trouble {
            failure,
            first,
            since: now.checked_sub(age).unwrap_or(now),
            retry_at: now,
            why: String::new(),
        });
        self.insert(item);
    }

    fn insert(&mut self, mut item: Item) {
        self.events += 1;
        self.bytes += item.event.size();
        let id = self.hasher.hash_one((&*item.event.aggregate_type, &*item.event.aggregate_id));
        item.aggregate = id;
        self.aggregates.entry(id).or_default().insert(item);
        self.reschedule(id);
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
        let items = aggregates.flat_map(|a| a.items.iter().chain(&a.in_flight));
        items.filter(|item| item.stored_in != StoredIn::Outbox).map(|item| item.event.position).collect()
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
            Route::Quarantine => self.pick_quarantine(published, now, &mut picked),
        }
        if picked.is_empty() {
            return None;
        }
        let window = Window { published, route, items: picked };
        self.windows += 1;
        if route == Route::Quarantine {
            let dangerous = window.items.iter().any(|item| self.danger(item) == Danger::Channel);
            let in_flight = &mut self.quarantine_in_flight;
            in_flight.windows += 1;
            in_flight.bytes += window.bytes();
            in_flight.dangerous = dangerous;
        }
        Some(window)
    }

    /// When something may go out that may not now, unless something else happens before.
    pub fn wake_at(&self) -> Option<Instant> {
        let probe = (!self.evidence.flows() && !self.blocked.is_empty()).then(|| self.budget.next());
        let retry = self.retries.first().map(|at| at.max(self.budget.next()));
        probe.into_iter().chain(retry).min()
    }
}

impl Item {
    fn new(event: Arc<Event>, stored_in: StoredIn, tries: u32) -> Self {
        Self {
            event,
            stored_in,
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
