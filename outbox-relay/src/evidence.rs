//! What confirms and failures prove. No I/O.
//!
//! Trouble belongs to the aggregate that has it. What else is routed like it cannot be known: bindings and
//! partitions are invisible. So an [`EventKind`] in trouble is a guess only, for "try one of these first", and one
//! confirm of a sibling that was *published after* the trouble began ends the guess. A confirm that only
//! *arrived* later proves nothing: it may have been routed before.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use crate::event::Event;

/// More kinds in trouble than this are not remembered: each is tried like a healthy one then.
const MAX_KINDS: usize = 1_000;
/// A kind for which the broker did not answer is one of those for so long, unless what had no answer is taken. It is
/// longer than the longest pause between two tries.
const SILENT: Duration = Duration::from_mins(2);

/// A moment in the relay's own order: each hand-out and each outcome takes the next one. A hand-out comes before
/// the publishing and an outcome after it, so comparing them never proves too much.
pub type Stamp = u64;

/// Events that are likely to be routed alike: of the same type and aggregate type.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EventKind {
    /// The event type.
    pub type_: String,
    /// The aggregate type.
    pub aggregate_type: String,
}

impl EventKind {
    /// The kind of an event.
    pub fn of(event: &Event) -> Self {
        Self { type_: event.type_.clone(), aggregate_type: event.aggregate_type.clone() }
    }
}

/// How an event was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PublishFailure {
    /// No queue takes it.
    Unroutable,
    /// One of the queues that take it refuses it for now.
    Nacked,
    /// The broker ends the channel over it.
    Refused,
    /// The broker does not answer: a queue that takes it has lost its majority, for example.
    Silent,
}

impl PublishFailure {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Unroutable, Self::Nacked, Self::Refused, Self::Silent];

    /// As it is stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unroutable => "unroutable",
            Self::Nacked => "nacked",
            Self::Refused => "refused",
            Self::Silent => "silent",
        }
    }

    /// What publishing it may do to others.
    pub fn danger(self) -> Danger {
        match self {
            Self::Unroutable | Self::Nacked => Danger::None,
            Self::Silent => Danger::Silence,
            Self::Refused => Danger::Channel,
        }
    }

    /// From what is stored.
    pub fn stored(reason: &str) -> Option<Self> {
        [Self::Unroutable, Self::Nacked, Self::Refused, Self::Silent]
            .into_iter()
            .find(|f| f.as_str() == reason)
    }
}

/// What publishing an event may do to the others on its channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Danger {
    /// Nothing.
    #[default]
    None,
    /// It may have no answer. Beyond about thirty such on a channel the broker reads no more of the connection.
    Silence,
    /// It may end the channel.
    Channel,
}

/// A kind in trouble.
#[derive(Clone, Debug)]
struct Suspect {
    since: Stamp,
    failure: PublishFailure,
    /// An event of this kind was proven to be at fault itself, while others were taken.
    proven: bool,
    /// When one of this kind last had no answer.
    silent: Option<Instant>,
    /// Why, in words.
    why: String,
}

/// What is known of the broker.
#[derive(Debug, Default)]
pub struct Evidence {
    clock: Stamp,
    /// The latest hand-out of which an event was confirmed.
    confirmed: Stamp,
    /// When trouble of a new kind began. Until something that was handed out later is confirmed, it may be
    /// that nobody takes anything.
    doubt: Stamp,
    /// The latest failure.
    failed: Stamp,
    kinds: HashMap<EventKind, Suspect>,
    /// The size from which on events were refused.
    large: Option<usize>,
}

impl Evidence {
    /// The next moment.
    pub fn tick(&mut self) -> Stamp {
        self.clock += 1;
        self.clock
    }

