//! Waiting costs rows, not memory: what waits for long, or beyond a small number, leaves the memory for
//! `outbox.parked`.

use std::time::{Duration, Instant};

use super::{AggregateState, Queue, StoredIn, outcome::pause};
use crate::{evidence::EventKind, waiting::Spilled};

/// What waits for longer leaves the memory, so that the low-water mark, and retention with it, go on.
const LONGEST: Duration = Duration::from_secs(10);

impl Queue {
    /// How many events wait for another try, or behind one that does.
    pub fn waiting(&self) -> usize {
        let ids = self.waiting_ids().filter_map(|id| self.aggregates.get(&id));
        ids.flat_map(|aggregate| &aggregate.items).filter(|item| item.stored_in != StoredIn::Parked).count()
    }

    /// Whether an event in memory is not settled: it waits, or is under way.
    pub fn has_unsettled(&self) -> bool {
        let mut items =
            self.aggregates.values().flat_map(|aggregate| aggregate.items.iter().chain(&aggregate.in_flight));
        items.any(|item| item.stored_in != StoredIn::Parked)
    }

    /// Takes what waits out of the memory: all of it when that is more than `most`, and what waits for long. A kind
    /// stays that may not have more rows.
    pub fn spill(&mut self, most: usize, now: Instant, may: impl Fn(&EventKind) -> bool) -> Vec<Spilled> {
        let all = self.waiting() > most;
        let mut spilled = Vec::new();
        for id in self.waiting_ids().collect::<Vec<_>>() {
            let Some(aggregate) = self.aggregates.get(&id) else { continue };
            let Some(first) = aggregate.items.front() else { continue };
            let old = first.trouble.as_ref().is_some_and(|t| now.duration_since(t.since) >= LONGEST);
            if !(all || old)
                || aggregate.items.iter().any(|item| item.stored_in != StoredIn::Outbox)
                || !may(&EventKind::of(&first.event))
            {
                continue;
            }
            self.leave(id);
            let Some(aggregate) = self.aggregates.remove(&id) else { continue };
            for (n, item) in aggregate.items.into_iter().enumerate() {
                self.events -= 1;
                self.bytes -= item.event.size();
                let position = item.event.position;
                if let Some(trouble) = &item.trouble {
                    self.remember(position, trouble.first);
                }
                let tried = item.trouble.as_ref();
                spilled.push(Spilled {
                    position,
                    kind: EventKind::of(&item.event),
                    reason: tried.map_or("behind", |trouble| trouble.failure.as_str()),
                    detail: tried.map_or_else(String::new, |trouble| trouble.why.clone()),
                    tries: item.tries,
                    retry: (n == 0)
                        .then(|| tried.map_or(Duration::ZERO, |t| pause(t.failure, item.tries, position))),
                });
            }
        }
        spilled
    }

    fn waiting_ids(&self) -> impl Iterator<Item = u64> {
        let blocked =
            self.blocked.values().flatten().filter(|id| self.has_state(**id, AggregateState::Blocked));
        let quarantined =
            self.quarantine.iter().filter(|id| self.has_state(**id, AggregateState::Quarantine));
        self.retries.ids().chain(blocked.chain(quarantined).copied())
    }

    fn has_state(&self, id: u64, state: AggregateState) -> bool {
        self.aggregates.get(&id).is_some_and(|aggregate| aggregate.state == state)
    }
}
