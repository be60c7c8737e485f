//! A limit of the requests that use the database or wait for it.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The limit, as a setting.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct ConcurrencyArgs {
    /// How many requests may use the database, or wait for it, at the same time. Requests above the limit get 503
    /// with `Retry-After`.
    #[arg(long, env = "MAX_IN_FLIGHT", default_value = "256", value_parser = clap::value_parser!(u32).range(1..=1_000_000), value_name = "COUNT")]
    pub max_in_flight: u32,
}

impl ConcurrencyArgs {
    /// The limit.
    pub fn limit(self) -> ConcurrencyLimit {
        ConcurrencyLimit::new(self.max_in_flight)
    }
}

/// Limits how many requests run at a time. Further ones are refused: a queue would serve none of them sooner.
#[derive(Clone, Debug)]
pub struct ConcurrencyLimit(Arc<Semaphore>);

impl Default for ConcurrencyLimit {
    /// Without a limit.
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(Semaphore::MAX_PERMITS)))
    }
}

impl ConcurrencyLimit {
    /// Of this number of requests.
    pub fn new(requests: u32) -> Self {
        Self(Arc::new(Semaphore::new(requests as usize)))
    }

    /// A permit, until it is dropped; none when the limit is reached.
    pub fn try_acquire(&self) -> Option<OwnedSemaphorePermit> {
        let permit = Arc::clone(&self.0).try_acquire_owned().ok();
        if permit.is_none() {
            metrics::counter!("http_overloaded_total").increment(1);
        }
        permit
    }
}
