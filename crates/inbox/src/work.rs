//! What one transaction of the sequencer is to do.

use std::slice;

use crate::{
    chain::{Key, Reason},
    ledger::NEAR,
    parsed::ParsedMessage,
};

/// How a transaction treats its events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Without savepoints: fast, and failed as a whole when one of them fails.
    Together,
    /// One, in a savepoint, so that its failure is known to be its own.
    Alone,
    /// Alone; and since its handler may end the process, that it is tried is committed before.
    Attempt,
    /// Alone, and poison too: it is to be tried again.
    Retry,
}

impl Mode {
    /// Whether an event that is held for this reason may have its turn.
    pub(crate) fn takes(self, reason: Reason) -> bool {
        match reason {
            Reason::Gap | Reason::Behind => true,
            Reason::Trying => matches!(self, Self::Attempt | Self::Retry),
            Reason::Poison => self == Self::Retry,
        }
    }
}

/// What a transaction is about.
#[derive(Clone, Copy)]
pub(crate) struct Work<'a> {
    pub(crate) messages: &'a [ParsedMessage<'a>],
    /// Aggregates of which held events may be next.
    pub(crate) resume: &'a [Key],
    pub(crate) mode: Mode,
    /// How many held events it may apply; the next transaction goes on.
    pub(crate) budget: usize,
    /// Hold the event for this reason, without calling its handler again.
    pub(crate) refuse: Option<&'a str>,
}

impl<'a> Work<'a> {
    /// Messages, and what they free.
    pub(crate) fn messages(messages: &'a [ParsedMessage<'a>]) -> Self {
        Self { messages, resume: &[], mode: Mode::Together, budget: NEAR, refuse: None }
    }

    /// A message of which one has to know whether it is at fault, and nothing of what it frees.
    pub(crate) fn alone(message: &'a ParsedMessage<'a>) -> Self {
        Self { messages: slice::from_ref(message), resume: &[], mode: Mode::Alone, budget: 0, refuse: None }
    }

    /// A message whose handler may end the process.
    pub(crate) fn suspect(message: &'a ParsedMessage<'a>) -> Self {
        Self { messages: slice::from_ref(message), resume: &[], mode: Mode::Attempt, budget: 0, refuse: None }
    }

    /// The next held event of some aggregates, in a mode that takes one alone.
    pub(crate) fn one_held(resume: &'a [Key], mode: Mode) -> Self {
        Self { messages: &[], resume, mode, budget: 1, refuse: None }
    }

    /// The next held events of some aggregates, at most `budget` of them.
    pub(crate) fn held(resume: &'a [Key], budget: usize) -> Self {
        let mode = if budget == 1 { Mode::Alone } else { Mode::Together };
        Self { messages: &[], resume, mode, budget, refuse: None }
    }
}
