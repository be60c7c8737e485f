//! Picking what a connection publishes next.

use std::{
    collections::{HashSet, VecDeque},
    ops::Bound,
    time::Instant,
};

use super::{AggregateState, Item, QUARANTINE_BYTES, QUARANTINE_WINDOWS, QuarantineInFlight, Queue};
use crate::{
    evidence::{Danger, EventKind, PublishFailure, Stamp},
    publish::MAX_UNANSWERED,
    rules::Unroutable,
};

impl Queue {
    pub(super) fn pick(&mut self, published: Stamp, now: Instant, picked: &mut Vec<Item>) {
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
            let Some((AggregateState::Ready, first)) = self.first(id) else { continue };
            // A returned message is known by its id, and nothing in the schema keeps a writer from using one twice.
            if ids.contains(&first.event.id) {
                twins.push(id);
                continue;
            }
            let state = self.state_for(first);
            if state == AggregateState::Ready {
                ids.insert(first.event.id);
                picked.extend(self.begin(id, published));
            } else {
                self.enter(id, state);
            }
        }
        for id in twins.into_iter().rev() {
            self.ready.push_front(id);
        }
    }

    /// Picks one event that has a channel of its own. What may end the connection has that to itself, too, and is not
    /// kept waiting by what has no answer.
    pub(super) fn pick_quarantine(&mut self, published: Stamp, now: Instant, picked: &mut Vec<Item>) {
        let QuarantineInFlight { windows, bytes, dangerous } = self.quarantine_in_flight;
        if dangerous || windows >= QUARANTINE_WINDOWS || bytes >= QUARANTINE_BYTES {
            return;
        }
        let mut ids = HashSet::new();
        while let Some(id) = self.quarantine.front().copied() {
            let Some((AggregateState::Quarantine, first)) = self.first(id) else {
                self.quarantine.pop_front();
                continue;
            };
            let state = self.state_for(first);
            if state != AggregateState::Quarantine {
                self.quarantine.pop_front();
                self.enter(id, state);
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
                if let Some(id) = self.quarantine.pop_front() {
                    picked.extend(self.begin(id, published));
                }
            } else {
                let mut turn = [Danger::Channel, Danger::Silence];
                if self.last_danger == Danger::Channel {
                    turn.reverse();
                }
                for danger in turn {
                    if picked.is_empty() && (danger == Danger::Silence || windows == 0) {
                        self.pick_tries(danger, published, now, 1, &mut ids, picked);
                        if !picked.is_empty() {
                            self.last_danger = danger;
                        }
                    }
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
            let Some((state, first)) = self.first(id) else { continue };
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
                self.enter(id, state);
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
            let first = self
                .first(id)
                .filter(|(state, _)| matches!(state, AggregateState::Retry | AggregateState::Blocked));
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
                trouble.failure == PublishFailure::Unroutable && evidence.taken_since(trouble.first)
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
                self.blocked.range::<EventKind, _>(after).next()
            });
            let kind = after.or_else(|| self.blocked.iter().next()).map(|(kind, _)| kind.clone())?;
            self.turn = Some(kind.clone());
            while let Some(id) = self.blocked.get_mut(&kind).and_then(VecDeque::pop_front) {
                let Some((AggregateState::Blocked, first)) = self.first(id) else { continue };
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
                if matches!(self.first(id), Some((AggregateState::Blocked, _))) {
                    self.enter(id, AggregateState::Ready);
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
        item.chained = false;
        item.decides = item.trouble.as_ref().is_some_and(|trouble| evidence.taken_since(trouble.first));
        item.guessed = item.trouble.is_none() && evidence.is_proven(&item.event);
        aggregate.state = AggregateState::InFlight;
        aggregate.retry = None;
        aggregate.in_flight.push(item.clone());
        Some(item)
    }
}