    /// An event that was handed out at `published` is confirmed; `before` is how it was not taken, if it was tried.
    /// Says whether that ends the trouble of its kind.
    pub fn confirmed(
        &mut self,
        event: &Event,
        published: Stamp,
        before: Option<PublishFailure>,
        now: Instant,
    ) -> bool {
        self.confirmed = self.confirmed.max(published);
        if self.large.is_some_and(|large| event.size() >= large) {
            self.large = None;
        }
        if self.kinds.is_empty() {
            return false;
        }
        let kind = EventKind::of(event);
        let ends = self.kinds.get(&kind).is_some_and(|suspect| {
            // Others of a silent kind are taken all the time where its queues are several. Each that is not costs the
            // lanes seconds, so that their being taken says nothing.
            let silent = suspect.silent.is_some_and(|at| now.duration_since(at) < SILENT);
            suspect.since < published && (!silent || before == Some(PublishFailure::Silent))
        });
        if ends {
            self.kinds.remove(&kind);
        }
        ends
    }

    /// An event was not taken; this was learned at `now`.
    pub fn failed(&mut self, event: &Event, failure: PublishFailure, why: &str, (now, at): (Stamp, Instant)) {
        self.failed = now;
        let kind = EventKind::of(event);
        let silent = (failure == PublishFailure::Silent).then_some(at);
        if let Some(suspect) = self.kinds.get_mut(&kind) {
            suspect.silent = silent.or(suspect.silent);
            // A kind that may harm the channel stays one until an event of it is taken.
            if suspect.failure.danger() <= failure.danger() {
                suspect.failure = failure;
                why.clone_into(&mut suspect.why);
            }
            return;
        }
        self.doubt = now;
        // Something that was taken is not any more: what was proven of others may be for the same reason now.
        for suspect in self.kinds.values_mut() {
            suspect.proven = false;
        }
        if self.kinds.len() < MAX_KINDS {
            let suspect = Suspect { since: now, failure, proven: false, silent, why: why.to_owned() };
            self.kinds.insert(kind, suspect);
        }
    }

    /// An event of this size was refused, alone.
    pub fn refused(&mut self, size: usize) {
        self.large = Some(self.large.map_or(size, |large| large.min(size)));
    }

    /// An event was proven to be at fault itself.
    pub fn proven(&mut self, event: &Event) {
        if let Some(suspect) = self.kinds.get_mut(&EventKind::of(event)) {
            suspect.proven = true;
        }
    }

    /// Whether one of its kind was proven to be at fault, and none was taken since.
    pub fn is_proven(&self, event: &Event) -> bool {
        !self.kinds.is_empty() && self.kinds.get(&EventKind::of(event)).is_some_and(|suspect| suspect.proven)
    }

    /// Whether something was taken that was handed out after the last new trouble began.
    pub fn flows(&self) -> bool {
        self.confirmed >= self.doubt
    }

    /// Whether nothing is known yet.
    pub fn is_untested(&self) -> bool {
        self.confirmed == 0 && self.doubt == 0
    }

    /// Whether something was taken that was handed out after `stamp`.
    pub fn taken_since(&self, stamp: Stamp) -> bool {
        self.confirmed > stamp
    }

    /// The latest failure.
    pub fn last_failure(&self) -> Stamp {
        self.failed
    }

    /// Whether an event that was not tried yet waits until something is taken: its kind is in trouble, and maybe
    /// everything is.
    pub fn is_blocked(&self, event: &Event) -> bool {
        !self.flows() && !self.kinds.is_empty() && self.kinds.contains_key(&EventKind::of(event))
    }

    /// Whether its kind is in trouble because no queue takes it.
    pub fn is_unroutable(&self, event: &Event) -> bool {
        self.kinds
            .get(&EventKind::of(event))
            .is_some_and(|suspect| suspect.failure == PublishFailure::Unroutable)
    }

    /// What publishing the event may do to others.
    pub fn danger(&self, event: &Event) -> Danger {
        if self.large.is_some_and(|large| event.size() >= large) {
            return Danger::Channel;
        }
        if self.kinds.is_empty() {
            return Danger::None;
        }
        self.kinds.get(&EventKind::of(event)).map_or(Danger::None, |suspect| suspect.failure.danger())
    }

    /// Why something is not taken: the trouble that began first, of those that `of` takes by type.
    pub fn why(&self, of: impl Fn(&str, PublishFailure) -> bool) -> Option<&str> {
        let suspects = self.kinds.iter().filter(|(kind, suspect)| of(&kind.type_, suspect.failure));
        suspects.min_by_key(|(_, suspect)| suspect.since).map(|(_, suspect)| &*suspect.why)
    }
}
