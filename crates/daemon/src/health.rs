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
#[derive(Clone, Debug, Default)]
pub struct Health(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    identity: Identity,
    parts: BTreeMap<&'static str, Option<Waiting>>,
    /// Labels of metrics whose series are not shown any more, as they are rendered.
    gone: BTreeSet<String>,
}

/// What a part waits for; or, when it is `ready`, what an operator should look at all the same.
#[derive(Debug)]
struct Waiting {
    reason: String,
    since: Instant,
    ready: bool,
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

    /// Says one thing more of the process, once it is known, such as its source.
    pub fn is_known_as(&self, part: &'static str, value: &str) {
        self.state().identity.0.insert(part, value.to_owned());
    }

    /// From now on, metrics with this label are left out: what it names does not exist any more, and its series would keep
    /// their last values forever.
    pub fn is_gone(&self, label: &str, value: &str) {
        self.state().gone.insert(format!("{label}=\"{value}\""));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a part, which waits for its first success.
    pub fn part(&self, name: &'static str) -> Part {
        let part = Part { name, health: self.clone() };
        part.waiting("starting");
        part
    }

    /// Why the program is not ready, by part; empty when it is. Seconds tell for how long.
    pub fn reasons(&self) -> Vec<(&'static str, String, u64)> {
        self.said(false)
    }

    /// What an operator should look at although the program does its work, by part.
    pub fn attention(&self) -> Vec<(&'static str, String, u64)> {
        self.said(true)
    }

    fn said(&self, ready: bool) -> Vec<(&'static str, String, u64)> {
        let state = self.state();
        state
            .parts
            .iter()
            .filter_map(|(name, state)| {
                let state = state.as_ref().filter(|w| w.ready == ready)?;
                Some((*name, state.reason.clone(), state.since.elapsed().as_secs()))
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

    fn ready(&self) -> Response {
        let reasons = self.reasons();
        let status = if reasons.is_empty() { 200 } else { 503 };
        let said = |said: Vec<(&str, String, u64)>| -> Vec<_> {
            said.into_iter()
                .map(|(part, reason, seconds)| json!({"part": part, "reason": reason, "seconds": seconds}))
                .collect()
        };
        let attention = said(self.attention());
        let mut body = json!({"ready": reasons.is_empty(), "waiting": said(reasons)});
        let identity = self.state().identity.0.clone();
        if !identity.is_empty() {
            body["process"] = json!(identity);
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
        if let Some(Some(said)) = self.health.state().parts.insert(self.name, None)
            && !said.ready
        {
            tracing::info!(part = self.name, waited = ?said.since.elapsed(), "ready");
        }
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
        let parts = &mut state.parts;
        let since = match parts.get(self.name) {
            Some(Some(said)) if said.reason == reason && said.ready == ready => return,
            Some(Some(said)) if said.ready == ready => said.since,
            _ => Instant::now(),
        };
        if ready {
            tracing::info!(part = self.name, reason, "ready, but");
        } else {
            tracing::info!(part = self.name, reason, "waiting");
        }
        parts.insert(self.name, Some(Waiting { reason, since, ready }));
    }
}

/// Which process it is: `/ready` says it, and the `health` command compares it. Another process at the same address must
/// not pass for this one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity(BTreeMap<&'static str, String>);

impl Identity {
    /// Of a program with this name.
    pub fn of(program: &str) -> Self {
        Self::default().with("program", program)
    }

    /// With a part more, such as the name of a relay.
    #[must_use]
    pub fn with(mut self, part: &'static str, value: impl Into<String>) -> Self {
        self.0.insert(part, value.into());
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
        if args.database_url_file.is_none() && std::env::var_os("DATABASE_URL").is_none() {
            return Ok(self);
        }
        Ok(self.at(&args.options("health", Duration::from_secs(1))?))
    }

    /// What another process is instead, in words; none if it is the one that is asked for.
    pub(crate) fn differs_from(&self, said: &serde_json::Value) -> Option<String> {
        let differs = |(part, asked): (&&str, &String)| {
            let said = said.get(*part).and_then(serde_json::Value::as_str);
            (said != Some(asked.as_str())).then(|| match (*part, said) {
                ("database", Some(_)) => "it uses another database than DATABASE_URL names".to_owned(),
                (_, Some(said)) => format!("its {part} is {said:?}, and not {asked:?}"),
                (_, None) => format!("it does not say that its {part} is {asked:?}"),
            })
        };
        let differences: Vec<String> = self.0.iter().filter_map(differs).collect();
        (!differences.is_empty()).then(|| differences.join("; "))
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
