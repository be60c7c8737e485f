//! An aggregate's version and held events in memory, and the decision about an event.

use std::{collections::BTreeMap, fmt};

use uuid::Uuid;

use crate::{Event, recent::Recent};

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
    /// The event that it has to follow, as far as is known.
    pub(crate) follows: Option<Uuid>,
    /// It was received in this transaction, and is not stored yet.
    pub(crate) received: Option<&'a Event>,
}

/// How far a chain is.
#[derive(Clone, Debug)]
pub(crate) struct Reached {
    /// The last version applied; 0 when there is none.
    pub(crate) version: i64,
    /// The event that brought it there.
    pub(crate) last_event_id: Option<Uuid>,
    /// The ids of the last events.
    pub(crate) recent: Recent,
}

impl Reached {
    /// Whether another event was applied last than the one that the next event names as the one before it.
    pub(crate) fn contradicts(&self, follows: Option<Uuid>) -> bool {
        matches!((follows, self.last_event_id), (Some(follows), Some(last)) if follows != last)
    }
}

/// What there is of an aggregate in earlier incarnations of its source, while its chain in this one has not begun.
#[derive(Debug, Default)]
pub(crate) struct Earlier {
    /// The sources that have a chain of it.
    pub(crate) sources: Vec<String>,
    /// Whether one of the chains has begun and not ended, so that the handler has a state of it.
    pub(crate) has_state: bool,
}

/// An aggregate's state, as of this transaction.
#[derive(Debug)]
pub(crate) struct Chain<'a> {
    pub(crate) reached: Reached,
    /// The version that is stored.
    pub(crate) stored: i64,
    /// The held events by version: all up to `horizon`, and above it those of the received versions.
    pub(crate) held: BTreeMap<i64, Held<'a>>,
    pub(crate) horizon: i64,
    /// The version with which the aggregate ends in this transaction.
    pub(crate) ended: Option<i64>,
    /// The handler has no state of the aggregate: it was deleted.
    pub(crate) over: bool,
    earlier: Earlier,
}

/// Why an event is a suspected fork that has the next version.
pub(crate) const FOLLOWS_ANOTHER: &str = "it follows another event than the one that was applied";

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
    pub(crate) fn new(
        version: i64,
        last_event_id: Option<Uuid>,
        recent: Recent,
        over: bool,
        earlier: Earlier,
    ) -> Self {
        Self {
            reached: Reached { version, last_event_id, recent },
            stored: version,
            held: BTreeMap::new(),
            horizon: i64::MAX,
            ended: None,
            over,
            earlier,
        }
    }

    /// The last version applied; 0 when there is none.
    pub(crate) fn version(&self) -> i64 {
        self.reached.version
    }

    /// The version that continues it.
    pub(crate) fn next_version(&self) -> i64 {
        self.reached.version.saturating_add(1)
    }

    /// What to do with an event that has arrived.
    pub(crate) fn decide(&self, event: &Event) -> Decision {
        if event.version <= self.version() {
            return if self.contradicts(event) {
                Decision::Fork("another event of this version was applied")
            } else {
                Decision::Duplicate
            };
        }
        if self.follows_another(event) {
            return Decision::Fork(FOLLOWS_ANOTHER);
        }
        let due = self.takes(event);
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

    /// Whether an event above the last version may be applied. Over a state of an earlier incarnation, the chain begins
    /// only with an event that says what the aggregate is now: an unmarked first event may be from the lost time.
    pub(crate) fn takes(&self, event: &Event) -> bool {
        event.jumps()
            || event.version == self.next_version() && (!self.begins_anew() || event.is_chain_start())
    }

    /// Whether the next event begins the chain over a state of an earlier incarnation.
    pub(crate) fn begins_anew(&self) -> bool {
        self.version() == 0 && self.earlier.has_state
    }

    /// The sources of the earlier chains that this one replaces, once it has begun in this transaction.
    pub(crate) fn replaces(&self) -> &[String] {
        let begun = self.stored == 0 && self.version() > 0;
        if begun { &self.earlier.sources } else { &[] }
    }

    /// What is held for the next version.
    pub(crate) fn next(&self) -> Next<'_, 'a> {
        let next = self.next_version();
        match self.held.get(&next) {
            // It would have been tried, if it could begin the chain.
            Some(held) if self.begins_anew() && !held.reason.blocks() => Next::Nothing,
            Some(held) => Next::Event(held),
            None if next > self.horizon => Next::Unknown,
            None => Next::Nothing,
        }
    }

    /// The event `id` is applied: it is where the chain stands now.
    pub(crate) fn advance(&mut self, version: i64, id: Uuid) {
        let jumped = version != self.next_version();
        self.reached.recent.push(id, jumped);
        self.reached.version = version;
        self.reached.last_event_id = Some(id);
    }

    /// The event was applied: whether the handler has a state of the aggregate now.
    pub(crate) fn applied(&mut self, event: &Event) {
        if event.ends() {
            self.ended = Some(event.version);
        }
        if !event.is_erased() {
            self.over = event.ends();
        }
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

    /// Whether the event has the next version and names another event before it than the one that was applied. An event
    /// that replaces the whole state needs none before it.
    pub(crate) fn follows_another(&self, event: &Event) -> bool {
        event.version == self.next_version() && self.reached.contradicts(event.follows())
    }

    /// Whether another event than this one is known to have been applied at its version.
    fn contradicts(&self, event: &Event) -> bool {
        let Reached { version, last_event_id, recent } = &self.reached;
        if event.version == *version {
            return *last_event_id != Some(event.id);
        }
        recent.contradicts(version - event.version, event.id)
    }
}
