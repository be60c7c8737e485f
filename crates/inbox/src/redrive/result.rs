//! What a redrive came to.

use std::collections::BTreeMap;

use serde::Serialize;
use uuid::Uuid;

use crate::{
    Event,
    chain::{FOLLOWS_ANOTHER, Key},
    rollback::Rollback,
};

/// How many aggregates and how many errors a summary lists.
const LISTED: usize = 100;

/// The result for one aggregate.
#[derive(Clone, Debug, Serialize)]
pub struct RedrivenAggregate {
    /// The aggregate.
    #[serde(flatten)]
    pub aggregate: Key,
    /// Its version before.
    pub from: i64,
    /// Its version now.
    pub to: i64,
    /// How many events were applied.
    pub applied: u64,
    /// How many of its events are still held.
    pub held: i64,
    /// The event that was refused again, or that is rejected as a suspected fork. The other held events wait for it.
    pub refused: Option<RefusedEvent>,
    /// More held events can be applied.
    #[serde(skip)]
    pub(crate) unfinished: bool,
}

/// An event that was refused again.
#[derive(Clone, Debug, Serialize)]
pub struct RefusedEvent {
    /// Its id.
    pub event_id: Uuid,
    /// The aggregate's version.
    pub version: i64,
    /// The event type.
    #[serde(rename = "type")]
    pub type_: String,
    /// The handler's error.
    pub error: String,
}

/// The result for all aggregates.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RedriveSummary {
    /// How many aggregates were tried.
    pub aggregates: u64,
    /// How many events were applied.
    pub applied: u64,
    /// How many aggregates an event that was refused again stops.
    pub refused: u64,
    /// How many events of the aggregates are still held.
    pub held: i64,
    /// It was stopped before its end. The same redrive goes on with the rest.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub interrupted: bool,
    /// How many aggregates each error stops, for the first hundred errors.
    pub errors: BTreeMap<String, u64>,
    /// The result for each of the first hundred aggregates. Stopped aggregates replace others in this list.
    pub each: Vec<RedrivenAggregate>,
}

/// Why a redrive or a skip failed. Transactions that were committed before are kept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RedriveError {
    /// The failure passes.
    #[error("{0}; try again later")]
    Transient(String),
    /// Each attempt met a deadlock or a serialization failure.
    #[error("{0}; it was tried {ATTEMPTS} times; try again later", ATTEMPTS = outbox::database::ATTEMPTS)]
    Conflict(String),
    /// Another try would fail too.
    #[error("{0}")]
    Failed(String),
    /// The event was applied, skipped or erased meanwhile.
    #[error("it is not held any more")]
    Gone,
    /// The event is of an earlier incarnation of its source. It is deleted when its aggregate begins in the newest one.
    #[error("its source has begun a newer incarnation; the event is deleted when its aggregate begins there")]
    Superseded,
    /// Only the event that stops its aggregate can be skipped.
    #[error("its aggregate is at version {0}, and does not wait for this event")]
    NotNext(i64),
    /// The handler refuses the erased form of the event.
    #[error("the handler refuses its erased form, too: {0}")]
    Refused(String),
}

impl From<sqlx::Error> for RedriveError {
    fn from(error: sqlx::Error) -> Self {
        Rollback::from(error).into()
    }
}

impl From<Rollback> for RedriveError {
    fn from(rollback: Rollback) -> Self {
        match rollback {
            Rollback::Transient(reason) | Rollback::TooLong(reason) => Self::Transient(reason),
            Rollback::Conflict(reason) => Self::Conflict(reason),
            rollback => Self::Failed(rollback.reason()),
        }
    }
}

impl RedrivenAggregate {
    /// Of which nothing was done.
    pub(crate) fn of(aggregate: Key) -> Self {
        Self { aggregate, from: 0, to: 0, applied: 0, held: 0, refused: None, unfinished: false }
    }
}

impl RefusedEvent {
    /// A suspected fork.
    pub(crate) fn forked(event: &Event) -> Self {
        let error = FOLLOWS_ANOTHER.to_owned();
        Self { event_id: event.id, version: event.version, type_: event.type_.clone(), error }
    }
}

impl RedriveSummary {
    pub(crate) fn add(&mut self, one: RedrivenAggregate) {
        self.aggregates += 1;
        self.applied += one.applied;
        self.held += one.held;
        if let Some(refused) = &one.refused {
            self.refused += 1;
            if self.errors.len() < LISTED || self.errors.contains_key(&refused.error) {
                *self.errors.entry(refused.error.clone()).or_default() += 1;
            }
        }
        // In a full list a stopped aggregate replaces one that is not stopped.
        if self.each.len() < LISTED {
            self.each.push(one);
        } else if one.refused.is_some()
            && let Some(well) = self.each.iter().rposition(|listed| listed.refused.is_none())
        {
            self.each[well] = one;
        }
    }
}
