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
    /// All without savepoints: fast, but one failure fails them all.
    Together,
    /// One event, in a savepoint, so that a failure is known to be its own.
    Alone,
    /// As `Alone`, but the attempt is committed first, since the handler may end the process.
    Attempt,
    /// As `Alone`, also for poison, which is retried.
    Retry,
}

impl Mode {
    /// Whether an event that is held for this reason may be applied.
    pub(crate) fn takes(self, reason: Reason) -> bool {
        match reason {
            Reason::Gap | Reason::Behind => true,
            Reason::Trying => matches!(self, Self::Attempt | Self::Retry),
            Reason::Poison => self == Self::Retry,
        }
    }
}

/// The work of one transaction.
#[derive(Clone, Copy)]
pub(crate) struct Work<'a> {
    pub(crate) messages: &'a [ParsedMessage<'a>],
    /// Aggregates whose held events may be next.
    pub(crate) resume: &'a [Key],
    pub(crate) mode: Mode,
    /// How many held events it may apply. The next transaction applies more.
    pub(crate) budget: usize,
    /// Hold the event for this reason, without calling its handler again.
    pub(crate) refuse: Option<&'a str>,
    /// Lock the rows of the sources for itself, because one of them begins a newer incarnation.
    pub(crate) exclusive: bool,
}

impl<'a> Work<'a> {
    /// Messages, and the held events that they free.
    pub(crate) fn messages(messages: &'a [ParsedMessage<'a>]) -> Self {
        Self { messages, resume: &[], mode: Mode::Together, budget: NEAR, refuse: None, exclusive: false }
    }

    /// One message, to find out whether it is at fault, without the held events that it frees.
    pub(crate) fn alone(message: &'a ParsedMessage<'a>) -> Self {
        Self {
            messages: slice::from_ref(message),
            resume: &[],
            mode: Mode::Alone,
            budget: 0,
            refuse: None,
            exclusive: false,
        }
    }

    /// One message whose handler may end the process.
    pub(crate) fn suspect(message: &'a ParsedMessage<'a>) -> Self {
        Self {
            messages: slice::from_ref(message),
            resume: &[],
            mode: Mode::Attempt,
            budget: 0,
            refuse: None,
            exclusive: false,
        }
    }

    /// The next held event of one of the aggregates, in a mode that takes one alone.
    pub(crate) fn one_held(resume: &'a [Key], mode: Mode) -> Self {
        Self { messages: &[], resume, mode, budget: 1, refuse: None, exclusive: false }
    }

    /// The next held events of some aggregates, at most `budget` of them.
    pub(crate) fn held(resume: &'a [Key], budget: usize) -> Self {
        let mode = if budget == 1 { Mode::Alone } else { Mode::Together };
        Self { messages: &[], resume, mode, budget, refuse: None, exclusive: false }
    }
}
