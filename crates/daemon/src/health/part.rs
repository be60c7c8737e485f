//! One part of a program's health, in the hands of the task that does its work.

use std::time::Instant;

use super::{Health, Member, Waiting};

/// One part of a program's health.
#[derive(Clone, Debug)]
pub struct Part {
    pub(super) name: &'static str,
    pub(super) health: Health,
}

impl Part {
    /// It does its work.
    pub fn ready(&self) {
        let before = self.health.state().insert(self.key(), None);
        if let Some(said) = before
            && !said.ready
        {
            tracing::info!(part = self.name, waited = ?said.since.elapsed(), "ready");
        }
    }

    fn key(&self) -> (Option<Member>, &'static str) {
        (self.health.member.clone(), self.name)
    }

    /// It waits, and why. Logged when the reason changes; personal data and secrets stay out of it.
    pub fn waiting(&self, reason: impl Into<String>) {
        self.say(&reason.into(), false);
    }

    /// The part does its work, but an operator should look at something.
    pub fn attention(&self, reason: impl Into<String>) {
        self.say(&reason.into(), true);
    }

    fn say(&self, reason: &str, ready: bool) {
        // It may name an aggregate, a type or what a server has said.
        let reason = escape::line(reason).to_string();
        let mut state = self.health.state();
        let since = match state.parts.get(&self.key()) {
            Some(Some(said)) if said.reason == reason && said.ready == ready => return,
            Some(Some(said)) if said.ready == ready => said.since,
            _ => Instant::now(),
        };
        if ready {
            tracing::info!(part = self.name, reason, "ready, but");
        } else {
            tracing::info!(part = self.name, reason, "waiting");
        }
        state.insert(self.key(), Some(Waiting { reason, since, ready }));
    }
}
