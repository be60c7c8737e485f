//! One database as all pages see it: looked at by one task, at most once a second, however many pages are open.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use futures_util::FutureExt;
use tokio::{
    sync::{Notify, watch},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

/// A look that is so recent serves every page.
const FRESH: Duration = Duration::from_secs(1);
/// How long a page waits for a look. Then it shows the last one.
const PATIENCE: Duration = Duration::from_millis(1_500);
/// A look that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How often a database is looked at that no page asks for.
pub const TICK: Duration = Duration::from_secs(10);

/// What the last looks came to.
#[derive(Debug)]
pub struct Seen<L> {
    /// When the last look ended; none before the first.
    pub ended: Option<Instant>,
    /// The last one that did not fail.
    pub good: Option<Good<L>>,
    /// Why the last one failed, if it did.
    pub away: Option<Away>,
}

/// A look that did not fail.
#[derive(Debug)]
pub struct Good<L> {
    /// When, by this machine's clock.
    pub at: DateTime<Utc>,
    /// What was seen.
    pub look: Arc<L>,
}

/// A database that does not respond.
#[derive(Clone, Debug)]
pub struct Away {
    /// When the first of the looks failed.
    pub since: DateTime<Utc>,
    /// Why the last one did.
    pub reason: String,
}

impl<L> Clone for Good<L> {
    fn clone(&self) -> Self {
        Self { at: self.at, look: Arc::clone(&self.look) }
    }
}

/// What is looked at.
pub trait Target: Sync {
    /// What a look sees.
    type Look: Send + Sync;

    /// Looks once; or why that failed.
    fn look(&self) -> impl Future<Output = Result<Self::Look, String>> + Send;
}

/// The task's side is [`run`](Self::run), a page's side [`latest`](Self::latest).
#[derive(Debug)]
pub struct Watch<L> {
    seen: watch::Sender<Arc<Seen<L>>>,
    asked: Notify,
}

impl<L> Default for Watch<L> {
    fn default() -> Self {
        let seen = Seen { ended: None, good: None, away: None };
        Self { seen: watch::Sender::new(Arc::new(seen)), asked: Notify::new() }
    }
}

impl<L: Send + Sync> Watch<L> {
    /// A look that is at most a second old; or, of a database that takes its time, the last one.
    pub async fn latest(&self) -> Arc<Seen<L>> {
        let mut seen = self.seen.subscribe();
        let asked = Instant::now();
        let is_fresh = seen.borrow().ended.is_some_and(|ended| asked - ended < FRESH);
        if !is_fresh {
            self.asked.notify_one();
            let newer = seen.wait_for(|seen| seen.ended.is_some_and(|ended| ended >= asked));
            // The last one is better than none.
            let _late = timeout(PATIENCE, newer).await;
        }
        Arc::clone(&self.seen.borrow())
    }

    /// The last look, without waiting for one.
    pub fn last(&self) -> Arc<Seen<L>> {
        Arc::clone(&self.seen.borrow())
    }

    /// The next page that asks gets a new look: something was changed.
    pub fn is_stale(&self) {
        self.seen.send_modify(|seen| {
            *seen = Arc::new(Seen { ended: None, good: seen.good.clone(), away: seen.away.clone() });
        });
    }

    /// Looks when a page asks, and from time to time, until `stop`.
    pub async fn run(&self, stop: CancellationToken, target: &impl Target<Look = L>) {
        loop {
            let looked = match timeout(TIMEOUT, target.look()).await {
                Ok(looked) => looked,
                Err(_) => Err(format!("it did not respond within {} s", TIMEOUT.as_secs())),
            };
            // This look serves whoever has asked by now.
            let _served = self.asked.notified().now_or_never();
            self.seen.send_modify(|seen| {
                let now = Utc::now();
                let (good, away) = match looked {
                    Ok(look) => (Some(Good { at: now, look: Arc::new(look) }), None),
                    Err(reason) => {
                        let since = seen.away.as_ref().map_or(now, |away| away.since);
                        (seen.good.clone(), Some(Away { since, reason }))
                    }
                };
                *seen = Arc::new(Seen { ended: Some(Instant::now()), good, away });
            });
            let next = async {
                tokio::select! {
                    () = self.asked.notified() => {}
                    () = sleep(TICK) => {}
                }
            };
            if stop.run_until_cancelled(next).await.is_none() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[derive(Default)]
    struct Slow(AtomicU32);

    impl Target for Slow {
        type Look = u32;

        async fn look(&self) -> Result<u32, String> {
            let n = self.0.fetch_add(1, Ordering::Relaxed);
            if n > 0 {
                sleep(Duration::from_mins(1)).await;
            }
            Ok(n)
        }
    }

    #[tokio::test]
    async fn ten_pages_cost_one_look_and_a_late_one_is_not_waited_for() {
        let (watch, slow, stop) =
            (Arc::new(Watch::default()), Arc::new(Slow::default()), CancellationToken::new());
        let (task, target, until) = (Arc::clone(&watch), Arc::clone(&slow), stop.clone());
        let task = tokio::spawn(async move { task.run(until, &*target).await });
        let ten = futures_util::future::join_all((0..10).map(|_| watch.latest())).await;
        assert!(ten.iter().all(|seen| *seen.good.as_ref().unwrap().look == 0));
        assert_eq!(slow.0.load(Ordering::Relaxed), 1);
        watch.is_stale();
        let late = watch.latest().await;
        assert_eq!(*late.good.as_ref().unwrap().look, 0);
        assert!(late.away.is_none() && late.ended.is_none());
        while watch.last().away.is_none() {
            sleep(Duration::from_millis(50)).await;
        }
        let away = watch.last();
        assert_eq!(*away.good.as_ref().unwrap().look, 0);
        assert_eq!(away.away.as_ref().unwrap().reason, "it did not respond within 5 s");
        stop.cancel();
        task.await.unwrap();
    }
}
