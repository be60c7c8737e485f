//! What is in memory between having been read and being settled: which lane an event is in, what may be
//! published next, and what waits for another try. No I/O.
//!
//! An aggregate has at most one event under way, and its next one waits until that is settled, so that a
//! nack, a return or a lost connection never lets a later event through first.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    hash::{BuildHasher, RandomState},
    sync::Arc,
    time::Instant,
};

use crate::{pause::Pause, reader::Event};

/// Windows of a lane that are under way or ready to be: the lane does not idle while the relay reads.
pub const DEPTH: usize = 3;

/// An event in memory.
#[derive(Clone, Debug)]
pub struct Item {
    /// The event.
    pub event: Arc<Event>,
    /// It was set aside and is tried again: its position is settled already.
    pub parked: bool,
    /// The aggregate. Two that share a hash wait for each other, which costs a moment and no order.
    aggregate: u64,
}

/// Why an event that was published and not taken is still here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// The relay waits: nothing but what is held is published until it is taken.
    Stop,
    /// It was not taken, but nor was anything else since: is it this event, or does nobody listen at all?
    /// Other types go on, and will tell.
    Doubt,
}

/// What became of an event of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It leaves the memory.
    Settled,
    /// It is tried again, after a pause.
    Held(Held),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waiting,
    /// Still counted as held, if it was, until its fate is known.
    UnderWay(Option<Held>),
    Held(Held),
}

#[derive(Debug)]
struct Entry {
    item: Item,
    state: State,
}

#[derive(Debug)]
struct Lane {
    entries: VecDeque<Entry>,
    /// How many windows are under way.
    windows: usize,
    /// How many events the next window may have: fewer after a failure, so that an event over which the
    /// broker ends the channel is soon alone and does not have the others published over and over.
    limit: usize,
    pause: Pause,
    /// How many events are held, and not under way.
    held: usize,
    /// When they are tried again.
    retry_at: Option<Instant>,
}

/// The events of all lanes.
#[derive(Debug)]
pub struct Queue {
    lanes: Vec<Lane>,
    window: usize,
    hasher: RandomState,
    events: usize,
    bytes: usize,
    stopped: usize,
    /// Types with events in doubt, and how many.
    doubtful: HashMap<String, usize>,
}

impl Queue {
    /// For `lanes` lanes that publish up to `window` events together.
    pub fn new(lanes: usize, window: usize) -> Self {
        let lane = || Lane {
            entries: VecDeque::new(),
            windows: 0,
            limit: window,
            pause: Pause::default(),
            held: 0,
            retry_at: None,
        };
        Self {
            lanes: (0..lanes).map(|_| lane()).collect(),
            window,
            hasher: RandomState::new(),
            events: 0,
            bytes: 0,
            stopped: 0,
            doubtful: HashMap::new(),
        }
    }

    /// Adds an event that was read, behind all that were.
    pub fn add(&mut self, event: Event) {
        self.insert(event, false);
    }

    /// Adds an event that was set aside, before all that were not: it is older.
    pub fn add_parked(&mut self, event: Event) {
        self.insert(event, true);
    }

    fn insert(&mut self, event: Event, parked: bool) {
        let aggregate = self.hasher.hash_one((&*event.aggregate_type, &*event.aggregate_id));
        self.events += 1;
        self.bytes += event.size();
        let item = Item { event: Arc::new(event), parked, aggregate };
        let lane = usize::try_from(aggregate % self.lanes.len() as u64).unwrap_or(0);
        let entries = &mut self.lanes[lane].entries;
        let at = if parked {
            let position = item.event.position;
            entries.partition_point(|e| e.item.parked && e.item.event.position < position)
        } else {
            entries.len()
        };
        entries.insert(at, Entry { item, state: State::Waiting });
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
        self.lanes.iter().map(|lane| lane.windows).sum()
    }

    /// How many events were not taken and wait for another try.
    pub fn held(&self) -> usize {
        self.stopped + self.doubtful.values().sum::<usize>()
    }

    /// When a lane may try again what it holds, if it has room for it.
    pub fn retry_at(&self, lane: usize) -> Option<Instant> {
        let lane = &self.lanes[lane];
        lane.retry_at.filter(|_| lane.windows < DEPTH)
    }

    /// The positions of those that were set aside and are tried again.
    pub fn parked(&self) -> HashSet<i64> {
        let entries = self.lanes.iter().flat_map(|lane| &lane.entries);
        entries.filter(|e| e.item.parked).map(|e| e.item.event.position).collect()
    }

