//! Events of a replay on their way: which of them may go out next, and what was tried before. No I/O.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Instant,
};

use uuid::Uuid;

use crate::{budget::Budget, event::Event, queue::Route};

/// No more is read while so many events are here, or so many bytes.
const EVENTS: usize = 5_000;
const BYTES: usize = 16 << 20;
/// An event that is not taken keeps back where to go on after an interruption. No more is read while so many behind it
/// are published, because all of them would be published again.
const AGAIN: usize = 10_000;
/// Bytes of what goes out together, but for an event that is larger by itself.
const WINDOW_BYTES: usize = 4 << 20;

/// What is read and not settled, and what of the rest lies behind it.
#[derive(Debug, Default)]
pub(super) struct Pool {
    /// What is not settled, by position.
    events: BTreeMap<i64, Arc<Event>>,
    bytes: usize,
    /// The same by aggregate, in order.
    aggregates: HashMap<(String, String), VecDeque<i64>>,
    /// The first event of each aggregate, unless it is under way.
    first: BTreeSet<i64>,
    /// Ids of what is under way.
    ids: HashSet<Uuid>,
    /// Positions of what was tried before: from then on it is a retry.
    tried: HashSet<i64>,
    /// The broker ended a channel over several events, of which these are some: each goes out by itself.
    suspects: HashSet<i64>,
    /// Positions of what the broker has, from the first that is not settled on.
    published: BTreeSet<i64>,
    /// Everything up to here was read.
    read_up_to: Option<i64>,
}

