//! Reads that wait until the read model contains a write.
//!
//! One task polls for all of them ([`look`](Waiters::look)), and one connection listens for the projector's notices
//! ([`listen`](Waiters::listen)). Dropping a reader's future frees its slot.

mod listen;
mod look;
mod persons;
mod series;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, Semaphore, SemaphorePermit},
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use self::persons::{LookResult, Persons, Seen};
use crate::{read_model::DEADLINE, token::Token};

/// The reads that wait.
#[derive(Clone)]
pub(crate) struct Waiters(Arc<Shared>);

struct Shared {
    slots: Semaphore,
    persons: Mutex<Persons>,
    /// A reader arrived.
    came: Notify,
    /// Something may have been applied.
    applied: Notify,
    /// When the projector last notified.
    last_notice: Mutex<Option<Instant>>,
    ending: CancellationToken,
}

/// Why a wait ended without the write.
pub(crate) enum Missed {
    /// The wait is over, and the model does not contain the write.
    Behind(Behind),
    /// The wait is over, and the database does not respond.
    Unavailable,
    /// A defect, which was logged.
    Defect,
    /// All slots are taken.
    TooMany,
    /// The process shuts down.
    Ending,
}

/// The model's state after a wait in vain.
pub(crate) struct Behind {
    /// The version in `after`.
    pub(crate) asked: i64,
    /// The version in the model. None before the person's first applied event.
    pub(crate) has: Option<i64>,
    pub(crate) waited_ms: u64,
    /// How long ago the projector last notified of any applied event. None when it has not, since this program listens.
    pub(crate) last_applied_ms_ago: Option<u64>,
}

impl Missed {
    /// The label of the metric.
    fn outcome(&self) -> &'static str {
        match self {
            Self::Behind(_) => "not_there_yet",
            Self::Unavailable => "unavailable",
            Self::Defect => "defect",
            Self::TooMany => "too_many",
            Self::Ending => "ending",
        }
    }
}

impl Waiters {
    /// At most `slots` reads wait at the same time, and none once `ending` is cancelled.
    pub(crate) fn new(slots: usize, ending: CancellationToken) -> Self {
        series::begin();
        Self(Arc::new(Shared {
            slots: Semaphore::new(slots),
            persons: Mutex::default(),
            came: Notify::new(),
            applied: Notify::new(),
            last_notice: Mutex::default(),
            ending,
        }))
    }

    /// Returns as soon as the read model contains `token`. The model is read at least once. After `wait`, returns the
    /// model's state instead.
    pub(crate) async fn until_contained(&self, token: Token, wait: Duration) -> Result<(), Missed> {
        let mut slot = Slot::take(&self.0.slots)?;
        let contained = tokio::select! {
            contained = self.wait(token, wait, slot.came) => contained,
            () = self.0.ending.cancelled() => Err(Missed::Ending),
        };
        slot.outcome = contained.as_ref().map_or_else(Missed::outcome, |()| "contained");
        contained
    }

    async fn wait(&self, token: Token, wait: Duration, came: Instant) -> Result<(), Missed> {
        let (mut seen, first) = self.persons().subscribe(token.person);
        self.0.came.notify_one();
        let contains = |seen: &Seen| seen.version >= Some(token.version);
        if let Ok(Ok(_)) = timeout(wait, seen.wait_for(contains)).await {
            return Ok(());
        }
        // Also for the shortest wait: one look that began after the reader arrived.
        let looked = seen.wait_for(|seen| contains(seen) || seen.look >= first);
        let Ok(Ok(seen)) = timeout_at(came + wait.max(DEADLINE), looked).await else {
            return Err(Missed::Unavailable);
        };
        match seen.result {
            _ if contains(&seen) => Ok(()),
            LookResult::Answered => Err(Missed::Behind(self.behind(token, seen.version, came))),
            LookResult::Unavailable => Err(Missed::Unavailable),
            LookResult::Defect => Err(Missed::Defect),
        }
    }

    fn behind(&self, token: Token, has: Option<i64>, came: Instant) -> Behind {
        let millis = |since: Instant| u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        let last_notice = *self.0.last_notice.lock().unwrap_or_else(PoisonError::into_inner);
        Behind {
            asked: token.version,
            has,
            waited_ms: millis(came),
            last_applied_ms_ago: last_notice.map(millis),
        }
    }

    fn persons(&self) -> MutexGuard<'_, Persons> {
        self.0.persons.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A slot of a waiting reader, with its metrics.
struct Slot<'a> {
    _permit: SemaphorePermit<'a>,
    came: Instant,
    outcome: &'static str,
}

impl<'a> Slot<'a> {
    fn take(slots: &'a Semaphore) -> Result<Self, Missed> {
        let Ok(permit) = slots.try_acquire() else {
            metrics::counter!("score_api_waits_total", "outcome" => Missed::TooMany.outcome()).increment(1);
            return Err(Missed::TooMany);
        };
        metrics::gauge!("score_api_waiters").increment(1);
        // A reader that is dropped before its outcome has disconnected.
        Ok(Self { _permit: permit, came: Instant::now(), outcome: "hung_up" })
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        metrics::gauge!("score_api_waiters").decrement(1);
        metrics::counter!("score_api_waits_total", "outcome" => self.outcome).increment(1);
        metrics::histogram!("score_api_wait_seconds").record(self.came.elapsed());
    }
}
