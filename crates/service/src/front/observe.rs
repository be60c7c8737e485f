//! Every request as the world and the log see it.

use std::{
    any::Any,
    sync::Arc,
    time::{Instant, SystemTime},
};

use poem::{
    Endpoint, EndpointExt, IntoResponse, PathPattern, Request, Response, Route,
    http::{HeaderMap, HeaderValue, Method, StatusCode, Version, header, uri::Authority},
    middleware::CatchPanic,
    web::headers::{Date, HeaderMapExt},
};
use tracing::Instrument;

use super::{Caller, Keys, clients::Client, request_id, unsent::kept};
use crate::{
    health,
    problem::{Kind, MALFORMED_REQUEST, Problem, TOO_MANY_CONNECTIONS},
};

/// Ends the connection after the answer.
const CLOSE: HeaderValue = HeaderValue::from_static("close");

/// What a 401 says to somebody who has presented something (RFC 6750, 3.1).
const WRONG_KEY: HeaderValue = HeaderValue::from_static("Bearer error=\"invalid_token\"");

/// What no answer allows that does not say otherwise: it may be personal, and is soon out of date.
const NO_STORE: HeaderValue = HeaderValue::from_static("no-store");

/// The status of a request whose client went before there was an answer.
const HUNG_UP: u16 = 499;

/// The route of a request that came to none.
const NO_ROUTE: &str = "none";

/// A program's routes as the world meets them: every error and panic is answered as a problem, and every
/// request has an id, a line in the log, and is counted and timed by method, route pattern and status. Where
/// there are keys, only who has one comes in.
pub fn guarded(routes: Route, keys: Keys) -> impl Endpoint<Output = Response> + 'static {
    // Where it panicked is in the log by the panic hook.
    let panicked = |_: Box<dyn Any + Send>| Problem::internal();
    routes
        .around(admit)
        .with(CatchPanic::new().with_handler(panicked))
        .around(move |next, request| observe(next, request, keys.clone()))
}

async fn observe(
    next: Arc<impl Endpoint<Output = Response>>,
    mut request: Request,
    keys: Keys,
) -> poem::Result<Response> {
    let started = Instant::now();
    let id = request_id::of(request.headers());
    let client = Client::of(&request).cloned();
    let (has_body, presented) =
        (has_body(request.headers()), request.headers().contains_key(header::AUTHORIZATION));
    // Every handler finds its caller, also where nobody is asked for a key.
    let caller = keys.caller(&request);
    let known = caller.as_ref().map_or_else(|_| Caller::anonymous(), Caller::clone);
    request.set_data(known.clone());
    let mut told = Told {
        started,
        method: method(request.method()),
        probe: health::PATHS.contains(&request.uri().path()),
        route: NO_ROUTE.to_owned(),
        // When nobody is told anything.
        status: HUNG_UP,
        id: id.to_str().unwrap_or_default().to_owned(),
        trace: request_id::trace(request.headers()),
        caller: known,
    };
    // What is logged meanwhile says of which request.
    let span = tracing::info_span!("request", request_id = told.id, trace_id = told.trace);
    let pattern = |data: Option<&PathPattern>| data.map_or(NO_ROUTE.into(), |PathPattern(p)| p.to_string());
    let answer = async {
        addressed(&request)?;
        caller?;
        next.call(request).await
    };
    let (route, mut response) = match answer.instrument(span).await {
        Ok(response) => (pattern(response.data()), response),
        Err(error) => (pattern(error.data()), Problem::from_error(error)),
    };
    // What operators ask is answered also when there is too much of the rest.
    if let Some(client) = &client
        && !told.probe
    {
        response = kept(response, client).await;
    }
    let status = response.status();
    if status == StatusCode::UNAUTHORIZED && presented {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, WRONG_KEY);
    }
    if status == StatusCode::INTERNAL_SERVER_ERROR {
        // By its id the cause is found in the log, and nowhere else.
        let extensions = [("request_id", told.id.clone().into())].into();
        response = Problem { extensions, ..Problem::internal() }.into_response();
    }
    let unheard = has_body && client.is_some_and(|client| !client.was_heard());
    if unheard || [StatusCode::REQUEST_TIMEOUT, StatusCode::PAYLOAD_TOO_LARGE].contains(&status) {
        // What is still to come of the body would be taken for the next request.
        response.headers_mut().insert(header::CONNECTION, CLOSE);
    }
    finish(response.headers_mut(), id);
    (told.route, told.status) = (route, status.as_u16());
    Ok(response)
}

/// Whether a request says once whom it is for, as HTTP/1.1 wants it (RFC 9112, 3.2). Those of tests that come
/// from no connection need not.
fn addressed(request: &Request) -> Result<(), Problem> {
    let mut hosts = request.headers().get_all(header::HOST).iter().map(HeaderValue::as_bytes);
    let right = match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.is_empty() || Authority::try_from(host).is_ok(),
        (None, _) => request.version() < Version::HTTP_11 || Client::of(request).is_none(),
        _ => false,
    };
    if right { Ok(()) } else { Err(MALFORMED_REQUEST.problem()) }
}

