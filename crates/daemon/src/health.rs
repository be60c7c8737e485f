//! `/live`, `/ready` and `/metrics`: whether the process runs, whether it can do its work, and why not.

mod identity;
mod part;
mod series;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::json;

pub use identity::Identity;
pub use part::Part;

/// Whether the process runs.
pub const LIVE: &str = "/live";
/// Whether it can do its work, and why not.
pub const READY: &str = "/ready";
/// Its metrics.
pub const METRICS: &str = "/metrics";
/// The paths that every program serves, whatever else it refuses.
pub const PATHS: [&str; 3] = [LIVE, READY, METRICS];

/// The response to one of [`PATHS`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// The HTTP status.
    pub status: u16,
    /// The media type of the body.
    pub content_type: &'static str,
    /// The body.
    pub body: String,
}

/// What a program waits for, by part: `database`, `broker`, … Ready when no part waits.
///
/// A program that does the same for several things, such as a relay for several outboxes, has a [`member`](Self::member)
/// for each, with parts of its own.
#[derive(Clone, Debug, Default)]
pub struct Health {
    state: Arc<Mutex<State>>,
    member: Option<Member>,
}

/// Which of several things: its kind, such as `outbox`, and its name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Member {
    kind: &'static str,
    name: Arc<str>,
}

#[derive(Debug, Default)]
struct State {
    identity: Identity,
    parts: BTreeMap<(Option<Member>, &'static str), Option<Waiting>>,
    /// Series with all of these labels are not shown any more.
    gone: BTreeSet<Vec<String>>,
}

/// What a part says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// The member that it belongs to, in a program with several.
    pub member: Option<String>,
    /// The part.
    pub part: &'static str,
    /// What it says.
    pub reason: String,
    /// For how long.
    pub seconds: u64,
}

/// Labels as `/metrics` renders them.
fn rendered(labels: &[(&str, &str)]) -> Vec<String> {
    labels.iter().map(|(name, value)| series::label(name, value)).collect()
}

fn is_among(some: &[String], all: &[String]) -> bool {
    some.iter().all(|label| all.contains(label))
}

/// What a part waits for; or, when it is `ready`, what an operator should look at all the same.
#[derive(Debug)]
struct Waiting {
    reason: String,
    since: Instant,
    ready: bool,
}

impl State {
    /// Keeps what a part says, unless its member is gone. Returns what it said before.
    fn insert(&mut self, key: (Option<Member>, &'static str), waiting: Option<Waiting>) -> Option<Waiting> {
        if key.0.as_ref().is_some_and(|member| !self.identity.members.contains_key(member)) {
            return None;
        }
        self.parts.insert(key, waiting).flatten()
    }
}

impl Health {
    /// Nothing registered, so ready.
    pub fn new() -> Self {
        Self::default()
    }

    /// As [`new`](Self::new), of this process.
    pub fn of(identity: Identity) -> Self {
        let health = Self::new();
        health.state().identity = identity;
        health
    }

    /// One of the things that the program does the same for, with parts of its own.
    #[must_use]
    pub fn member(&self, kind: &'static str, name: &str, identity: Identity) -> Self {
        let member = Member { kind, name: name.into() };
        self.state().identity.members.insert(member.clone(), identity);
        Self { state: Arc::clone(&self.state), member: Some(member) }
    }

    /// Forgets a member, its parts and its metrics: the program has nothing to do with it any more.
    pub fn remove(&self) {
        let mut state = self.state();
        if let Some(identity) = self.member.as_ref().and_then(|member| state.identity.members.remove(member))
        {
            let labels = identity.labels();
            // One that never knew its source has labels that others have, too.
            let mut others = state.identity.members.values();
            if !labels.is_empty() && !others.any(|other| is_among(&labels, &other.labels())) {
                state.gone.insert(labels);
            }
        }
        state.parts.retain(|(member, _), _| *member != self.member);
    }

