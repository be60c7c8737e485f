//! What becomes of events that were published.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use super::{AggregateState, Item, Queue, Route, StoredIn, Trouble, Window};
use crate::{
    evidence::{EventKind, PublishFailure, Stamp},
    publish::{Fate, Proof},
    rules::{Nacked, Unroutable},
};

/// With `--nacked pass`, an event that a full queue refuses, or that has no answer, is set aside after so long. An event
/// over which the broker's process for the channel ends, for so long, is at fault itself.
const PATIENCE: Duration = Duration::from_secs(10);
/// Of so many events that have rows the relay knows when they were first not taken.
const MAX_REMEMBERED: usize = 100_000;
/// The first pause before another try; each is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// The longest pause of an event that no queue takes. Trying it makes no copy anywhere.
const UNROUTABLE_PAUSE: Duration = Duration::from_secs(5);
/// The longest pause of another one.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What is to be stored and settled.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The broker has them.
    pub confirmed: Vec<Item>,
    /// A rule lets them go.
    pub dropped: Vec<Item>,
    /// They are set aside, with the reason, and later events of their aggregates go on.
    pub park: Vec<(Item, PublishFailure, String)>,
    /// They have a row, were not taken, and stay there.
    pub postpone: Vec<(Item, PublishFailure, String)>,
}

/// How the fate of events was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// They were not published, or over a channel that stood still, which others of it had no answer.
    Unbegun,
    /// The connection ended.
    Connection,
    /// The channel ended over one of them.
    Suspect,
}

/// How long to pause after so many `tries` in vain. Events that fail together do not come back together.
pub fn pause(failure: PublishFailure, tries: u32, position: i64) -> Duration {
    let longest = if failure == PublishFailure::Unroutable { UNROUTABLE_PAUSE } else { LONGEST_PAUSE };
    let pause = FIRST_PAUSE.saturating_mul(1 << tries.saturating_sub(1).min(12)).min(longest);
    let jitter = u32::try_from(position.wrapping_mul(40_503).rem_euclid(256)).unwrap_or(0);
    pause + pause / 1_024 * jitter
}

impl Queue {
    /// Takes in what became of events of a window that has ended. `may_park`: how many more may be set aside.
    pub fn settle(&mut self, fates: Vec<(Item, Fate)>, may_park: i64, now: Instant) -> Outcome {
        let learned = self.evidence.tick();
        let mut done = Outcome::default();
        let (mut failed, mut chained) = (Vec::new(), Vec::new());
        for (item, fate) in fates {
            match fate {
                Fate::Confirmed => {
                    self.confirmed(&item, now);
                    if item.chained {
                        chained.push(item);
                    } else {
                        self.take(item, &mut done);
                    }
                }
                Fate::Unroutable if self.policies.unroutable.of(&item.event.type_) == Unroutable::Drop => {
                    self.forget(&item);
                    done.dropped.push(item);
                }
                Fate::Unroutable => {
                    let why = self.policies.no_queue(&item.event.type_);
                    failed.push((item, PublishFailure::Unroutable, why, None));
                }
                Fate::Nacked => {
                    let why = format!(
                        "the broker refuses events of type {} for now; is a queue at its limit?",
                        item.event.type_
                    );
                    failed.push((item, PublishFailure::Nacked, why, None));
                }
                Fate::Silent => {
                    let why = format!(
                        "the broker does not answer for events of type {}; has a queue lost the majority of its nodes?",
                        item.event.type_
                    );
                    failed.push((item, PublishFailure::Silent, why, None));
                }
                Fate::Refused { why, proof } => {
                    let why = format!("event {} of type {}: {why}", item.event.id, item.event.type_);
                    if proof == Proof::Reason {
                        self.evidence.refused(item.event.size());
                    }
                    failed.push((item, PublishFailure::Refused, why, Some(proof)));
                }
            }
        }
        // Of aggregates of which several went out together, the last that was taken.
        let mut taken: HashMap<u64, i64> = HashMap::new();
        for item in &chained {
            let last = taken.entry(item.aggregate).or_default();
            *last = item.event.position.max(*last);
        }
        // Of aggregates that wait in the database, the first event that was not taken.
        let mut waiting: HashMap<u64, i64> = HashMap::new();
        let mut free = may_park;
        for (mut item, failure, why, proof) in failed {
            let certain = proof == Some(Proof::Certain);
            if !certain {
                self.evidence.failed(&item.event, failure, &why, (learned, now));
            }
            if item.tries > 0 {
                self.budget.failed();
            }
            item.tries += 1;
            item.decides |=
                item.chained && taken.get(&item.aggregate).is_some_and(|last| *last > item.event.position);
            let parked =
                item.stored_in != StoredIn::Parked && (certain || self.is_proven(&item, failure, proof, now));
            if parked && self.may_park(&mut free) {
                if !certain {
                    self.evidence.proven(&item.event);
                }
                self.failed.remove(&item.event.position);
                self.forget(&item);
                done.park.push((item, failure, why));
            } else if item.stored_in == StoredIn::Outbox {
                item.guessed &= proof != Some(Proof::Internal);
                self.hold(item, failure, why, learned, now);
            } else {
                // What waits behind another one has no turn of its own.
                let has_turn = item.stored_in == StoredIn::Parked || !waiting.contains_key(&item.aggregate);
                if item.stored_in == StoredIn::Waiting {
                    let first = waiting.entry(item.aggregate).or_insert(item.event.position);
                    *first = item.event.position.min(*first);
                    self.remember(item.event.position, item.trouble.as_ref().map_or(learned, |t| t.first));
                }
                self.forget(&item);
                self.unload(&item);
                if has_turn {
                    done.postpone.push((item, failure, why));
                }
            }
        }
        for item in chained {
            let waiting = waiting.get(&item.aggregate).copied();
            if self.overtakes(&item, waiting) {
                self.publish_again(&item, waiting.is_some());
            } else {
                self.take(item, &mut done);
            }
        }
        self.park_guesses(&mut free, &mut done);
        done
    }

