//! A bound on the requests that use the database or wait for it.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How many requests may need the database at the same time.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct GateArgs {
    /// How many requests may use the database, or wait for it, at the same time. Requests above the limit get 503
    /// with `Retry-After`.
    #[arg(long, env = "MAX_IN_FLIGHT", default_value = "256", value_parser = clap::value_parser!(u32).range(1..=1_000_000), value_name = "COUNT")]
    pub max_in_flight: u32,
}

impl GateArgs {
    /// The gate.
    pub fn gate(self) -> Gate {
        Gate::new(self.max_in_flight)
    }
}

/// Lets a number of requests in at a time. A longer queue would serve none of them sooner.
#[derive(Clone, Debug)]
pub struct Gate(Arc<Semaphore>);

impl Default for Gate {
    /// Without a limit.
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(Semaphore::MAX_PERMITS)))
    }
}

impl Gate {
    /// For so many requests.
    pub fn new(requests: u32) -> Self {
        Self(Arc::new(Semaphore::new(requests as usize)))
    }

    /// A permit, which ends with what is returned. None: the limit is reached.
    pub fn enter(&self) -> Option<OwnedSemaphorePermit> {
        let permit = Arc::clone(&self.0).try_acquire_owned().ok();
        if permit.is_none() {
            metrics::counter!("http_overloaded_total").increment(1);
        }
        permit
    }
}
