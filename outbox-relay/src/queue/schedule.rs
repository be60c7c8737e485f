//! Where aggregates stand that have nothing under way.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    time::Instant,
};

use super::{Aggregate, AggregateState, Item, Queue};
use crate::evidence::{Danger, EventKind};

/// Aggregates whose first event is tried again, by kind and by when.
#[derive(Debug, Default)]
pub(super) struct Retries {
    kinds: BTreeMap<EventKind, BTreeSet<(Instant, u64)>>,
    /// Where the round over the kinds stands: one kind with many does not keep the others waiting.
    turn: Option<EventKind>,
    count: usize,
}

impl Retries {
    pub(super) fn len(&self) -> usize {
        self.count
    }

    pub(super) fn add(&mut self, kind: EventKind, at: Instant, id: u64) {
        self.count += usize::from(self.kinds.entry(kind).or_default().insert((at, id)));
    }

    pub(super) fn remove(&mut self, kind: &EventKind, at: Instant, id: u64) {
        let Some(ids) = self.kinds.get_mut(kind) else { return };
        self.count -= usize::from(ids.remove(&(at, id)));
        if ids.is_empty() {
            self.kinds.remove(kind);
        }
    }

    /// Of each kind the one that has been due for longest.
    pub(super) fn due(&self, now: Instant) -> impl Iterator<Item = u64> {
        self.kinds.values().filter_map(|ids| ids.first()).filter(move |(at, _)| *at <= now).map(|(_, id)| *id)
    }

    /// When the first of them is due.
    pub(super) fn first(&self) -> Option<Instant> {
        self.kinds.values().filter_map(|ids| ids.first()).map(|(at, _)| *at).min()
    }

    /// Takes the one that has been due for longest, of the kind whose turn it is.
    pub(super) fn next(&mut self, now: Instant, mut may: impl FnMut(u64) -> bool) -> Option<u64> {
        for _ in 0..self.kinds.len() {
            let after = self.turn.as_ref().and_then(|turn| {
                let after = (Bound::Excluded(turn), Bound::Unbounded);
                self.kinds.range::<EventKind, _>(after).next()
            });
            let (kind, ids) = after.or_else(|| self.kinds.iter().next())?;
            let due = ids.first().copied().filter(|(at, _)| *at <= now);
            let kind = kind.clone();
            if let Some((at, id)) = due
                && may(id)
            {
                self.remove(&kind, at, id);
                self.turn = Some(kind);
                return Some(id);
            }
            self.turn = Some(kind);
        }
        None
    }

    /// All of a kind are due.
    pub(super) fn all_of(&mut self, kind: &EventKind) -> Vec<u64> {
        let ids = self.kinds.remove(kind).unwrap_or_default();
        self.count -= ids.len();
        ids.into_iter().map(|(_, id)| id).collect()
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = u64> {
        self.kinds.values().flatten().map(|(_, id)| *id)
    }
}

impl Queue {
    /// An aggregate's place and its first event.
    pub(super) fn first(&self, id: u64) -> Option<(AggregateState, &Item)> {
        let aggregate = self.aggregates.get(&id)?;
        Some((aggregate.state, aggregate.items.front()?))
    }

    /// What publishing an event may do to others.
    pub(super) fn danger(&self, first: &Item) -> Danger {
        first.danger().max(self.evidence.danger(&first.event))
    }

    /// Where an aggregate belongs by its first event.
    pub(super) fn state_for(&self, first: &Item) -> AggregateState {
        if first.trouble.is_some() {
            AggregateState::Retry
        } else if self.evidence.is_blocked(&first.event) {
            AggregateState::Blocked
        } else if self.danger(first) > Danger::None {
            AggregateState::Quarantine
        } else {
            AggregateState::Ready
        }
    }

    /// Puts an aggregate where it belongs, if it has nothing under way.
    pub(super) fn reschedule(&mut self, id: u64) {
        let Some(aggregate) = self.aggregates.get(&id) else { return };
        if !aggregate.in_flight.is_empty() {
            return;
        }
        match aggregate.items.front() {
            None => {
                self.leave(id);
                self.aggregates.remove(&id);
            }
            Some(first) => {
                let state = self.state_for(first);
                // Where it stands already it keeps its turn. A retry is at the time of its first event.
                if state != aggregate.state || state == AggregateState::Retry {
                    self.enter(id, state);
                }
            }
        }
    }

    pub(super) fn enter(&mut self, id: u64, state: AggregateState) {
        self.leave(id);
        let Some(aggregate) = self.aggregates.get_mut(&id) else { return };
        let Some(first) = aggregate.items.front() else { return };
        aggregate.state = state;
        match state {
            AggregateState::Ready => self.ready.push_back(id),
            AggregateState::Quarantine => self.quarantine.push_back(id),
            AggregateState::Blocked => {
                self.blocked.entry(EventKind::of(&first.event)).or_default().push_back(id);
            }
            AggregateState::Retry => {
                let Some(trouble) = &first.trouble else { return };
                aggregate.retry = Some((EventKind::of(&first.event), trouble.retry_at));
                self.retries.add(EventKind::of(&first.event), trouble.retry_at, id);
            }
            AggregateState::Unscheduled | AggregateState::InFlight => {}
        }
    }

    /// Takes an aggregate out of its place, where that is not found out by itself.
    pub(super) fn leave(&mut self, id: u64) {
        let Some(Aggregate { retry, state, .. }) = self.aggregates.get_mut(&id) else { return };
        *state = AggregateState::Unscheduled;
        if let Some((kind, at)) = retry.take() {
            self.retries.remove(&kind, at, id);
        }
    }
}
