//! An aggregate's version and held events in memory, and the decision about an event.

use std::{collections::BTreeMap, fmt};

use chrono::TimeDelta;
use uuid::Uuid;

use crate::{Event, message::made_at};

/// How much later an event must have been made than the last one applied to contradict it with a lower
/// version. Clocks of two writers differ, and ids of one millisecond have no order; a real fork that
/// hides below this shows itself when its chain comes to the version applied last.
const CLOCK_TOLERANCE: TimeDelta = TimeDelta::seconds(10);

/// An aggregate of a source: the key of a chain of versions.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, sqlx::FromRow)]
pub struct Key {
    /// The source with its incarnation.
    pub source: String,
    /// The type of the aggregate.
    pub aggregate_type: String,
    /// The id of the aggregate.
    pub aggregate_id: String,
}

/// For people, without the source. Control characters, with which a message could forge a line, are escaped.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", escape::line(&self.aggregate_type), escape::line(&self.aggregate_id))
    }
}

impl Key {
    /// As one shell word, as commands take it: `TYPE/ID`.
    ///
    /// ```
    /// let source = "shop".to_owned();
    /// let (aggregate_type, aggregate_id) = ("order".to_owned(), "7".to_owned());
    /// let order = inbox::Aggregate { source, aggregate_type, aggregate_id };
    /// assert_eq!(order.quoted(), "order/7");
    /// ```
    pub fn quoted(&self) -> String {
        escape::shell_word(&format!("{}/{}", self.aggregate_type, self.aggregate_id)).into_owned()
    }
}

impl From<&Event> for Key {
    fn from(event: &Event) -> Self {
        Self {
            source: event.source.clone(),
            aggregate_type: event.aggregate_type.clone(),
            aggregate_id: event.aggregate_id.clone(),
        }
    }
}

/// Why an event is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// An earlier version has not arrived.
    Gap,
    /// An earlier version is poison, or being tried.
    Behind,
    /// It is being tried alone, or its handler ended the process.
    Trying,
    /// Its handler refused it.
    Poison,
}

impl Reason {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Gap => "gap",
            Self::Behind => "behind",
            Self::Trying => "trying",
            Self::Poison => "poison",
        }
    }

    pub(crate) fn parse(text: &str) -> Self {
        match text {
            "gap" => Self::Gap,
            "behind" => Self::Behind,
            "trying" => Self::Trying,
            _ => Self::Poison,
        }
    }

    /// Whether it stops the chain: those after it wait for it, and not for something to arrive.
    pub(crate) fn blocks(self) -> bool {
        matches!(self, Self::Trying | Self::Poison)
    }
}

/// A held event.
#[derive(Clone, Debug)]
pub(crate) struct Held<'a> {
    pub(crate) id: Uuid,
    pub(crate) reason: Reason,
    pub(crate) attempts: i32,
    /// It was received in this transaction, and is not stored yet.
    pub(crate) received: Option<&'a Event>,
}

/// An aggregate's state, as of this transaction.
#[derive(Debug)]
pub(crate) struct Chain<'a> {
    /// The last version applied; 0 when there is none.
    pub(crate) version: i64,
    /// The event that brought it there.
    pub(crate) last_event_id: Option<Uuid>,
    /// The version that is stored.
    pub(crate) stored: i64,
    /// The held events by version: all up to `horizon`, and above it those of the received versions.
    pub(crate) held: BTreeMap<i64, Held<'a>>,
    pub(crate) horizon: i64,
    /// The version with which the aggregate ends in this transaction.
    pub(crate) ended: Option<i64>,
}

/// What the table of [`Sequencer`](crate::Sequencer) says about an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    Duplicate,
    /// A suspected fork, and why.
    Fork(&'static str),
    Apply,
    /// It is next, and an attempt did not return.
    Tried,
    Hold,
}

/// The held event for a chain's next version.
pub(crate) enum Next<'c, 'a> {
    Nothing,
    /// More is held than was read.
    Unknown,
    Event(&'c Held<'a>),
}

impl<'a> Chain<'a> {
    pub(crate) fn new(version: i64, last_event_id: Option<Uuid>) -> Self {
        Self {
            version,
            last_event_id,
            stored: version,
            held: BTreeMap::new(),
            horizon: i64::MAX,
            ended: None,
        }
    }

    /// What to do with an event that has arrived.
    pub(crate) fn decide(&self, event: &Event) -> Decision {
        let next = self.version.saturating_add(1);
        if event.version < next {
            return match self.contradiction(event) {
                Some(detail) => Decision::Fork(detail),
                None => Decision::Duplicate,
            };
        }
        let due = event.version == next || event.jumps();
        match self.held.get(&event.version) {
            Some(held) if held.id != event.id => {
                Decision::Fork("another event of this version is held already")
            }
            // It was refused already. Another delivery is no other attempt.
            Some(Held { reason: Reason::Poison, .. }) => Decision::Duplicate,
            Some(Held { reason: Reason::Trying, .. }) if due => Decision::Tried,
            Some(_) if !due => Decision::Duplicate,
            _ if due => Decision::Apply,
            _ => Decision::Hold,
        }
    }

    /// What is held for the next version.
    pub(crate) fn next(&self) -> Next<'_, 'a> {
        let next = self.version.saturating_add(1);
        match self.held.get(&next) {
            Some(held) => Next::Event(held),
            None if next > self.horizon => Next::Unknown,
            None => Next::Nothing,
        }
    }

    /// The event `id` is applied: it is where the chain stands now.
    pub(crate) fn advance(&mut self, version: i64, id: Uuid) {
        self.version = version;
        self.last_event_id = Some(id);
    }

    /// What those wait for that are held above where the chain stands.
    pub(crate) fn waits(&self) -> Reason {
        match self.next() {
            Next::Event(held) if held.reason.blocks() => Reason::Behind,
            _ => Reason::Gap,
        }
    }

    /// Whether anything of it is stored in `inbox.held`.
    pub(crate) fn has_stored(&self) -> bool {
        self.held.values().any(|held| held.received.is_none())
    }

    /// Why an event at or below the version applied last cannot be a mere duplicate.
    fn contradiction(&self, event: &Event) -> Option<&'static str> {
        let last = self.last_event_id?;
        if event.version == self.version {
            return (event.id != last).then_some("another event of this version was applied");
        }
        let later = made_at(event.id)? > made_at(last)? + CLOCK_TOLERANCE;
        later.then_some("it was made later than an event of a higher version that was applied")
    }
}