    /// The broker has it.
    fn take(&mut self, item: Item, done: &mut Outcome) {
        self.failed.remove(&item.event.position);
        self.forget(&item);
        done.confirmed.push(item);
    }

    /// Whether an event that was taken went out behind one of its aggregate that was neither taken nor set aside: no
    /// queue took that before, and by now one does that is full, silent, or has lost its answer. `waiting`: the position of
    /// the first such event that is in the database alone.
    fn overtakes(&self, item: &Item, waiting: Option<i64>) -> bool {
        let position = item.event.position;
        let aggregate = self.aggregates.get(&item.aggregate);
        let earlier = |other: &Item| other.stored_in != StoredIn::Parked && other.event.position < position;
        item.stored_in != StoredIn::Parked
            && (waiting.is_some_and(|waiting| waiting < position)
                || aggregate.is_some_and(|aggregate| aggregate.items.iter().any(earlier)))
    }

    /// It is published once more, behind the earlier one: what was taken too early is a copy. `is_waiting`: its aggregate
    /// waits in the database, and comes back from there.
    fn publish_again(&mut self, item: &Item, is_waiting: bool) {
        if is_waiting && item.stored_in == StoredIn::Waiting {
            self.forget(item);
        } else {
            self.put_back(item);
        }
    }

    /// The fate of these is not known: they are published again.
    pub fn lost(&mut self, items: Vec<Item>, how: Lost) {
        for mut item in items {
            match how {
                Lost::Unbegun => {}
                Lost::Connection => item.lost(),
                Lost::Suspect => item.suspect(),
            }
            self.put_back(&item);
        }
    }

    /// A window has ended, whatever became of its events, which took so many bytes.
    pub fn ended(&mut self, route: Route, bytes: usize) {
        self.windows -= 1;
        if route == Route::Quarantine {
            let in_flight = &mut self.quarantine_in_flight;
            in_flight.windows -= 1;
            in_flight.bytes -= bytes;
            in_flight.dangerous = false;
        }
    }

    /// A window that was not begun.
    pub fn back(&mut self, window: Window) {
        let (route, bytes) = (window.route, window.bytes());
        self.lost(window.items, Lost::Unbegun);
        self.ended(route, bytes);
    }

    fn confirmed(&mut self, item: &Item, now: Instant) {
        if item.tries > 0 {
            self.budget.succeeded(item.event.size());
        }
        let before = item.trouble.as_ref().map(|trouble| trouble.failure);
        if self.evidence.confirmed(&item.event, item.published, before, now) {
            // What waits of its kind is tried soon.
            for id in self.retries.all_of(&EventKind::of(&item.event)) {
                let first = self.aggregates.get_mut(&id).and_then(|a| a.items.front_mut());
                if let Some(trouble) = first.and_then(|first| first.trouble.as_mut()) {
                    trouble.retry_at = trouble.retry_at.min(now);
                }
                self.enter(id, AggregateState::Retry);
            }
        }
    }

