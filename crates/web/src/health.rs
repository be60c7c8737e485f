//! The routes `/live`, `/ready` and `/metrics` beside those of an API.

use daemon::health::{Health, PATHS};
use metrics_exporter_prometheus::PrometheusHandle;
use poem::{EndpointExt, Request, Response, Route, endpoint::make_sync, get, http::StatusCode};

use crate::methods::only;

/// Adds them to `routes`. Without `metrics` there are none.
pub fn add_to(routes: Route, health: &Health, metrics: Option<&PrometheusHandle>) -> Route {
    PATHS.into_iter().fold(routes, |routes, path| {
        let (health, metrics) = (health.clone(), metrics.cloned());
        let respond = make_sync(move |_: Request| match health.respond(path, metrics.as_ref()) {
            Some(response) => Response::builder()
                .status(StatusCode::from_u16(response.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR))
                .content_type(response.content_type)
                .body(response.body),
            None => StatusCode::NOT_FOUND.into(),
        });
        routes.at(path, only("GET, HEAD", get(respond).map_to_response()))
    })
}
