//! Counts and times every answer, and turns errors into problems on the way.

use std::{sync::Arc, time::Instant};

use metrics::{counter, histogram};
use poem::{Endpoint, IntoResponse, PathPattern, Request, Response, Result, http::Method};
use service::problem::Problem;

/// The answer to a request; never an error. Labels are the route's pattern and known methods, so that a
/// client can neither add series nor put a cpf into one.
pub(crate) async fn answer<E: Endpoint>(next: Arc<E>, request: Request) -> Result<Response> {
    let started = Instant::now();
    let method = method(request.method());
    let (route, response) = match next.call(request).await {
        Ok(response) => {
            let response = response.into_response();
            (response.data::<PathPattern>().cloned(), response)
        }
        Err(error) => (error.data::<PathPattern>().cloned(), Problem::from_error(error)),
    };
    let route = route.map_or_else(|| "none".to_owned(), |pattern| pattern.0.to_string());
    let status = response.status().as_u16().to_string();
    counter!("http_requests_total", "method" => method, "route" => route.clone(), "status" => status)
        .increment(1);
    histogram!("http_request_duration_seconds", "method" => method, "route" => route)
        .record(started.elapsed().as_secs_f64());
    Ok(response)
}

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