    /// Says one thing more of the process, or of a member, once it is known, such as its source.
    pub fn is_known_as(&self, part: &'static str, value: &str) {
        let mut state = self.state();
        let identity = match &self.member {
            None => Some(&mut state.identity),
            Some(member) => state.identity.members.get_mut(member),
        };
        if let Some(identity) = identity {
            identity.parts.insert(part, value.to_owned());
            // It was removed, and is there again.
            let labels = identity.labels();
            state.gone.retain(|gone| !is_among(gone, &labels));
        }
    }

    /// From now on, metrics with all of these labels are left out: what they name does not exist any more, and its series
    /// would keep their last values forever.
    pub fn is_gone(&self, labels: &[(&str, &str)]) {
        self.state().gone.insert(rendered(labels));
    }

    /// What [`is_gone`](Self::is_gone) was said of is there again.
    pub fn is_back(&self, labels: &[(&str, &str)]) {
        self.state().gone.remove(&rendered(labels));
    }

    /// `/metrics` says which version of the program runs.
    pub fn has_version(&self, version: &'static str) {
        let program = self.state().identity.parts.get("program").cloned().unwrap_or_default();
        metrics::describe_gauge!("build_info", "1, with the program and its version.");
        metrics::gauge!("build_info", "program" => program, "version" => version).set(1.0);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a part, which waits for its first success.
    pub fn part(&self, name: &'static str) -> Part {
        let part = Part { name, health: self.clone() };
        part.waiting("starting");
        part
    }

    /// Why the program is not ready; empty when it is. Of a member: why that is not.
    pub fn reasons(&self) -> Vec<Said> {
        self.said(false)
    }

    /// Whether the program can do its work; with members, that of one of them at least.
    pub fn can_anything(&self) -> bool {
        let waiting: BTreeSet<Option<String>> = self.reasons().into_iter().map(|said| said.member).collect();
        let state = self.state();
        let mut members = state.identity.members.keys();
        match members.len() {
            0 => waiting.is_empty(),
            _ => members.any(|member| !waiting.contains(&Some(member.name.to_string()))),
        }
    }

    /// What an operator should look at although the program does its work.
    pub fn attention(&self) -> Vec<Said> {
        self.said(true)
    }

    fn said(&self, ready: bool) -> Vec<Said> {
        let state = self.state();
        let of =
            state.parts.iter().filter(|((member, _), _)| self.member.is_none() || *member == self.member);
        of.filter_map(|((member, part), waiting)| {
            let waiting = waiting.as_ref().filter(|waiting| waiting.ready == ready)?;
            Some(Said {
                member: member.as_ref().map(|member| member.name.to_string()),
                part,
                reason: waiting.reason.clone(),
                seconds: waiting.since.elapsed().as_secs(),
            })
        })
        .collect()
    }

    /// The response to a GET of `path`; none for a path that is not one of [`PATHS`], and for [`METRICS`] without
    /// `metrics`.
    pub fn respond(&self, path: &str, metrics: Option<&PrometheusHandle>) -> Option<Response> {
        match path {
            LIVE => {
                let content_type = "text/plain; charset=utf-8";
                Some(Response { status: 200, content_type, body: "live\n".to_owned() })
            }
            READY => Some(self.ready()),
            METRICS => metrics.map(|metrics| Response {
                status: 200,
                content_type: "text/plain; version=0.0.4",
                body: self.metrics(metrics),
            }),
            _ => None,
        }
    }

    fn metrics(&self, metrics: &PrometheusHandle) -> String {
        series::of_the_process();
        self.state().complete(&metrics.render())
    }

    /// What the members are.
    fn kind(&self) -> Option<&'static str> {
        self.state().identity.members.keys().next().map(|member| member.kind)
    }

