//! A request's body, of a bounded size and in a bounded time.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use poem::{
    Body, Request,
    error::ReadBodyError,
    web::headers::{ContentLength, HeaderMapExt},
};

use crate::problem::{INCOMPLETE_BODY, Problem, SLOW_BODY, TOO_LARGE};

/// The largest body, in bytes.
pub const MAX_BODY: usize = 64 * 1024;

/// The timeout of requests that came over no connection, as in tests.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What the server says of a request that came over a connection.
#[derive(Clone)]
pub(super) struct Inbound {
    body_timeout: Duration,
    body_read: Arc<AtomicBool>,
}

impl Inbound {
    pub(super) fn new(body_timeout: Duration) -> Self {
        Self { body_timeout, body_read: Arc::default() }
    }

    /// Whether the body was read to its end.
    pub(super) fn body_read(&self) -> bool {
        self.body_read.load(Ordering::Relaxed)
    }
}

/// Reads the body. The size limit holds for what is read, whatever the headers say; a body that they announce as
/// larger is not read at all. 413, 408 or 400 otherwise.
pub async fn read_body(request: &Request, body: Body) -> Result<Bytes, Problem> {
    let announced = request.headers().typed_get::<ContentLength>();
    if announced.is_some_and(|length| length.0 > MAX_BODY as u64) {
        return Err(TOO_LARGE.problem());
    }
    let inbound = request.data::<Inbound>();
    let timeout = inbound.map_or(TIMEOUT, |inbound| inbound.body_timeout);
    match tokio::time::timeout(timeout, body.into_bytes_limit(MAX_BODY)).await {
        Ok(Ok(body)) => {
            if let Some(inbound) = inbound {
                inbound.body_read.store(true, Ordering::Relaxed);
            }
            Ok(body)
        }
        Ok(Err(ReadBodyError::PayloadTooLarge)) => Err(TOO_LARGE.problem()),
        Ok(Err(_)) => Err(INCOMPLETE_BODY.problem()),
        Err(_) => Err(SLOW_BODY.problem()),
    }
}
