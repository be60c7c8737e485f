//! `/live`, `/ready` and `/metrics`: whether the process runs, whether it can do its work, and why not.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use metrics_exporter_prometheus::PrometheusHandle;
use poem::{
    Endpoint, IntoEndpoint, IntoResponse, Response, Route, get, handler, http::StatusCode, web::Data,
};
use serde_json::json;

use crate::documentation::only;

/// What operators ask, and what is answered whatever else is refused.
pub(crate) const PATHS: [&str; 3] = [LIVE, READY, METRICS];
pub(crate) const LIVE: &str = "/live";
pub(crate) const READY: &str = "/ready";
const METRICS: &str = "/metrics";

/// What a program waits for, by part: `database`, `broker`, … Ready when no part waits.
#[derive(Clone, Debug, Default)]
pub struct Health(Arc<Mutex<BTreeMap<&'static str, Option<Waiting>>>>);

/// What a part waits for; or, when it is `ready`, what somebody should look at all the same.
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

    /// What somebody should look at, though the program does its work, by part.
    pub fn attention(&self) -> Vec<(&'static str, String, u64)> {
        self.said(true)
    }

    fn said(&self, ready: bool) -> Vec<(&'static str, String, u64)> {
        let parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        parts
            .iter()
            .filter_map(|(name, state)| {
                let state = state.as_ref().filter(|w| w.ready == ready)?;
                Some((*name, state.reason.clone(), state.since.elapsed().as_secs()))
            })
            .collect()
    }

    /// The routes, to be nested at `/` or added to a program's own.
    pub fn add_to(&self, routes: Route, metrics: Option<PrometheusHandle>) -> Route {
        use poem::EndpointExt;
        routes
            .at(LIVE, read_only(get(answer_live)))
            .at(READY, read_only(get(answer_ready).data(self.clone())))
            .at(METRICS, read_only(get(answer_metrics).data(metrics)))
    }
}

fn read_only(
    methods: impl IntoEndpoint<Endpoint: Endpoint<Output = Response> + 'static>,
) -> impl Endpoint<Output = Response> {
    only("GET, HEAD", methods)
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
        let mut parts = self.health.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Some(said)) = parts.insert(self.name, None)
            && !said.ready
        {
            tracing::info!(part = self.name, waited = ?said.since.elapsed(), "ready");
        }
    }

    /// It waits, and why. Logged when the reason changes; personal data and secrets stay out of it.
    pub fn waiting(&self, reason: impl Into<String>) {
        self.say(reason.into(), false);
    }

    /// It does its work, but somebody should look at something.
    pub fn attention(&self, reason: impl Into<String>) {
        self.say(reason.into(), true);
    }

    fn say(&self, reason: String, ready: bool) {
        let mut parts = self.health.0.lock().unwrap_or_else(PoisonError::into_inner);
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

#[handler]
fn answer_live() -> &'static str {
    "live\n"
}

#[handler]
fn answer_ready(Data(health): Data<&Health>) -> Response {
    let reasons = health.reasons();
    let status = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let said = |said: Vec<(&str, String, u64)>| -> Vec<_> {
        said.into_iter()
            .map(|(part, reason, seconds)| json!({"part": part, "reason": reason, "seconds": seconds}))
            .collect()
    };
    let attention = said(health.attention());
    let mut body = json!({"ready": reasons.is_empty(), "waiting": said(reasons)});
    if !attention.is_empty() {
        body["attention"] = attention.into();
    }
    Response::builder().status(status).content_type("application/json").body(format!("{body}\n"))
}

#[handler]
fn answer_metrics(Data(metrics): Data<&Option<PrometheusHandle>>) -> Response {
    match metrics {
        Some(metrics) => metrics.render().with_content_type("text/plain; version=0.0.4").into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

/// The `health` command of every program, for a container's health check: asks the program that
/// listens at `address` whether it is ready, and fails with its reasons.
pub async fn probe(address: std::net::SocketAddr) -> anyhow::Result<()> {
    let client = reqwest::Client::builder().timeout(Duration::from_secs(3)).no_proxy().build()?;
    let url = format!("http://{address}/ready");
    let answer = client.get(&url).send().await.with_context(|| format!("nobody answers at {url}"))?;
    let ready = answer.status().is_success();
    let body = answer.text().await.context("the answer broke off")?;
    if !ready {
        bail!("not ready: {}", body.trim());
    }
    println!("{}", body.trim());
    Ok(())
}