    fn ready(&self) -> Response {
        let reasons = self.reasons();
        let status = if reasons.is_empty() { 200 } else { 503 };
        let said = |said: Vec<Said>| -> Vec<_> {
            said.into_iter()
                .map(|Said { member, part, reason, seconds }| {
                    let mut said = json!({"part": part, "reason": reason, "seconds": seconds});
                    if let (Some(name), Some(kind)) = (member, self.kind()) {
                        said[kind] = name.into();
                    }
                    said
                })
                .collect()
        };
        let attention = said(self.attention());
        let mut body = json!({"ready": reasons.is_empty(), "waiting": said(reasons)});
        let identity = self.state().identity.clone();
        if identity != Identity::default() {
            body["process"] = identity.to_json();
        }
        if !attention.is_empty() {
            body["attention"] = attention.into();
        }
        Response { status, content_type: "application/json", body: format!("{body}\n") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_of_what_is_gone_are_left_out() {
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            for consumer in ["stock", "stock-2"] {
                metrics::counter!("applied_total", "consumer" => consumer, "reason" => "x").increment(1);
            }
        });
        let health = Health::new();
        let shown = |health: &Health| {
            let body = health.respond(METRICS, Some(&handle)).unwrap().body;
            body.lines().filter(|line| line.starts_with("applied_total")).collect::<Vec<_>>().join("\n")
        };
        health.is_gone(&[("consumer", "stock"), ("reason", "y")]);
        assert_eq!(shown(&health).lines().count(), 2);
        health.is_gone(&[("reason", "x"), ("consumer", "stock")]);
        assert_eq!(shown(&health), r#"applied_total{consumer="stock-2",reason="x"} 1"#);
    }

    #[test]
    fn a_member_that_never_knew_its_source_takes_no_series_of_others_along() {
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            for source in ["shop", "bank"] {
                metrics::counter!("led_total", "source" => source, "relay" => "default").increment(1);
            }
        });
        let health = Health::new();
        let member = |name| health.member("outbox", name, Identity::default().with("relay", "default"));
        let shown = || health.respond(METRICS, Some(&handle)).unwrap().body.matches("led_total{").count();
        let (shop, bank) = (member("shop"), member("bank"));
        shop.is_known_as("source", "shop");
        bank.remove();
        assert_eq!(shown(), 2);
        shop.remove();
        assert_eq!(shown(), 1);
        member("bank").remove();
        let bank = member("bank");
        bank.is_known_as("source", "bank");
        assert_eq!(shown(), 1);
        member("shop").is_known_as("source", "shop");
        assert_eq!(shown(), 2);
    }

    #[test]
    fn members_have_parts_of_their_own() {
        let health = Health::of(Identity::of("outbox-relay"));
        let member = |name| health.member("outbox", name, Identity::default().with("relay", "default"));
        let (shop, bank) = (member("shop"), member("bank"));
        shop.part("database").ready();
        let database = bank.part("database");
        database.waiting("the database is away");
        bank.is_known_as("source", "bank");
        assert!(shop.reasons().is_empty() && bank.reasons().len() == 1);
        insta::assert_snapshot!(health.respond(READY, None).unwrap().body, @r#"{"process":{"outbox":{"bank":{"relay":"default","source":"bank"},"shop":{"relay":"default"}},"program":"outbox-relay"},"ready":false,"waiting":[{"outbox":"bank","part":"database","reason":"the database is away","seconds":0}]}"#);
        bank.remove();
        database.waiting("what still ends says nothing");
        insta::assert_snapshot!(health.respond(READY, None).unwrap().body, @r#"{"process":{"outbox":{"shop":{"relay":"default"}},"program":"outbox-relay"},"ready":true,"waiting":[]}"#);

        let asked = Identity::of("outbox-relay").with_member("outbox", "shop", Identity::default());
        let said = health.state().identity.to_json();
        assert_eq!(asked.differs_from(&said), None);
        let other = asked.with_member("outbox", "bank", Identity::default());
        let other = other.with_member("outbox", "shop", Identity::default().with("relay", "other"));
        insta::assert_snapshot!(other.differs_from(&said).unwrap(), @r#"it does not have the outbox "bank"; outbox shop: relay is "default", and not "other""#);
    }
}
