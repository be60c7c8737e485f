//! Every request as the client and the log see it.

use std::{any::Any, sync::Arc, time::Instant};

use daemon::health;
use opentelemetry::context::FutureExt;
use poem::{
    Endpoint, EndpointExt, IntoResponse, PathPattern, Request, Response,
    http::{HeaderMap, HeaderValue, Method, StatusCode, Version, header, uri::Authority},
    middleware::CatchPanic,
};
use tracing::Instrument;

use super::{admission::Admission, body::Inbound, caller::Caller, request_id, span::ServerSpan};
use crate::problem::{MALFORMED_REQUEST, Problem};

/// A 401 to a request with a key (RFC 6750, 3.1).
const WRONG_KEY: HeaderValue = HeaderValue::from_static("Bearer error=\"invalid_token\"");
/// The status in the log and the metrics of a request whose client hung up before the response.
const HUNG_UP: u16 = 499;
/// The route of a request that matches none.
const NO_ROUTE: &str = "none";

/// Routes as clients meet them: every error and panic becomes a problem, and every request has an id, a line in the
/// log, and is counted and timed by method, route pattern and status. Only what `admission` admits reaches the routes.
pub fn guarded(
    routes: impl Endpoint<Output = Response> + 'static,
    admission: impl Admission,
) -> impl Endpoint<Output = Response> + 'static {
    // The panic hook logs where it was.
    let panicked = |_: Box<dyn Any + Send>| Problem::internal();
    routes
        .with(CatchPanic::new().with_handler(panicked))
        .around(move |next, request| observe(next, request, admission.clone()))
}

/// Marks a request for headers alone: poem's routes turn a HEAD into a GET.
#[derive(Clone, Copy)]
struct HeadersOnly;

/// Whether a request is a HEAD, whose response has no body.
pub fn headers_only(request: &Request) -> bool {
    request.data::<HeadersOnly>().is_some()
}

async fn observe(
    next: Arc<impl Endpoint<Output = Response>>,
    mut request: Request,
    admission: impl Admission,
) -> poem::Result<Response> {
    let started = Instant::now();
    let id = request_id::of(request.headers());
    let inbound = request.data::<Inbound>().cloned();
    let (has_body, has_key) =
        (has_body(request.headers()), request.headers().contains_key(header::AUTHORIZATION));
    let admitted = addressed(&request).and_then(|()| admission.caller(&request));
    let caller = admitted.as_ref().map_or_else(|_| Caller::anonymous(), Caller::clone);
    // Handlers find a caller also where no key is needed.
    request.set_data(caller.clone());
    if request.method() == Method::HEAD {
        request.set_data(HeadersOnly);
    }
    let (method, probe) = (method(request.method()), health::PATHS.contains(&request.uri().path()));
    let mut record = Record {
        started,
        method,
        probe,
        route: NO_ROUTE.to_owned(),
        status: HUNG_UP,
        id: id.to_str().unwrap_or_default().to_owned(),
        span: if probe { None } else { ServerSpan::start(method, &request) },
        caller,
    };
    // So that all lines of the log that belong to this request say so.
    let span = tracing::info_span!("request", request_id = record.id);
    let pattern = |data: Option<&PathPattern>| data.map_or(NO_ROUTE.into(), |PathPattern(p)| p.to_string());
    let handled = async {
        admitted?;
        next.call(request).await
    };
    let handled = handled.instrument(span);
    let handled = match &record.span {
        Some(span) => handled.with_context(span.context().clone()).await,
        None => handled.await,
    };
    let (route, mut response) = match handled {
        Ok(response) => (pattern(response.data()), response),
        Err(error) => (pattern(error.data()), Problem::from_error(error)),
    };
    let status = response.status();
    (record.route, record.status) = (route, status.as_u16());
    if status == StatusCode::INTERNAL_SERVER_ERROR {
        // The id leads to the cause in the log; the response says nothing of it.
        let extensions = [("request_id", record.id.clone().into())].into();
        response = Problem { extensions, ..Problem::internal() }.into_response();
    }
    let headers = response.headers_mut();
    if status == StatusCode::UNAUTHORIZED && has_key {
        headers.insert(header::WWW_AUTHENTICATE, WRONG_KEY);
    }
    if has_body && inbound.is_some_and(|inbound| !inbound.body_read()) {
        // The rest of the body would be taken for the next request.
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    headers.insert(request_id::X_REQUEST_ID, id);
    // A response may be personal, and is soon out of date.
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    Ok(response)
}

/// Whether a request names its host once, as HTTP/1.1 requires (RFC 9112, 3.2). Requests of tests, which come over no
/// connection, need not.
fn addressed(request: &Request) -> Result<(), Problem> {
    let mut hosts = request.headers().get_all(header::HOST).iter().map(HeaderValue::as_bytes);
    let right = match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.is_empty() || !host.contains(&b'@') && Authority::try_from(host).is_ok(),
        (None, _) => request.version() < Version::HTTP_11 || request.data::<Inbound>().is_none(),
        _ => false,
    };
    if right { Ok(()) } else { Err(MALFORMED_REQUEST.problem()) }
}

