//! A request's body, of a bounded size and in a bounded time.

use std::time::Duration;

use bytes::Bytes;
use poem::{Body, Request, error::ReadBodyError};
use tokio_util::sync::CancellationToken;

use super::clients::Client;
use crate::problem::{INCOMPLETE_BODY, Problem, SLOW_BODY, TOO_LARGE};

/// The largest body, in bytes.
pub const MAX_BODY: usize = 64 * 1024;

/// Without a server in front that knows its own limit.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Reads the body. The limit holds for what is read, whatever the headers say; what they say to be larger is
/// not read at all. 413, 408 or 400 otherwise.
pub async fn read_body(request: &Request, body: Body) -> Result<Bytes, Problem> {
    let announced = request.headers().get(poem::http::header::CONTENT_LENGTH);
    let announced = announced.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > MAX_BODY as u64) {
        return Err(TOO_LARGE.problem());
    }
    let over = CancellationToken::new();
    let client = Client::of(request);
    if let Some(client) = client {
        client.body(over.clone());
    }
    let timeout = if client.is_some() { Duration::MAX } else { TIMEOUT };
    let read = tokio::select! {
        read = tokio::time::timeout(timeout, body.into_bytes_limit(MAX_BODY)) => read.ok(),
        () = over.cancelled() => None,
    };
    if let Some(client) = client {
        client.works();
    }
    // Who was cut off in the moment in which the last of it came is cut off all the same.
    match read.filter(|_| !over.is_cancelled()) {
        Some(Ok(body)) => {
            if let Some(client) = client {
                client.heard();
            }
            Ok(body)
        }
        Some(Err(ReadBodyError::PayloadTooLarge)) => Err(TOO_LARGE.problem()),
        Some(Err(_)) => Err(INCOMPLETE_BODY.problem()),
        None => Err(SLOW_BODY.problem()),
    }
}
