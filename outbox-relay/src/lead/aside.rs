//! Events that are to be set aside. An erasure that is under way keeps that from being done for as long as its transaction
//! is open; meanwhile they wait here, and everything else goes on.

use std::time::{Duration, Instant};

use super::Lead;
use crate::{
    evidence::{EventKind, PublishFailure},
    failpoint,
    parked::Parking,
    queue::{Item, StoredIn},
    session::SessionError,
    unreadable,
};

/// How long the first try waits for erasures to end. Each later one waits for twice as long, up to the longest: erasures
/// that come meanwhile queue up behind it, so among many short ones it has its turn.
const SHORTEST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_millis(800);
/// Between two tries there is so many times the time of one: publishing stands still for no larger part than this.
const REST: u32 = 10;

/// What is to be set aside.
#[derive(Debug)]
pub(super) struct ToPark {
    events: Vec<Event>,
    wait: Duration,
    at: Instant,
}

#[derive(Debug)]
struct Event {
    parking: Parking,
    stored_in: StoredIn,
    kind: EventKind,
}

impl ToPark {
    pub(super) fn new(now: Instant) -> Self {
        Self { events: Vec::new(), wait: SHORTEST, at: now }
    }

    /// How many.
    pub(super) fn len(&self) -> usize {
        self.events.len()
    }

    /// The positions of those that have a row already.
    pub(super) fn rows(&self) -> impl Iterator<Item = i64> {
        let events = self.events.iter().filter(|event| event.stored_in != StoredIn::Outbox);
        events.map(|event| event.parking.position)
    }

    /// It was in vain: the next try comes later, and waits for longer.
    fn later(&mut self, now: Instant) {
        if self.wait == SHORTEST {
            tracing::info!(
                events = self.len(),
                "events are set aside later, because an erasure is under way; publishing goes on"
            );
        }
        self.at = now + self.wait * REST;
        self.wait = (self.wait * 2).min(LONGEST);
    }
}

impl Lead<'_> {
    /// How many are to be set aside, of those that were published and of those that cannot be read.
    pub(super) fn to_park(&self) -> usize {
        self.to_park.len() + self.session.unreadable()
    }

    /// Sets these aside, now or later.
    pub(super) async fn park(
        &mut self,
        park: Vec<(Item, PublishFailure, String)>,
    ) -> Result<(), SessionError> {
        if park.is_empty() {
            return Ok(());
        }
        tracing::debug!(events = park.len(), detail = park[0].2, "set aside");
        self.to_park.events.extend(park.into_iter().map(|(item, reason, detail)| Event {
            parking: Parking { position: item.event.position, reason, detail },
            stored_in: item.stored_in,
            kind: EventKind::of(&item.event),
        }));
        self.park_if_due().await
    }

    /// When to try again; none when there is nothing to set aside.
    pub(super) fn park_at(&self) -> Option<Instant> {
        (self.to_park() > 0).then_some(self.to_park.at)
    }

    /// Tries to set aside what is to be.
    pub(super) async fn park_if_due(&mut self) -> Result<(), SessionError> {
        if self.park_at().is_none_or(|at| at > Instant::now()) {
            return Ok(());
        }
        let wait = self.to_park.wait;
        if self.session.unreadable() > 0 {
            let Some(rows) = self.session.set_unreadable_aside(wait).await? else {
                self.to_park.later(Instant::now());
                return Ok(());
            };
            unreadable::report(&rows);
            self.series.set_aside(PublishFailure::Refused, rows.len() as u64);
            self.parked += i64::try_from(rows.len()).unwrap_or(i64::MAX);
        }
        if self.to_park.events.is_empty() {
            self.to_park.wait = SHORTEST;
            return Ok(());
        }
        let parkings: Vec<Parking> = self.to_park.events.iter().map(|event| event.parking.clone()).collect();
        if !self.session.park(&parkings, wait).await? {
            self.to_park.later(Instant::now());
            return Ok(());
        }
        self.to_park.wait = SHORTEST;
        failpoint::hit("park");
        let events = std::mem::take(&mut self.to_park.events);
        self.parked += i64::try_from(events.len()).unwrap_or(0);
        let (mut waited, mut kinds) = (Vec::new(), Vec::new());
        for Event { parking, stored_in, kind } in events {
            self.series.set_aside(parking.reason, 1);
            match stored_in {
                StoredIn::Outbox => self.session.settle(parking.position),
                StoredIn::Waiting => {
                    waited.push(parking.position);
                    kinds.push((kind, 1));
                }
                StoredIn::Parked => {}
            }
        }
        if !waited.is_empty() {
            self.session.release_next(&waited).await?;
            self.subtract_waiting(kinds);
            self.load_at = Instant::now();
        }
        Ok(())
    }
}