    /// Whether it is the event itself that is not taken, and a rule has it set aside.
    fn is_proven(&self, item: &Item, failure: PublishFailure, proof: Option<Proof>, now: Instant) -> bool {
        let type_ = &item.event.type_;
        let failed_for = now.duration_since(item.trouble.as_ref().map_or(now, |trouble| trouble.since));
        match failure {
            PublishFailure::Unroutable => {
                item.decides && self.policies.unroutable.of(type_) == Unroutable::Park
            }
            PublishFailure::Refused => {
                item.decides && (proof != Some(Proof::Internal) || failed_for >= PATIENCE)
            }
            PublishFailure::Nacked | PublishFailure::Silent => {
                self.policies.nacked.of(type_) == Nacked::Pass && failed_for >= PATIENCE
            }
        }
    }

    fn may_park(&mut self, free: &mut i64) -> bool {
        self.crowded = *free <= 0;
        *free -= 1;
        !self.crowded
    }

    /// It is tried again, and what is behind it waits.
    fn hold(&mut self, mut item: Item, failure: PublishFailure, why: String, learned: Stamp, now: Instant) {
        let (first, since) = item.trouble.as_ref().map_or((learned, now), |t| (t.first, t.since));
        let retry_at = now + pause(failure, item.tries, item.event.position);
        item.trouble = Some(Trouble { failure, first, since, retry_at, why });
        let parks = match failure {
            PublishFailure::Unroutable => self.policies.unroutable.of(&item.event.type_) == Unroutable::Park,
            PublishFailure::Refused => true,
            PublishFailure::Nacked | PublishFailure::Silent => false,
        };
        if item.guessed && parks {
            self.guesses.entry(learned).or_default().push(item.aggregate);
        }
        self.put_back(&item);
    }

    /// Sets aside what a guess was right about: one of its kind was at fault, it was not taken either, and something
    /// that was handed out later was.
    fn park_guesses(&mut self, free: &mut i64, done: &mut Outcome) {
        while let Some(entry) = self.guesses.first_entry()
            && self.evidence.taken_since(*entry.key())
        {
            let (learned, ids) = entry.remove_entry();
            for id in ids {
                let Some((AggregateState::Retry, first)) = self.first(id) else { continue };
                let proven = first.stored_in != StoredIn::Parked
                    && first.trouble.as_ref().is_some_and(|trouble| trouble.first == learned)
                    && self.evidence.is_proven(&first.event);
                if !proven || !self.may_park(free) {
                    continue;
                }
                let Some(item) = self.aggregates.get_mut(&id).and_then(|a| a.items.pop_front()) else {
                    continue;
                };
                self.forget(&item);
                if let Some(Trouble { failure, why, .. }) = item.trouble.clone() {
                    done.park.push((item, failure, why));
                }
            }
        }
    }

    /// Remembers when an event that leaves the memory for its row was first not taken.
    pub(super) fn remember(&mut self, position: i64, first: Stamp) {
        if self.failed.len() < MAX_REMEMBERED {
            self.failed.entry(position).or_insert(first);
        } else {
            self.forgotten = self.evidence.last_failure();
        }
    }

    /// It leaves the memory, and its aggregate goes on.
    fn forget(&mut self, item: &Item) {
        self.events -= 1;
        self.bytes -= item.event.size();
        self.free(item);
    }

    /// What has a row and waits behind it leaves the memory, too: it comes back in its turn.
    fn unload(&mut self, item: &Item) {
        if item.stored_in != StoredIn::Waiting {
            return;
        }
        if let Some(aggregate) = self.aggregates.get_mut(&item.aggregate) {
            let (events, bytes) = (&mut self.events, &mut self.bytes);
            aggregate.items.retain(|behind| {
                let leaves = behind.stored_in == StoredIn::Waiting;
                if leaves {
                    *events -= 1;
                    *bytes -= behind.event.size();
                }
                !leaves
            });
        }
        self.reschedule(item.aggregate);
    }

    fn put_back(&mut self, item: &Item) {
        if let Some(aggregate) = self.aggregates.get_mut(&item.aggregate) {
            let position = item.event.position;
            let at = aggregate.items.partition_point(|i| i.event.position < position);
            aggregate.items.insert(at, item.clone());
        }
        self.free(item);
    }

    /// It is not under way any more.
    fn free(&mut self, item: &Item) {
        if let Some(aggregate) = self.aggregates.get_mut(&item.aggregate) {
            aggregate.in_flight.retain(|other| other.event.position != item.event.position);
            if aggregate.in_flight.is_empty() && aggregate.state == AggregateState::InFlight {
                aggregate.state = AggregateState::Unscheduled;
            }
        }
        self.reschedule(item.aggregate);
    }
}
