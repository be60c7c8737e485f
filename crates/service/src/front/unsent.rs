//! Answers that wait to be taken. A client that asks for much and takes nothing makes the program keep it: all of
//! them together are kept within a bound.

use std::{pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use poem::{Body, IntoResponse, Response};
use tokio::{
    sync::{Mutex, OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout, timeout_at},
};

use super::clients::{Client, Cut};
use crate::problem::{OVERLOADED, Problem};

/// How much of large answers is kept at the same time, in KiB.
const ROOM: usize = 16 * 1024;
/// Answers up to so many bytes are always kept: every write's is one of them, and must not be lost.
const SMALL: usize = 4 * 1024;
/// How many large answers may wait for room, beside those that have it, and for how long.
const WAITING: usize = 8;
const WAIT: Duration = Duration::from_secs(5);
/// How soon a client that was cut off is gone.
const CUT: Duration = Duration::from_millis(100);

/// Marks an answer whose bytes are there only once, however often it is given.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shared;

/// The room for large answers, and who waits for it.
pub(super) struct Unsent {
    room: Arc<Semaphore>,
    places: Semaphore,
    /// Whoever has it makes room: one at a time, so that nobody is cut off for two.
    turn: Mutex<()>,
}

impl Default for Unsent {
    fn default() -> Self {
        Self { room: Arc::new(Semaphore::new(ROOM)), places: Semaphore::new(WAITING), turn: Mutex::new(()) }
    }
}

/// Bytes that have room until they are sent.
struct Kept {
    bytes: Bytes,
    _room: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Kept {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// The answer, with room for it; or another one that says that there is none. It is only a read that can lose its
/// answer so: problems are bounded by themselves.
pub(super) async fn kept(mut response: Response, client: &Client) -> Response {
    if response.data::<Shared>().is_some() || !response.status().is_success() {
        return response;
    }
    // All answers are in memory, so there is nothing to wait for.
    let Ok(bytes) = response.take_body().into_bytes().await else {
        return Problem::internal().into_response();
    };
    if bytes.len() <= SMALL {
        response.set_body(bytes);
        return response;
    }
    let Some(room) = room(client, bytes.len()).await else {
        return OVERLOADED.problem().into_response();
    };
    client.keeps();
    response.set_body(Body::from(Bytes::from_owner(Kept { bytes, _room: room })));
    response
}

/// Room for so many bytes. Whoever has left theirs longest makes room, as soon as it has had a moment.
async fn room(client: &Client, bytes: usize) -> Option<OwnedSemaphorePermit> {
    let Unsent { room, places, turn } = client.all().unsent();
    let kib = u32::try_from(bytes.div_ceil(1024).min(ROOM)).unwrap_or(u32::MAX);
    if let Ok(room) = Arc::clone(room).try_acquire_many_owned(kib) {
        return Some(room);
    }
    let made = async {
        let _place = places.try_acquire().ok()?;
        let _turn = turn.lock().await;
        let mut free = pin!(Arc::clone(room).acquire_many_owned(kib));
        let mut next = Instant::now();
        loop {
            if let Ok(room) = timeout_at(next, &mut free).await {
                return room.ok();
            }
            next = match client.all().cut_keeper() {
                Cut::Done | Cut::Nobody => Instant::now() + CUT,
                Cut::NotBefore(moment) => moment,
            };
        }
    };
    let made = timeout(WAIT, made).await.ok().flatten();
    if made.is_none() {
        metrics::counter!("http_overloaded_total").increment(1);
    }
    made
}
