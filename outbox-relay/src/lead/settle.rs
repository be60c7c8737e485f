//! Settling what was published, and storing how far that is.

use std::time::Instant;

use chrono::Utc;
use serde_json::json;

use super::{Lead, SAVE_INTERVAL};
use crate::{
    condition::BrokerError,
    evidence::{EventKind, PublishFailure},
    failpoint,
    publish::Published,
    queue::{Item, Lost, Outcome, StoredIn, Window, pause},
    session::SessionError,
};

/// The end of a burst of at least so many events is stored at once: a restart would publish all of them again.
const BURST: u64 = 1_000;

impl Lead<'_> {
    /// Acts on what became of each event of a window.
    pub(super) async fn settle(&mut self, window: Window, published: Published) -> Result<(), SessionError> {
        let (route, bytes) = (window.route, window.bytes());
        let mut known = Vec::with_capacity(window.items.len());
        let mut unknown = Vec::new();
        for (item, fate) in window.items.into_iter().zip(published.fates) {
            match fate {
                Some(fate) => known.push((item, fate)),
                None => unknown.push(item),
            }
        }
        match published.ended {
            Some(BrokerError::Refused { .. }) => self.queue.lost(unknown, Lost::Suspect),
            // Which of them have no answer themselves is known.
            Some(BrokerError::Silent(_)) if !known.is_empty() => self.queue.lost(unknown, Lost::Unbegun),
            Some(BrokerError::NoLease) | None => self.queue.lost(unknown, Lost::Unbegun),
            Some(_) => self.queue.lost(unknown, Lost::Connection),
        }
        self.queue.ended(route, bytes);
        let to_park = i64::try_from(self.to_park()).unwrap_or(i64::MAX);
        let may_park = self.relay.limits.parked - self.parked - to_park;
        let outcome = self.queue.settle(known, may_park, Instant::now());
        self.store(outcome).await
    }

    /// In the database first: what is lost on the way is published again.
    async fn store(&mut self, outcome: Outcome) -> Result<(), SessionError> {
        let Outcome { confirmed, dropped, park, postpone } = outcome;
        self.confirmed += confirmed.len() as u64;
        for item in &confirmed {
            let delay = (Utc::now() - item.event.created_at).to_std().unwrap_or_default();
            self.series.delay.record(delay);
            if item.stored_in != StoredIn::Outbox {
                self.flowing.insert(EventKind::of(&item.event));
            }
        }
        for item in &dropped {
            self.session.drop(item.event.position);
        }
        self.park(park).await?;
        let rows = |row: StoredIn| {
            let taken = confirmed.iter().chain(&dropped).filter(move |item| item.stored_in == row);
            taken.map(|item| item.event.position)
        };
        let set_aside = rows(StoredIn::Parked).count();
        let gone: Vec<i64> = rows(StoredIn::Waiting).chain(rows(StoredIn::Parked)).collect();
        if !gone.is_empty() {
            let waited = self.session.remove_rows(&gone).await?;
            self.parked -= i64::try_from(set_aside).unwrap_or(0);
            self.subtract_waiting(waited);
            self.load_at = Instant::now();
        }
        self.postpone(postpone).await?;
        for item in confirmed.iter().chain(&dropped).filter(|item| item.stored_in == StoredIn::Outbox) {
            self.session.settle(item.event.position);
        }
        self.series.confirmed(confirmed.len());
        self.series.dropped.increment(dropped.len() as u64);
        Ok(())
    }

    /// Rows whose events were not taken once more.
    async fn postpone(&mut self, postpone: Vec<(Item, PublishFailure, String)>) -> Result<(), SessionError> {
        let (mut in_vain, mut longer) = (Vec::new(), Vec::new());
        for (item, failure, why) in postpone {
            let position = item.event.position;
            self.flowing.remove(&EventKind::of(&item.event));
            match (item.stored_in, failure) {
                (StoredIn::Parked, PublishFailure::Refused) => {
                    self.session.refuse_parked(position, &why).await?;
                }
                (StoredIn::Parked, _) => in_vain.push(position),
                _ => {
                    longer.push((position, failure, why, pause(failure, item.tries, position).as_secs_f64()));
                }
            }
        }
        if !in_vain.is_empty() {
            self.session.postpone_parked(&in_vain).await?;
        }
        if !longer.is_empty() {
            self.session.postpone_waiting(&longer).await?;
        }
        Ok(())
    }

    /// Fewer events of these kinds wait.
    pub(super) fn subtract_waiting(&mut self, kinds: impl IntoIterator<Item = (EventKind, i64)>) {
        for (kind, n) in kinds {
            if let Some(count) = self.waiting.get_mut(&kind) {
                *count -= n;
                if *count <= 0 {
                    self.waiting.remove(&kind);
                }
            }
        }
    }

    pub(super) async fn save_if_due(&mut self) -> Result<(), SessionError> {
        let interval = if self.session.has_progress() { SAVE_INTERVAL } else { self.heartbeat() };
        let end_of_burst = self.queue.events() == 0 && self.confirmed - self.saved_confirmed >= BURST;
        if end_of_burst || self.saved.elapsed() >= interval.min(self.heartbeat()) {
            let waiting: Vec<_> = self
                .relay
                .health
                .reasons()
                .into_iter()
                .map(|said| json!({"part": said.part, "reason": said.reason, "seconds": said.seconds}))
                .collect();
            self.stored_reasons = json!(waiting).to_string();
            let progress = self.session.has_progress();
            self.session.save(&self.stored_reasons).await?;
            (self.saved, self.saved_confirmed) = (Instant::now(), self.confirmed);
            if progress {
                failpoint::hit("save");
            }
        }
        Ok(())
    }

    /// With nothing to store, the leader's row is written this often: it keeps the lease, and tells that
    /// the database and the leadership are still there.
    pub(super) fn heartbeat(&self) -> std::time::Duration {
        self.relay.lease / 3
    }
}
