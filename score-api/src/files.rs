//! The process's limit on open files: each read that waits holds a connection.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// For everything but reads that wait: the log, the database, and reads that do not wait.
const OTHERS: u64 = 512;

/// Raises the limit as far as `waiters` need and the system lets it. Returns how many may wait: fewer
/// than asked for where files would run out, since then nobody would be answered any more.
pub(crate) fn places(waiters: u32) -> u32 {
    let needed = u64::from(waiters) + OTHERS;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let mut limit = current.unwrap_or(u64::MAX);
    if limit < needed {
        let raised = needed.min(maximum.unwrap_or(u64::MAX));
        if setrlimit(Resource::Nofile, Rlimit { current: Some(raised), maximum }).is_ok() {
            limit = raised;
        }
    }
    let places = u32::try_from(limit.saturating_sub(OTHERS)).unwrap_or(u32::MAX).min(waiters);
    if places < waiters {
        tracing::warn!(limit, places, "fewer reads may wait than MAX_WAITERS says: too few open files");
    }
    places
}
