//! A page of history on its way: what of it may go out next, and what was tried before. No I/O.

use std::{collections::HashSet, sync::Arc, time::Instant};

use crate::{budget::Budget, event::Event};

/// A page that is being published.
pub(super) struct Page {
    /// What is not settled, in order of position.
    pub(super) left: Vec<Arc<Event>>,
    /// Positions of what was tried before: from then on it is a retry.
    pub(super) tried: HashSet<i64>,
    /// Positions of what the broker has.
    pub(super) published: Vec<i64>,
    /// The broker refused one of several events: from then on each goes out by itself.
    pub(super) alone: bool,
}

impl Page {
    pub(super) fn new(events: Vec<Event>) -> Self {
        Self {
            left: events.into_iter().map(Arc::new).collect(),
            tried: HashSet::new(),
            published: Vec::new(),
            alone: false,
        }
    }

    /// What is published at once: of each aggregate its first event, so that none overtakes another that is tried
    /// again; of each id one, by which a returned message is known; and no more retries than the budget allows.
    pub(super) fn window(&self, budget: &mut Budget, now: Instant) -> Vec<Arc<Event>> {
        let (mut aggregates, mut ids, mut window) = (HashSet::new(), HashSet::new(), Vec::new());
        for event in &self.left {
            let first =
                aggregates.insert((&event.aggregate_type, &event.aggregate_id)) && ids.insert(event.id);
            if first && (!self.tried.contains(&event.position) || budget.take(event.size(), now)) {
                window.push(Arc::clone(event));
                if self.alone {
                    break;
                }
            }
        }
        window
    }

    /// It was not taken, or it is not known.
    pub(super) fn again(&mut self, event: &Event, budget: &mut Budget) {
        if !self.tried.insert(event.position) {
            budget.failed();
        }
    }

    pub(super) fn settle(&mut self, event: &Event) {
        self.left.retain(|left| left.position != event.position);
    }

    pub(super) fn first_left(&self) -> Option<i64> {
        self.left.first().map(|event| event.position)
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_window_has_one_event_of_each_aggregate() {
        let event = |position: i64, aggregate: &str, id: u128| Event {
            position,
            id: Uuid::from_u128(id),
            aggregate_type: "thing".to_owned(),
            aggregate_id: aggregate.to_owned(),
            version: position,
            type_: "thing.changed".to_owned(),
            payload: "{}".into(),
            headers: None,
            created_at: DateTime::UNIX_EPOCH,
        };
        let events =
            [event(1, "a", 1), event(2, "b", 2), event(3, "a", 3), event(4, "c", 2), event(5, "d", 5)];
        let now = Instant::now();
        let split = |alone, tried: &[i64], budget: &mut Budget| {
            let mut page = Page::new(events.to_vec());
            page.alone = alone;
            page.tried.extend(tried);
            page.window(budget, now).iter().map(|event| event.position).collect::<Vec<_>>()
        };
        assert_eq!(split(false, &[], &mut Budget::new(now)), [1, 2, 5]);
        assert_eq!(split(true, &[], &mut Budget::new(now)), [1]);
        // Without a budget for its retry, an event keeps back those behind it, and no others.
        let mut spent = Budget::new(now);
        while spent.take(0, now) {}
        assert_eq!(split(false, &[1], &mut spent), [2, 5]);
        assert_eq!(split(true, &[1], &mut spent), [2]);
    }
}
