//! A model of the broker.

use std::collections::HashMap;

use outbox_relay::{event::Event, publish::Fate};
use proptest::prelude::*;

/// A type that every queue takes, whatever the trouble.
pub(crate) const HEALTHY: u8 = 3;

/// Which types have which trouble. A queue takes everything that is not unbound; a second one takes what is full.
#[derive(Clone, Debug, Default)]
pub(crate) struct Broker {
    pub(crate) nobody: bool,
    /// No queue takes these.
    pub(crate) unbound: Vec<u8>,
    /// Of aggregates with an even id only: as when a type is bound by another header.
    pub(crate) partly: Vec<u8>,
    /// One queue takes these, another one is full.
    pub(crate) full: Vec<u8>,
    /// The user may not publish these.
    pub(crate) denied: Vec<u8>,
    /// A queue that takes these never answers.
    pub(crate) silent: Vec<u8>,
    /// The same, of aggregates with an even id only.
    pub(crate) partly_silent: Vec<u8>,
    /// Larger ones are refused.
    pub(crate) small: bool,
    pub(crate) delivered: HashMap<i64, u64>,
}

/// Any trouble of the types below [`HEALTHY`].
pub(crate) fn any() -> impl Strategy<Value = Broker> {
    let some = || prop::collection::vec(0..HEALTHY, 0..2);
    (some(), some(), some(), some(), some(), some(), any_bool()).prop_map(
        |(unbound, partly, full, denied, silent, partly_silent, small)| Broker {
            unbound,
            partly,
            full,
            denied,
            silent,
            partly_silent,
            small,
            ..Broker::default()
        },
    )
}

fn any_bool() -> impl Strategy<Value = bool> {
    prop::bool::ANY
}

impl Broker {
    pub(crate) fn well() -> Self {
        Self::default()
    }

    pub(crate) fn nobody() -> Self {
        Self { nobody: true, ..Self::default() }
    }

    /// The same broker with other troubles.
    pub(crate) fn change(&mut self, other: Self) {
        let delivered = std::mem::take(&mut self.delivered);
        *self = Self { delivered, ..other };
    }

    pub(crate) fn heal(&mut self) {
        self.change(Self::well());
    }

    /// What it does with an event; an error ends the channel.
    pub(crate) fn take(&mut self, event: &Event) -> Result<Fate, String> {
        let fate = self.fate(event);
        if matches!(fate, Ok(Fate::Confirmed | Fate::Nacked)) {
            *self.delivered.entry(event.position).or_default() += 1;
        }
        fate
    }

    /// What it would do.
    pub(crate) fn fate(&self, event: &Event) -> Result<Fate, String> {
        let type_: u8 = event.type_.parse().unwrap();
        let even = event.aggregate_id.parse::<u8>().unwrap().is_multiple_of(2);
        if self.denied.contains(&type_) {
            return Err("no permission".to_owned());
        }
        if self.small && event.size() > 10_000 {
            return Err("too large".to_owned());
        }
        Ok(if self.nobody || self.unbound.contains(&type_) || self.partly.contains(&type_) && even {
            Fate::Unroutable
        } else if self.silent.contains(&type_) || self.partly_silent.contains(&type_) && even {
            Fate::Silent
        } else if self.full.contains(&type_) {
            Fate::Nacked
        } else {
            Fate::Confirmed
        })
    }

    /// How many messages are in the queue that takes everything.
    pub(crate) fn copies(&self) -> u64 {
        self.delivered.values().sum()
    }
}