/// Whether a request announces a body.
fn has_body(headers: &HeaderMap) -> bool {
    headers.contains_key(header::TRANSFER_ENCODING)
        || headers.get(header::CONTENT_LENGTH).is_some_and(|length| length.as_bytes() != b"0")
}

/// The name of a known method: a client that invents others makes no new labels of metrics.
fn method(method: &Method) -> &'static str {
    let known = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
    known.into_iter().find(|known| method == known).unwrap_or("other")
}

/// What is logged and counted of a request when it ends, also when its client hangs up. The pattern stands for the
/// path, which has a cpf in it.
struct Record {
    started: Instant,
    method: &'static str,
    route: String,
    status: u16,
    id: String,
    span: Option<ServerSpan>,
    caller: Caller,
    probe: bool,
}

impl Drop for Record {
    fn drop(&mut self) {
        let took = self.started.elapsed();
        let route = (self.route != NO_ROUTE).then_some(self.route.as_str());
        let ids = self.span.take().and_then(|span| span.end(self.method, route, self.status));
        let (trace, span) = ids.unzip();
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    method = self.method,
                    route = self.route,
                    status = self.status,
                    duration_ms = f64::from(u32::try_from(took.as_micros()).unwrap_or(u32::MAX)) / 1000.0,
                    request_id = self.id,
                    trace_id = trace,
                    span_id = span,
                    caller = self.caller.name(),
                    "request"
                )
            };
        }
        match self.status {
            500 => line!(error),
            // They come every few seconds, and say what the log has said already.
            _ if self.probe => line!(debug),
            501.. => line!(warn),
            _ => line!(info),
        }
        let route = std::mem::take(&mut self.route);
        let labels = [("method", self.method.to_owned()), ("route", route)];
        metrics::histogram!("http_request_duration_seconds", &labels).record(took);
        let count = |status: u16, requests| {
            let [method, route] = labels.clone();
            let labels = [method, route, ("status", status.to_string())];
            metrics::counter!("http_requests_total", &labels).increment(requests);
        };
        // A route that was used has its failures, too, with 0: `increase()` sees the first one.
        count(500, 0);
        count(503, 0);
        count(self.status, 1);
    }
}

#[cfg(test)]
mod tests {
    use poem::{Route, get, handler};

    use super::*;
    use crate::front::Keys;

    #[handler]
    fn defect() {
        panic!("52998224725")
    }

    #[tokio::test]
    async fn a_panic_is_a_500_by_which_its_log_is_found() {
        let app = guarded(Route::new().at("/defect/:cpf", get(defect)), Keys::default());
        let request = Request::builder().uri("/defect/52998224725".parse().unwrap());
        let response = app.call(request.header("x-request-id", "mine").finish()).await.unwrap();
        assert_eq!((response.status().as_u16(), response.header("x-request-id")), (500, Some("mine")));
        insta::assert_snapshot!(response.into_body().into_string().await.unwrap(), @r#"{"type":"/problems/internal","title":"Internal error","status":500,"detail":"The request could not be completed because of a defect in the service.","request_id":"mine"}"#);
    }
}
