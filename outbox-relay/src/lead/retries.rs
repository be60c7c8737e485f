//! Events with rows in `outbox.parked`: those that leave the memory for one, and those that come back from there.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use super::Lead;
use crate::{
    event::Event,
    evidence::EventKind,
    parked::ParkedQuery,
    queue::StoredIn,
    series::number,
    session::SessionError,
    waiting::{WaitingCounts, WaitingQuery},
};

/// How often a leader looks for events with rows that are due, once there are any.
const LOAD_INTERVAL: Duration = Duration::from_secs(1);
/// As many events may wait in memory, and no more than a part of all.
const IN_MEMORY: usize = 500;
/// Events with rows that are in memory at most, before more of them are read.
const ROWS: usize = 1_000;
/// Of a kind that waits, so many first events that were not tried yet are read at once.
const UNTRIED: i64 = 200;
/// What waits is counted again after so long: a command may have taken some of it away.
const COUNT_AGAIN: Duration = Duration::from_mins(1);
/// So many rows are counted less often.
const MANY: i64 = 100_000;

impl Lead<'_> {
    /// Whether there is anything in `outbox.parked`.
    pub(super) fn has_rows(&self) -> bool {
        self.parked > 0 || !self.waiting.is_empty()
    }

    /// How many events of a kind that may wait no more.
    pub(super) fn full(&self) -> Option<(&EventKind, i64)> {
        let limit = self.relay.limits.waiting;
        self.waiting.iter().find(|(_, count)| **count >= limit).map(|(kind, count)| (kind, *count))
    }

    /// Has what waits for long, or is too much, leave the memory.
    pub(super) async fn spill(&mut self) -> Result<(), SessionError> {
        let most = (self.relay.limits.events / 16).clamp(1, IN_MEMORY);
        let (waiting, limit) = (&self.waiting, self.relay.limits.waiting);
        let may = |kind: &EventKind| waiting.get(kind).is_none_or(|count| *count < limit);
        let spilled = self.queue.spill(most, Instant::now(), may);
        if spilled.is_empty() {
            return Ok(());
        }
        let more = self.session.spill(&spilled).await?;
        tracing::debug!(events = spilled.len(), detail = spilled[0].detail, "they wait in outbox.parked");
        for event in &spilled {
            self.session.settle(event.position);
        }
        self.add_waiting(more);
        Ok(())
    }

    /// Of what was read, has those wait whose aggregate does. Returns their positions.
    pub(super) async fn divert(&mut self, events: &[Event]) -> Result<HashSet<i64>, SessionError> {
        if self.waiting.is_empty() || events.is_empty() {
            return Ok(HashSet::new());
        }
        let positions: Vec<i64> = events.iter().map(|event| event.position).collect();
        let (diverted, more) = self.session.divert(&positions).await?;
        for position in &diverted {
            self.session.settle(*position);
        }
        self.add_waiting(more);
        Ok(diverted.into_iter().collect())
    }

    /// Counts what waits.
    pub(super) async fn count_waiting(&mut self) -> Result<(), SessionError> {
        self.waiting = self.session.count_waiting().await?;
        self.counted = Instant::now();
        Ok(())
    }

    /// Fetches what is due of what is set aside, and of what waits.
    pub(super) async fn load_retries(&mut self) -> Result<(), SessionError> {
        let again = if self.waiting.values().sum::<i64>() < MANY { COUNT_AGAIN } else { COUNT_AGAIN * 10 };
        if self.counted.elapsed() >= again {
            self.count_waiting().await?;
        }
        let mut in_memory = self.queue.rows();
        in_memory.extend(self.to_park.rows());
        let mut found = 0;
        if in_memory.len() < ROWS {
            let aside =
                self.session.parked_due(ParkedQuery { flowing: &self.flowing, except: &in_memory }).await?;
            self.parked = aside.count;
            found += aside.events.len();
            for waiter in aside.events {
                self.queue.add_stored(waiter, StoredIn::Parked, Instant::now());
            }
            found += self.load_waiting(&in_memory).await?;
        }
        if found == 0 && in_memory.is_empty() {
            self.flowing.clear();
        }
        // More of what flows right away.
        let pause = if self.flowing.is_empty() || found == 0 { LOAD_INTERVAL } else { Duration::ZERO };
        self.load_at = Instant::now() + pause;
        self.series.parked.set(number(self.parked));
        Ok(())
    }

    async fn load_waiting(&mut self, in_memory: &HashSet<i64>) -> Result<usize, SessionError> {
        if self.waiting.is_empty() {
            return Ok(0);
        }
        let flows = self.queue.evidence.flows();
        let open = self.queue.open(Instant::now()).saturating_sub(self.queue.retries());
        let wanted = WaitingQuery {
            kinds: self.waiting.keys().map(|kind| (kind, self.flowing.contains(kind))).collect(),
            // No more than the budget lets go.
            tried: if flows { i64::try_from(open).unwrap_or(i64::MAX) } else { i64::from(open > 0) },
            // What is not tried yet is free, once something is taken at all.
            untried: if flows { UNTRIED } else { 1 },
            except: in_memory.iter().copied().collect(),
        };
        let waiters = self.session.waiting_due(&wanted).await?;
        let found = waiters.len();
        for waiter in waiters {
            self.queue.add_stored(waiter, StoredIn::Waiting, Instant::now());
        }
        Ok(found)
    }

    fn add_waiting(&mut self, more: WaitingCounts) {
        for (kind, n) in more.into_iter().filter(|(_, n)| *n > 0) {
            *self.waiting.entry(kind).or_default() += n;
        }
    }
}
