//! A database session that one task keeps from use to use.
//!
//! A pool asks a connection that comes back whether it is still there, and hands out the one that has lain idle
//! for the longest time. A task that asks again and again pays for that with a round trip for each use, and
//! wanders through all of the pool's sessions, each of which has caches of its own to warm.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use sqlx::{PgPool, Postgres, pool::PoolConnection};
use tokio::time::timeout;

/// About how long a connection is kept without a use. It is there still, but for the rarest of cases, and is
/// not asked.
const FRESH: Duration = Duration::from_secs(1);

/// After so long it is given back in any case: pools end connections that are old.
const LONGEST: Duration = Duration::from_mins(5);

/// A connection of a pool, kept between uses for as long as others who need one get theirs.
#[derive(Debug)]
pub struct Session {
    pool: PgPool,
    shelf: Arc<Mutex<Shelf>>,
}

/// Where the connection lies between two uses.
#[derive(Debug, Default)]
struct Shelf {
    /// Since when.
    kept: Option<(PoolConnection<Postgres>, Instant)>,
    /// When one was last taken from the pool.
    taken: Option<Instant>,
    /// Somebody sees to it that it is given back.
    watched: bool,
}

impl Session {
    /// With connections of `pool`; none is taken before it is needed.
    pub fn of(pool: PgPool) -> Self {
        Self { pool, shelf: Arc::default() }
    }

    /// The connection that was kept, or else one of the pool. [`keep`](Self::keep) it when everything that was
    /// asked is answered and no transaction is open; otherwise drop it, and the pool sees to it.
    pub async fn take(&self) -> sqlx::Result<PoolConnection<Postgres>> {
        let kept = lock(&self.shelf).kept.take();
        if let Some((conn, _)) = kept.filter(|(_, since)| since.elapsed() < FRESH) {
            return Ok(conn);
        }
        lock(&self.shelf).taken = Some(Instant::now());
        // Boxed: a future of many kilobytes, and seldom needed.
        Box::pin(self.pool.acquire()).await
    }

    /// Keeps a connection for the next use, for a second or two, until the pool is closed. Not when the pool
    /// has no other one left to give.
    pub fn keep(&self, conn: PoolConnection<Postgres>) {
        let pool = &self.pool;
        let spare = pool.num_idle() > 0 || pool.size() < pool.options().get_max_connections();
        if pool.is_closed() || !spare {
            return;
        }
        let mut place = lock(&self.shelf);
        if place.taken.is_none_or(|taken| taken.elapsed() >= LONGEST) {
            return;
        }
        place.kept = Some((conn, Instant::now()));
        if !std::mem::replace(&mut place.watched, true) {
            tokio::spawn(give_back(pool.clone(), Arc::clone(&self.shelf)));
        }
    }
}

/// Waits until what was kept is not used any more, or the pool is closed, which waits for all of its
/// connections.
async fn give_back(pool: PgPool, shelf: Arc<Mutex<Shelf>>) {
    loop {
        let closed = timeout(FRESH, pool.close_event()).await.is_ok();
        let mut shelf = lock(&shelf);
        if closed || shelf.kept.as_ref().is_none_or(|(_, since)| since.elapsed() >= FRESH) {
            (shelf.kept, shelf.watched) = (None, false);
            return;
        }
    }
}

fn lock(shelf: &Mutex<Shelf>) -> MutexGuard<'_, Shelf> {
    shelf.lock().unwrap_or_else(PoisonError::into_inner)
}