    /// Picks what a lane publishes next, at most one event of each aggregate; empty when there is
    /// nothing that may go out now. No two have the same id, by which a returned message is known:
    /// nothing in the schema keeps a writer from using one twice.
    pub fn next(&mut self, lane: usize, now: Instant) -> Vec<Item> {
        let stopped = self.stopped > 0;
        let lane = &mut self.lanes[lane];
        if lane.windows == DEPTH {
            return Vec::new();
        }
        let retry = lane.retry_at.is_some_and(|at| at <= now);
        let (mut aggregates, mut ids) = (HashSet::new(), HashSet::new());
        let mut window = Vec::new();
        for entry in &mut lane.entries {
            if window.len() == lane.limit {
                break;
            }
            let event = &entry.item.event;
            let (may_go, held) = match entry.state {
                State::UnderWay(_) => (false, None),
                State::Held(held) => (retry, Some(held)),
                State::Waiting => (!stopped && !self.doubtful.contains_key(&event.type_), None),
            };
            // Whether it goes or not, what comes behind it waits; but for what is in doubt, which may be
            // set aside: if the first event of every aggregate were of a type that nobody takes, nothing
            // else could tell that somebody listens.
            let first = if may_go || entry.state != State::Held(Held::Doubt) {
                aggregates.insert(entry.item.aggregate)
            } else {
                false
            };
            if first && may_go && ids.insert(event.id) {
                entry.state = State::UnderWay(held);
                lane.held -= usize::from(held.is_some());
                window.push(entry.item.clone());
            }
        }
        if lane.held == 0 {
            lane.retry_at = None;
        } else if retry && window.is_empty() {
            // All that is held has a predecessor under way.
            lane.retry_at = Some(now + lane.pause.step());
        }
        if !window.is_empty() {
            lane.windows += 1;
        }
        window
    }

    /// Takes in what became of each event of a window, by position.
    pub fn done(&mut self, lane: usize, outcomes: &HashMap<i64, Outcome>, now: Instant) {
        let lane = &mut self.lanes[lane];
        lane.windows -= 1;
        lane.limit = (lane.limit * 2).min(self.window);
        let (mut held, mut events, mut bytes) = (0, 0, 0);
        let (stopped, doubtful) = (&mut self.stopped, &mut self.doubtful);
        lane.entries.retain_mut(|entry| {
            let (State::UnderWay(before), Some(outcome)) =
                (entry.state, outcomes.get(&entry.item.event.position))
            else {
                return true;
            };
            let type_ = &entry.item.event.type_;
            if let Some(before) = before {
                release(stopped, doubtful, before, type_);
            }
            match outcome {
                Outcome::Settled => {
                    events += 1;
                    bytes += entry.item.event.size();
                    false
                }
                Outcome::Held(why) => {
                    held += 1;
                    entry.state = State::Held(*why);
                    match why {
                        Held::Stop => *stopped += 1,
                        Held::Doubt => *doubtful.entry(type_.clone()).or_default() += 1,
                    }
                    true
                }
            }
        });
        self.events -= events;
        self.bytes -= bytes;
        if events > 0 {
            lane.pause.reset();
        }
        if held > 0 {
            lane.held += held;
            lane.retry_at = Some(now + lane.pause.step());
        }
    }

    /// A window was not published, or its fate is unknown: all of it goes out again. Smaller, when it
    /// `failed`.
    pub fn back(&mut self, lane: usize, window: &[Item], failed: bool, now: Instant) {
        let positions: HashSet<i64> = window.iter().map(|item| item.event.position).collect();
        let lane = &mut self.lanes[lane];
        lane.windows -= 1;
        if failed {
            lane.limit = (window.len() / 8).max(1);
        }
        for entry in &mut lane.entries {
            if let State::UnderWay(held) = entry.state
                && positions.contains(&entry.item.event.position)
            {
                entry.state = held.map_or(State::Waiting, State::Held);
                if held.is_some() {
                    lane.held += 1;
                    lane.retry_at = Some(now + lane.pause.step());
                }
            }
        }
    }
}

fn release(stopped: &mut usize, doubtful: &mut HashMap<String, usize>, held: Held, type_: &str) {
    match held {
        Held::Stop => *stopped -= 1,
        Held::Doubt => {
            if let Some(count) = doubtful.get_mut(type_) {
                *count -= 1;
                if *count == 0 {
                    doubtful.remove(type_);
                }
            }
        }
    }
}
