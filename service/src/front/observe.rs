//! Every answer as the world meets it: a problem where something is wrong, counted and timed.

use std::{any::Any, sync::Arc, time::Instant};

use poem::{
    Endpoint, EndpointExt, PathPattern, Request, Response, Route,
    http::{HeaderValue, Method, StatusCode, header},
    middleware::CatchPanic,
};

use super::{Caller, clients::Client};
use crate::{
    health,
    problem::{Problem, TOO_MANY_CONNECTIONS},
};

/// Ends the connection after the answer.
const CLOSE: HeaderValue = HeaderValue::from_static("close");

/// A program's routes as the world meets them: every error and panic is answered as a problem, and
/// every request is counted by method, route pattern and status, and timed. Labels are bounded and hold
/// no personal data: the pattern stands for the path, and methods nobody knows are one.
pub fn observed(routes: Route) -> impl Endpoint<Output = Response> + 'static {
    // The panic's own message went to standard error by the panic hook.
    let panicked = |_: Box<dyn Any + Send>| Problem::internal();
    routes.around(admit).with(CatchPanic::new().with_handler(panicked)).around(observe)
}

async fn observe(
    next: Arc<impl Endpoint<Output = Response>>,
    mut request: Request,
) -> poem::Result<Response> {
    let started = Instant::now();
    // Every handler finds its caller, also where nobody is asked for a key.
    if request.data::<Caller>().is_none() {
        request.set_data(Caller::anonymous());
    }
    let method = match *request.method() {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    };
    let pattern = |data: Option<&PathPattern>| data.map_or("none".into(), |PathPattern(p)| p.to_string());
    let (route, mut response) = match next.call(request).await {
        Ok(response) => (pattern(response.data()), response),
        Err(error) => (pattern(error.data()), Problem::from_error(error)),
    };
    if [StatusCode::REQUEST_TIMEOUT, StatusCode::PAYLOAD_TOO_LARGE].contains(&response.status()) {
        // What is still to come of the body would be taken for the next request.
        response.headers_mut().insert(header::CONNECTION, CLOSE);
    }
    let status = response.status().as_str().to_owned();
    metrics::counter!("http_requests_total", "method" => method, "route" => route.clone(), "status" => status)
        .increment(1);
    metrics::histogram!("http_request_duration_seconds", "method" => method, "route" => route)
        .record(started.elapsed());
    Ok(response)
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
