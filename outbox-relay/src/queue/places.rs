//! Where aggregates stand that have nothing under way.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    time::Instant,
};

use super::{Aggregate, Item, Place, Queue};
use crate::evidence::{Danger, Kind};

/// Aggregates whose first event is tried again, by kind and by when.
#[derive(Debug, Default)]
pub(super) struct Retries {
    kinds: BTreeMap<Kind, BTreeSet<(Instant, u64)>>,
    /// Where the round over the kinds stands: one kind with many does not keep the others waiting.
    turn: Option<Kind>,
    count: usize,
}

impl Retries {
    pub(super) fn len(&self) -> usize {
        self.count
    }

    pub(super) fn add(&mut self, kind: Kind, at: Instant, id: u64) {
        self.count += usize::from(self.kinds.entry(kind).or_default().insert((at, id)));
    }

    pub(super) fn remove(&mut self, kind: &Kind, at: Instant, id: u64) {
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
                self.kinds.range::<Kind, _>(after).next()
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
    pub(super) fn all_of(&mut self, kind: &Kind) -> Vec<u64> {
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
    pub(super) fn first(&self, id: u64) -> Option<(Place, &Item)> {
        let aggregate = self.aggregates.get(&id)?;
        Some((aggregate.place, aggregate.items.front()?))
    }

    /// What publishing an event may do to others.
    pub(super) fn danger(&self, first: &Item) -> Danger {
        first.danger().max(self.evidence.danger(&first.event))
    }

    /// Where an aggregate belongs by its first event.
    pub(super) fn fitting(&self, first: &Item) -> Place {
        if first.trouble.is_some() {
            Place::Retry
        } else if self.evidence.is_blocked(&first.event) {
            Place::Blocked
        } else if self.danger(first) > Danger::None {
            Place::Apart
        } else {
            Place::Ready
        }
    }

    /// Puts an aggregate where it belongs, if it has nothing under way.
    pub(super) fn place(&mut self, id: u64) {
        let Some(aggregate) = self.aggregates.get(&id) else { return };
        if !aggregate.under_way.is_empty() {
            return;
        }
        match aggregate.items.front() {
            None => {
                self.leave(id);
                self.aggregates.remove(&id);
            }
            Some(first) => {
                let place = self.fitting(first);
                // Where it stands already it keeps its turn. A retry is at the time of its first event.
                if place != aggregate.place || place == Place::Retry {
                    self.put(id, place);
                }
            }
        }
    }

    pub(super) fn put(&mut self, id: u64, place: Place) {
        self.leave(id);
        let Some(aggregate) = self.aggregates.get_mut(&id) else { return };
        let Some(first) = aggregate.items.front() else { return };
        aggregate.place = place;
        match place {
            Place::Ready => self.ready.push_back(id),
            Place::Apart => self.apart.push_back(id),
            Place::Blocked => self.blocked.entry(Kind::of(&first.event)).or_default().push_back(id),
            Place::Retry => {
                let Some(trouble) = &first.trouble else { return };
                aggregate.retry = Some((Kind::of(&first.event), trouble.retry_at));
                self.retries.add(Kind::of(&first.event), trouble.retry_at, id);
            }
            Place::Nowhere | Place::UnderWay => {}
        }
    }

    /// Takes an aggregate out of its place, where that is not found out by itself.
    pub(super) fn leave(&mut self, id: u64) {
        let Some(Aggregate { retry, place, .. }) = self.aggregates.get_mut(&id) else { return };
        *place = Place::Nowhere;
        if let Some((kind, at)) = retry.take() {
            self.retries.remove(&kind, at, id);
        }
    }
}
