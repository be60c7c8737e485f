//! What was lost when a database went back in time.

use std::collections::{BTreeMap, HashMap, HashSet};

use uuid::Uuid;

use crate::{
    event::{AggregateKey, PositionRange},
    model::Person,
    oracle::Outbox,
};

/// The time between a backup and its restore, or between the last commit that a standby received and its promotion.
#[derive(Debug)]
pub(crate) struct LostTime {
    pub(crate) person: Loss,
    /// If the database of scores went back as well.
    pub(crate) score: Option<Loss>,
    /// The versions of persons that the database has after it went back. What the clients did before is forgotten.
    pub(crate) known: HashSet<(String, i64)>,
    /// The persons that live in it.
    pub(crate) living: HashSet<Uuid>,
    /// Where notes may have been parked in the lost time.
    pub(crate) parked_notes: Vec<PositionRange>,
}

/// What one outbox lost.
#[derive(Debug)]
pub(crate) struct Loss {
    pub(crate) source: &'static str,
    /// The events that were committed and are not there any more.
    pub(crate) events: HashMap<Uuid, LostEvent>,
    /// The last position that was taken, after it went back.
    pub(crate) restored_position: i64,
    /// The last position when the procedure had ended.
    pub(crate) recovered_position: i64,
    /// The incarnation that began.
    pub(crate) incarnation: i64,
    /// What has a higher position is published under that incarnation or a later one.
    pub(crate) from_position: i64,
}

/// An event that was committed and is not there any more.
#[derive(Debug)]
pub(crate) struct LostEvent {
    pub(crate) key: AggregateKey,
    pub(crate) version: i64,
    pub(crate) position: i64,
}

impl LostTime {
    /// Of an outbox and of the persons as they are after the database went back.
    pub(crate) fn new(
        person: Loss,
        score: Option<Loss>,
        restored: &Outbox,
        living: &BTreeMap<Uuid, Person>,
    ) -> Self {
        let known = restored.events.keys().filter(|((type_, _), _)| type_ == "person");
        Self {
            person,
            score,
            known: known.map(|((_, id), version)| (id.clone(), *version)).collect(),
            living: living.keys().copied().collect(),
            parked_notes: Vec::new(),
        }
    }

    /// Whether the procedure may have ended this person at this position, because the database does not have it.
    pub(crate) fn has_ended(&self, person: &str, position: i64) -> bool {
        let lives = person.parse().is_ok_and(|id| self.living.contains(&id));
        !lives && self.person.may_have_written(position)
    }

    /// The same, to complete it.
    pub(crate) fn of_mut(&mut self, source: &str) -> Option<&mut Loss> {
        [Some(&mut self.person), self.score.as_mut()].into_iter().flatten().find(|loss| loss.source == source)
    }

    /// What this source lost.
    pub(crate) fn of(&self, source: &str) -> Option<&Loss> {
        [Some(&self.person), self.score.as_ref()].into_iter().flatten().find(|loss| loss.source == source)
    }
}

impl Loss {
    /// What an outbox had before it went back, and does not have afterwards.
    pub(crate) fn between(source: &'static str, before: Outbox, after: &Outbox) -> Self {
        let left: HashSet<Uuid> = after.events.values().map(|event| event.summary.id).collect();
        let lost = before.events.into_iter().filter(|(_, event)| !left.contains(&event.summary.id));
        let events = lost.map(|((key, version), event)| {
            (event.summary.id, LostEvent { key, version, position: event.position })
        });
        let (restored_position, recovered_position) = (after.last_position, i64::MAX);
        let (incarnation, from_position) = (1, 0);
        let events = events.collect();
        Self { source, events, restored_position, recovered_position, incarnation, from_position }
    }

    /// Whether the procedure may have written the event at this position.
    pub(crate) fn may_have_written(&self, position: i64) -> bool {
        position > self.restored_position && position <= self.recovered_position
    }
}
