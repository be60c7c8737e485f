//! Requests and answers as text that a person reviews.

use std::fmt::Write;

use poem::{Request, Response, http::Method};

use super::App;

/// A request with a JSON body.
pub(crate) fn post(path: &str, body: impl Into<Vec<u8>>) -> Request {
    raw_request(Method::POST, path, Some("application/json"), body)
}

/// Any request.
pub(crate) fn raw_request(
    method: Method,
    path: &str,
    media_type: Option<&str>,
    body: impl Into<Vec<u8>>,
) -> Request {
    let request = Request::builder().method(method).uri(path.parse().unwrap());
    let request = match media_type {
        Some(media_type) => request.content_type(media_type),
        None => request,
    };
    request.body(body.into())
}

/// A request without a body.
pub(crate) fn plain(method: Method, path: &str) -> Request {
    raw_request(method, path, None, "")
}

/// The request with one header more.
pub(crate) fn with(mut request: Request, name: &'static str, value: &str) -> Request {
    request.headers_mut().append(name, value.parse().unwrap());
    request
}

/// Sends it and writes both sides down; a long body is cut.
pub(crate) async fn exchange(app: &App, name: &str, mut request: Request) -> String {
    let mut text = format!("## {name}\n{} {}\n", request.method(), request.uri());
    for name in ["if-match", "idempotency-key"] {
        for value in request.headers().get_all(name) {
            writeln!(text, "{name}: {}", String::from_utf8_lossy(value.as_bytes())).unwrap();
        }
    }
    let body = request.take_body().into_bytes().await.unwrap();
    if !body.is_empty() {
        let shown = String::from_utf8_lossy(&body);
        match shown.char_indices().nth(300) {
            Some((cut, _)) => writeln!(text, "{}… ({} bytes)", &shown[..cut], body.len()).unwrap(),
            None => writeln!(text, "{shown}").unwrap(),
        }
    }
    request.set_body(body);
    let response = app.call(request).await;
    text.push('\n');
    text + &answer(response).await + "\n"
}

async fn answer(mut response: Response) -> String {
    let mut text = format!("{}\n", response.status());
    let mut headers: Vec<_> = response
        .headers()
        .iter()
        .map(|(name, value)| format!("{name}: {}\n", value.to_str().unwrap()))
        .collect();
    headers.sort();
    // The request's id is a new one each time.
    let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
    headers.retain(|header| !header.starts_with("x-request-id: "));
    text.extend(headers);
    let body = response.take_body().into_string().await.unwrap();
    assert!(body.is_empty() || body.ends_with('\n'), "a terminal wants a whole line");
    text + "\n" + &body.replace(&id, "[request id]")
}