/// Whether a request says that it has a body.
fn has_body(headers: &HeaderMap) -> bool {
    headers.contains_key(header::TRANSFER_ENCODING)
        || headers.get(header::CONTENT_LENGTH).is_some_and(|length| length.as_bytes() != b"0")
}

/// What every answer has.
fn finish(headers: &mut HeaderMap, id: HeaderValue) {
    headers.insert(request_id::X_REQUEST_ID, id);
    headers.entry(header::CACHE_CONTROL).or_insert(NO_STORE);
}

/// The answer to what never became a request, as bytes of HTTP/1.1: the connection ends with it. It is logged and
/// counted like any other.
pub(super) fn refusal(kind: &Kind) -> Vec<u8> {
    let id = request_id::of(&HeaderMap::new());
    drop(Told {
        started: Instant::now(),
        method: "none",
        probe: false,
        route: NO_ROUTE.to_owned(),
        status: kind.status.as_u16(),
        id: id.to_str().unwrap_or_default().to_owned(),
        trace: None,
        caller: Caller::anonymous(),
    });
    let problem = kind.problem();
    let body = problem.body();
    let mut response = problem.into_response();
    let headers = response.headers_mut();
    finish(headers, id);
    headers.insert(header::CONNECTION, CLOSE);
    headers.insert(header::CONTENT_LENGTH, body.len().into());
    headers.typed_insert(Date::from(SystemTime::now()));
    let mut answer = format!("HTTP/1.1 {}\r\n", kind.status).into_bytes();
    for (name, value) in &*headers {
        for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            answer.extend(part);
        }
    }
    [&answer, &b"\r\n"[..], body.as_bytes()].concat()
}

/// Methods by name, as far as they are known: whoever invents others makes no new labels.
fn method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

/// What is told of a request, once, when it ends, however it ends: a line of the log, a count and a time.
/// The pattern stands for the path, which has a cpf in it.
struct Told {
    started: Instant,
    method: &'static str,
    route: String,
    status: u16,
    id: String,
    trace: Option<String>,
    caller: Caller,
    probe: bool,
}

impl Drop for Told {
    fn drop(&mut self) {
        let took = self.started.elapsed();
        let Self { method, route, status, .. } = self;
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    method,
                    route = route.as_str(),
                    status = *status,
                    duration_ms = f64::from(u32::try_from(took.as_micros()).unwrap_or(u32::MAX)) / 1000.0,
                    request_id = self.id,
                    trace_id = self.trace,
                    caller = self.caller.name(),
                    "request"
                )
            };
        }
        match *status {
            500 => line!(error),
            // They come every few seconds, and say what the log has said already.
            _ if self.probe => line!(debug),
            501.. => line!(warn),
            _ => line!(info),
        }
        let labels = [("method", (*method).to_owned()), ("route", std::mem::take(route))];
        metrics::histogram!("http_request_duration_seconds", &labels).record(took);
        let [method, route] = labels;
        metrics::counter!("http_requests_total", &[method, route, ("status", status.to_string())])
            .increment(1);
    }
}

/// Lets a request through to its route. One that came when nobody could make place for it is told so, but
/// for health: a program that has too much to do is not dead.
async fn admit(next: Arc<impl Endpoint<Output = Response>>, request: Request) -> poem::Result<Response> {
    let crowded = Client::of(&request).is_some_and(|client| client.crowded);
    let mut response = if crowded && !health::PATHS.contains(&request.uri().path()) {
        Err(TOO_MANY_CONNECTIONS.problem().into())
    } else {
        next.call(request).await
    };
    if crowded {
        response = response.or_else(|error| Ok(Problem::from_error(error)));
        if let Ok(response) = &mut response {
            response.headers_mut().insert(header::CONNECTION, CLOSE);
        }
    }
    response
}

#[cfg(test)]
mod tests {
    use poem::{get, handler};

    use super::*;

    #[handler]
    fn defect() {
        panic!("52998224725")
    }

    #[tokio::test]
    async fn a_panic_is_a_500_by_which_its_log_is_found() {
        let app = guarded(Route::new().at("/defect/:cpf", get(defect)), Keys::default());
        let request = Request::builder().uri("/defect/52998224725".parse().unwrap());
        let answer = app.call(request.header("x-request-id", "mine").finish()).await.unwrap();
        assert_eq!((answer.status().as_u16(), answer.header("x-request-id")), (500, Some("mine")));
        insta::assert_snapshot!(answer.into_body().into_string().await.unwrap(), @r#"{"type":"/problems/internal","title":"Internal error","status":500,"detail":"The request could not be completed because of a defect in the service.","request_id":"mine"}"#);
    }
}
