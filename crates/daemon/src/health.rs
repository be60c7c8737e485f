//! `/live`, `/ready` and `/metrics`: whether the process runs, whether it can do its work, and why not.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::config::{
    SettingError,
    database::{Database, DatabaseArgs},
};

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
    /// Labels of metrics whose series are not shown any more, as they are rendered.
    gone: BTreeSet<String>,
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

    /// Forgets a member and its parts: the program has nothing to do with it any more.
    pub fn remove(&self) {
        let mut state = self.state();
        if let Some(member) = &self.member {
            state.identity.members.remove(member);
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
        }
    }

    /// From now on, metrics with this label are left out: what it names does not exist any more, and its series would keep
    /// their last values forever.
    pub fn is_gone(&self, label: &str, value: &str) {
        self.state().gone.insert(format!("{label}=\"{value}\""));
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
        let of = state.parts.iter().filter(|((member, _), _)| self.member.is_none() || *member == self.member);
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
                body: self.without_gone(metrics.render()),
            }),
            _ => None,
        }
    }

    fn without_gone(&self, metrics: String) -> String {
        let gone = self.state().gone.clone();
        if gone.is_empty() {
            return metrics;
        }
        // The labels follow the first brace. A comment has none.
        let is_gone = |line: &str| {
            let labels = line.split_once('{').map_or("", |(_, labels)| labels);
            !line.starts_with('#') && gone.iter().any(|gone| labels.contains(gone.as_str()))
        };
        metrics.split_inclusive('\n').filter(|line| !is_gone(line)).collect()
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

/// One part of a program's health.
#[derive(Clone, Debug)]
pub struct Part {
    name: &'static str,
    health: Health,
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

/// Which process it is: `/ready` says it, and the `health` command compares it. Another process at the same address must
/// not pass for this one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    parts: BTreeMap<&'static str, String>,
    members: BTreeMap<Member, Self>,
}

impl Identity {
    /// Of a program with this name.
    pub fn of(program: &str) -> Self {
        Self::default().with("program", program)
    }

    /// With a part more, such as the name of a relay.
    #[must_use]
    pub fn with(mut self, part: &'static str, value: impl Into<String>) -> Self {
        self.parts.insert(part, value.into());
        self
    }

    /// With one of several things that the program does the same for.
    #[must_use]
    pub fn with_member(mut self, kind: &'static str, name: &str, identity: Self) -> Self {
        self.members.insert(Member { kind, name: name.into() }, identity);
        self
    }

    /// With a part that may not be asked for.
    #[must_use]
    pub fn with_some(self, part: &'static str, value: Option<impl Into<String>>) -> Self {
        match value {
            Some(value) => self.with(part, value),
            None => self,
        }
    }

    /// With the database that a program uses: its host, port and name as a digest, since `/ready` is open to all.
    #[must_use]
    pub fn at(self, database: &Database) -> Self {
        let database = database.options();
        let host = match database.get_socket().map(|path| path.display().to_string()) {
            Some(socket) => socket,
            None => match database.get_host() {
                "127.0.0.1" | "::1" | "[::1]" => "localhost".to_owned(),
                host => host.to_ascii_lowercase(),
            },
        };
        let name = database.get_database().unwrap_or(database.get_username());
        let digest = Sha256::digest(format!("{host}\n{}\n{name}", database.get_port()));
        let first = digest.iter().take(8).fold(0_u64, |first, byte| first << 8 | u64::from(*byte));
        self.with("database", format!("{first:016x}"))
    }

    /// With the database that the settings name, where they name one.
    pub fn at_known(self, args: &DatabaseArgs) -> Result<Self, SettingError> {
        if args.database_url_file.is_none() && args.database_url.is_none() {
            return Ok(self);
        }
        Ok(self.at(&args.options("health", Duration::from_secs(1))?))
    }

    fn to_json(&self) -> serde_json::Value {
        let mut json = json!(self.parts);
        for (member, identity) in &self.members {
            json[member.kind][&*member.name] = identity.to_json();
        }
        json
    }

    /// What another process is instead, in words; none if it is the one that is asked for.
    pub(crate) fn differs_from(&self, said: &serde_json::Value) -> Option<String> {
        let differences = self.differences(said, "it", "its");
        (!differences.is_empty()).then(|| differences.join("; "))
    }

    fn differences(&self, said: &serde_json::Value, it: &str, its: &str) -> Vec<String> {
        let differs = |(part, asked): (&&str, &String)| {
            let said = said.get(*part).and_then(serde_json::Value::as_str);
            (said != Some(asked.as_str())).then(|| match (*part, said) {
                ("database", Some(_)) => format!("{it} uses another database than DATABASE_URL names"),
                (_, Some(said)) => format!("{its} {part} is {said:?}, and not {asked:?}"),
                (_, None) => format!("{it} does not say that its {part} is {asked:?}"),
            })
        };
        let mut differences: Vec<String> = self.parts.iter().filter_map(differs).collect();
        for (Member { kind, name }, identity) in &self.members {
            match said.get(*kind).and_then(|members| members.get(&**name)) {
                Some(said) => {
                    let member = format!("{kind} {name}");
                    differences.extend(identity.differences(said, &member, &format!("{member}:")));
                }
                None => differences.push(format!("{it} does not have the {kind} {name:?}")),
            }
        }
        differences
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
        health.is_gone("consumer", "stock");
        let shown = health.respond(METRICS, Some(&handle)).unwrap().body;
        assert_eq!(
            shown.trim(),
            "# TYPE applied_total counter\napplied_total{consumer=\"stock-2\",reason=\"x\"} 1"
        );
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
        insta::assert_snapshot!(health.respond(READY, None).unwrap().body, @"");
        bank.remove();
        database.waiting("what still ends says nothing");
        insta::assert_snapshot!(health.respond(READY, None).unwrap().body, @"");

        let asked = Identity::of("outbox-relay").with_member("outbox", "shop", Identity::default());
        let said = health.state().identity.to_json();
        assert_eq!(asked.differs_from(&said), None);
        let other = asked.with_member("outbox", "bank", Identity::default());
        let other = other.with_member("outbox", "shop", Identity::default().with("relay", "other"));
        insta::assert_snapshot!(other.differs_from(&said).unwrap(), @"");
    }

    #[test]
    fn another_process_is_told_apart() {
        let database = |url: &str| Identity::of("outbox-relay").at(&url.parse().unwrap());
        let one = database("postgres://a:b@localhost:5432/shop");
        assert_eq!(one, database("postgres://other:secret@127.0.0.1/shop"));
        for other in
            ["postgres://a@localhost/bank", "postgres://a@localhost:5433/shop", "postgres://a@db/shop"]
        {
            assert_ne!(one, database(other), "{other}");
        }
        let said = json!({"program": "outbox-relay", "relay": "default", "database": "0123456789abcdef"});
        let asked = Identity::of("outbox-relay").with("relay", "default");
        assert_eq!(asked.differs_from(&said), None);
        let differs = |asked: Identity| asked.differs_from(&said).unwrap_or_default();
        let shown = [
            differs(asked.clone().with("relay", "replay")),
            differs(Identity::of("another")),
            differs(asked.clone().with_some("source", Some("shop"))),
            differs(asked.at(&"postgres://localhost/shop".parse().unwrap())),
            Identity::of("another").differs_from(&json!(null)).unwrap_or_default(),
        ];
        insta::assert_snapshot!(shown.join("\n"), @r#"
        its relay is "default", and not "replay"
        its program is "outbox-relay", and not "another"
        it does not say that its source is "shop"
        it uses another database than DATABASE_URL names
        it does not say that its program is "another"
        "#);
    }
}
