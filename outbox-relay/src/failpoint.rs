//! In debug builds, a place to die: `OUTBOX_RELAY_FAILPOINT=publish:3` kills the process, as SIGKILL
//! does, when it comes by the step `publish` for the third time. Compiled to nothing in a release.

/// Passes a step: `read` (events are in memory), `publish` (a window is written, nothing confirmed),
/// `confirm` (its fate is known, nothing settled), `park` (events are set aside, nothing settled), `save`
/// (progress is stored), `erase` (a step of an erasure is not committed yet).
#[cfg(debug_assertions)]
pub(crate) fn hit(step: &str) {
    use std::sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    };

    static POINT: OnceLock<Option<(String, u32)>> = OnceLock::new();
    static PASSED: AtomicU32 = AtomicU32::new(0);
    let point = POINT.get_or_init(|| {
        let value = std::env::var("OUTBOX_RELAY_FAILPOINT").ok()?;
        let (step, count) = value.split_once(':')?;
        Some((step.to_owned(), count.parse().ok()?))
    });
    if let Some((wanted, count)) = point
        && wanted == step
        && PASSED.fetch_add(1, Ordering::Relaxed) + 1 == *count
    {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

/// See above.
#[cfg(not(debug_assertions))]
pub(crate) fn hit(_: &str) {}