impl Pool {
    /// Adds what was read, up to that position.
    pub(super) fn add(&mut self, events: Vec<Event>, up_to: i64) {
        self.read_up_to = Some(up_to);
        for event in events {
            let (position, key) = (event.position, key(&event));
            self.bytes += event.size();
            let of_aggregate = self.aggregates.entry(key).or_default();
            if of_aggregate.is_empty() {
                self.first.insert(position);
            }
            of_aggregate.push_back(position);
            self.events.insert(position, Arc::new(event));
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// Whether more may be read.
    pub(super) fn wants_more(&self) -> bool {
        self.events.len() < EVENTS && self.bytes < BYTES && self.published.len() < AGAIN
    }

    /// How many may go out, if the budget lets them.
    pub(super) fn ready(&self) -> usize {
        self.first.len()
    }

    /// What is published at once, at most so many: of each aggregate its first event, so that none overtakes another that
    /// is tried again; of each id one, by which a returned message is known; no more retries than the budget allows, if
    /// there is one now; and a suspect by itself. Empty when nothing may go out now.
    pub(super) fn window(
        &mut self,
        mut budget: Option<&mut Budget>,
        now: Instant,
        most: usize,
    ) -> (Vec<Arc<Event>>, Route) {
        let (mut window, mut bytes, mut route) = (Vec::new(), 0, Route::Lane);
        for position in &self.first {
            let Some(event) = self.events.get(position) else { continue };
            let suspect = self.suspects.contains(position);
            if self.ids.contains(&event.id) || suspect && !window.is_empty() {
                continue;
            }
            if self.tried.contains(position) {
                let Some(budget) = &mut budget else { continue };
                if !budget.take(event.size(), now) {
                    continue;
                }
            }
            self.ids.insert(event.id);
            bytes += event.size();
            window.push(Arc::clone(event));
            if suspect {
                // What may end its channel has one of its own.
                route = Route::Quarantine;
            }
            if suspect || window.len() >= most || bytes >= WINDOW_BYTES {
                break;
            }
        }
        for event in &window {
            self.first.remove(&event.position);
        }
        (window, route)
    }

    /// Whether it was tried before.
    pub(super) fn was_tried(&self, event: &Event) -> bool {
        self.tried.contains(&event.position)
    }

    /// It was not taken, or it is not known: it may go out again.
    pub(super) fn again(&mut self, event: &Event, budget: &mut Budget) {
        if !self.tried.insert(event.position) {
            budget.failed();
        }
        self.ids.remove(&event.id);
        if self.events.contains_key(&event.position) {
            self.first.insert(event.position);
        }
    }

    /// It may have ended its channel.
    pub(super) fn suspect(&mut self, event: &Event) {
        self.suspects.insert(event.position);
    }

    /// The broker has it.
    pub(super) fn publish(&mut self, event: &Event) {
        self.published.insert(event.position);
    }

    /// It is done with: the next one of its aggregate may go out.
    pub(super) fn settle(&mut self, event: &Event) {
        let (position, key) = (event.position, key(event));
        self.ids.remove(&event.id);
        self.tried.remove(&position);
        self.suspects.remove(&position);
        if self.events.remove(&position).is_some() {
            self.bytes -= event.size();
        }
        if let Some(of_aggregate) = self.aggregates.get_mut(&key) {
            // What goes out is the first of its aggregate.
            of_aggregate.pop_front_if(|first| *first == position);
            match of_aggregate.front() {
                Some(next) => {
                    self.first.insert(*next);
                }
                None => {
                    self.aggregates.remove(&key);
                }
            }
        }
        let next = self.next();
        while self.published.first().is_some_and(|first| Some(*first) < next) {
            self.published.pop_first();
        }
    }

    /// The first position that is not settled, or the first that was not read; none before anything was read.
    pub(super) fn next(&self) -> Option<i64> {
        let first = self.events.first_key_value().map(|(position, _)| *position);
        first.or_else(|| self.read_up_to.map(|position| position.saturating_add(1)))
    }

    /// How many of those that were published are published again by a replay from there on.
    pub(super) fn again_from(&self, next: i64) -> usize {
        self.published.range(next..).count()
    }
}

fn key(event: &Event) -> (String, String) {
    (event.aggregate_type.clone(), event.aggregate_id.clone())
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    fn event(position: i64, aggregate: &str, id: u128) -> Event {
        Event {
            position,
            id: Uuid::from_u128(id),
            aggregate_type: "thing".to_owned(),
            aggregate_id: aggregate.to_owned(),
            version: position,
            type_: "thing.changed".to_owned(),
            payload: "{}".into(),
            headers: None,
            created_at: DateTime::UNIX_EPOCH,
            previous_id: None,
        }
    }

    /// Position 4 has the id of position 2.
    fn pool() -> Pool {
        let mut pool = Pool::default();
        let events =
            [event(1, "a", 1), event(2, "b", 2), event(3, "a", 3), event(4, "c", 2), event(5, "d", 5)];
        pool.add(events.to_vec(), 7);
        pool
    }

    fn positions(window: &[Arc<Event>]) -> Vec<i64> {
        window.iter().map(|event| event.position).collect()
    }

    #[test]
    fn an_aggregate_has_one_event_under_way_and_an_id_too() {
        let now = Instant::now();
        let (mut pool, mut budget) = (pool(), Budget::new(now));
        let (window, _) = pool.window(Some(&mut budget), now, 2);
        assert_eq!(positions(&window), [1, 2]);
        let (other, _) = pool.window(Some(&mut budget), now, 10);
        assert_eq!(positions(&other), [5]);
        assert!(pool.window(Some(&mut budget), now, 10).0.is_empty());
        pool.publish(&other[0]);
        pool.settle(&other[0]);
        pool.settle(&window[1]);
        assert_eq!(positions(&pool.window(Some(&mut budget), now, 10).0), [4]);
        assert_eq!((pool.next(), pool.again_from(1)), (Some(1), 1));
        pool.settle(&window[0]);
        assert_eq!(positions(&pool.window(Some(&mut budget), now, 10).0), [3]);
        assert_eq!((pool.next(), pool.again_from(3)), (Some(3), 1));
    }

    #[test]
    fn without_a_budget_for_its_retry_an_event_keeps_back_those_behind_it_and_no_others() {
        let now = Instant::now();
        let (mut pool, mut spent) = (pool(), Budget::new(now));
        let (window, _) = pool.window(Some(&mut spent), now, 1);
        assert_eq!(positions(&window), [1]);
        pool.again(&window[0], &mut spent);
        while spent.take(0, now) {}
        assert_eq!(positions(&pool.window(None, now, 1).0), [2]);
        assert_eq!(positions(&pool.window(Some(&mut spent), now, 10).0), [5]);
    }

    #[test]
    fn a_suspect_goes_out_by_itself() {
        let now = Instant::now();
        let (mut pool, mut budget) = (pool(), Budget::new(now));
        let (window, _) = pool.window(Some(&mut budget), now, 10);
        assert_eq!(positions(&window), [1, 2, 5]);
        for event in &window {
            pool.again(event, &mut budget);
        }
        pool.suspect(&window[0]);
        let (first, route) = pool.window(Some(&mut budget), now, 10);
        assert_eq!((positions(&first), route), (vec![1], Route::Quarantine));
        let (others, route) = pool.window(Some(&mut budget), now, 10);
        assert_eq!((positions(&others), route), (vec![2, 5], Route::Lane));
    }

    #[test]
    fn the_end_is_behind_what_was_read() {
        let now = Instant::now();
        let (mut pool, mut budget) = (pool(), Budget::new(now));
        assert_eq!((Pool::default().next(), pool.next()), (None, Some(1)));
        while !pool.is_empty() {
            for event in pool.window(Some(&mut budget), now, 10).0 {
                pool.publish(&event);
                pool.settle(&event);
            }
        }
        assert_eq!((pool.next(), pool.again_from(8), pool.bytes, pool.ready()), (Some(8), 0, 0, 0));
    }
}
