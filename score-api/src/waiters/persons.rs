//! The persons that readers wait for, and their known versions.

use std::collections::{HashMap, HashSet};

use tokio::sync::watch;
use uuid::Uuid;

use crate::read_model::ReadError;

/// The persons that readers wait for.
#[derive(Default)]
pub(super) struct Persons {
    seen: HashMap<Uuid, watch::Sender<Seen>>,
    /// Persons with a new reader since the last look began.
    fresh: HashSet<Uuid>,
    /// How many looks have begun.
    looks: u64,
}

/// The known state of a person.
#[derive(Clone, Copy, Default)]
pub(super) struct Seen {
    /// The last look for the person that has ended, and its result.
    pub(super) look: u64,
    pub(super) result: LookResult,
    /// The version that the last answered look has found.
    pub(super) version: Option<i64>,
}

/// How a look ended.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum LookResult {
    #[default]
    Answered,
    Unavailable,
    Defect,
}

/// One look for several persons.
pub(super) struct Look {
    number: u64,
    pub(super) persons: Vec<Uuid>,
    fresh: HashSet<Uuid>,
}

impl Persons {
    /// Whether no reader waits.
    pub(super) fn is_empty(&self) -> bool {
        self.seen.is_empty()
    }

    /// Subscribes to a person's state, and returns the number of the next look.
    pub(super) fn subscribe(&mut self, person: Uuid) -> (watch::Receiver<Seen>, u64) {
        self.fresh.insert(person);
        let seen = self.seen.entry(person).or_default();
        if seen.receiver_count() == 0 {
            // Without readers, the state is out of date.
            seen.send_replace(Seen::default());
        }
        (seen.subscribe(), self.looks + 1)
    }

    /// Begins a look for `all` persons, or only for those with new readers. Forgets persons without readers.
    pub(super) fn begin(&mut self, all: bool) -> Look {
        self.looks += 1;
        let fresh = std::mem::take(&mut self.fresh);
        let persons = if all {
            self.seen.retain(|_, seen| seen.receiver_count() > 0);
            self.seen.keys().copied().collect()
        } else {
            fresh.iter().copied().collect()
        };
        Look { number: self.looks, persons, fresh }
    }

    /// Stores what a look has found, and wakes only the readers for whom it is new: a look for thousands of persons that
    /// finds one must not wake them all.
    pub(super) fn end(&mut self, look: &Look, found: Result<Vec<(Uuid, Option<i64>)>, ReadError>) {
        let result = match &found {
            Ok(_) => LookResult::Answered,
            Err(ReadError::Unavailable) => LookResult::Unavailable,
            Err(ReadError::Defect(error)) => {
                tracing::error!(%error, "the versions could not be read");
                LookResult::Defect
            }
        };
        let found: HashMap<Uuid, Option<i64>> = found.unwrap_or_default().into_iter().collect();
        for person in &look.persons {
            let Some(seen) = self.seen.get(person) else { continue };
            seen.send_if_modified(|seen| {
                let before = seen.version;
                let version = found.get(person).copied().unwrap_or(before);
                *seen = Seen { look: look.number, result, version };
                look.fresh.contains(person) || version != before
            });
        }
    }
}
