//! An aggregate in memory, and its events.

use std::{collections::VecDeque, sync::Arc, time::Instant};

use crate::{
    event::Event,
    evidence::{Danger, EventKind, PublishFailure, Stamp},
};

/// An event that was in so many windows that were lost goes apart: it may be what ends the connections.
const LOSSES: u8 = 3;

/// Where the relay has an event, besides its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredIn {
    /// In the outbox alone: its position is not settled.
    Outbox,
    /// In `outbox.parked`, waiting: its position is settled, and later events of its aggregate wait behind it.
    Waiting,
    /// In `outbox.parked`, set aside: later events of its aggregate go on.
    Parked,
}

/// An event in memory.
#[derive(Clone, Debug)]
pub struct Item {
    /// The event.
    pub event: Arc<Event>,
    /// Where else it is.
    pub stored_in: StoredIn,
    /// How often it was not taken.
    pub tries: u32,
    /// Why it was not taken, if it was tried.
    pub trouble: Option<Trouble>,
    pub(super) losses: u8,
    pub(super) published: Stamp,
    /// Something else was taken since it was not: when this try fails, it is the event.
    pub(super) decides: bool,
    /// One of its kind was proven to be at fault: when this first try fails, and something that is handed out later
    /// is taken, it is the event.
    pub(super) guessed: bool,
    /// It went out with others of its aggregate, in their order, to find out whether any of them is taken.
    pub(super) chained: bool,
    pub(super) aggregate: u64,
}

/// Why an event was not taken.
#[derive(Clone, Debug)]
pub struct Trouble {
    /// How.
    pub failure: PublishFailure,
    /// When it was first learned.
    pub(super) first: Stamp,
    /// The same, by the clock.
    pub since: Instant,
    /// When it is tried again.
    pub(super) retry_at: Instant,
    /// In words.
    pub why: String,
}

impl Item {
    /// What publishing it may do to others, by what became of itself.
    pub(super) fn danger(&self) -> Danger {
        if self.losses >= LOSSES {
            return Danger::Channel;
        }
        self.trouble.as_ref().map_or(Danger::None, |trouble| trouble.failure.danger())
    }

    /// Whether it went out with others of its aggregate.
    pub fn is_chained(&self) -> bool {
        self.chained
    }

    /// It was in a window over which the channel was closed.
    pub(super) fn suspect(&mut self) {
        self.losses = LOSSES;
    }

    /// It was in a window of which nothing is known, because the connection ended.
    pub(super) fn lost(&mut self) {
        self.losses = self.losses.saturating_add(1);
    }
}

/// Where an aggregate stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum AggregateState {
    #[default]
    Unscheduled,
    InFlight,
    Ready,
    Blocked,
    Quarantine,
    Retry,
}

#[derive(Debug, Default)]
pub(super) struct Aggregate {
    /// In order of position, without what is under way.
    pub(super) items: VecDeque<Item>,
    pub(super) in_flight: Vec<Item>,
    pub(super) state: AggregateState,
    /// Where it stands among the retries.
    pub(super) retry: Option<(EventKind, Instant)>,
}

impl Aggregate {
    /// Puts an event that was set aside before those that are younger, and one that was read behind all.
    pub(super) fn insert(&mut self, item: Item) {
        let position = item.event.position;
        let at = match item.stored_in {
            StoredIn::Outbox => self.items.len(),
            StoredIn::Waiting | StoredIn::Parked => {
                self.items.partition_point(|i| i.event.position < position)
            }
        };
        self.items.insert(at, item);
    }
}
