//! In debug builds, a place to die: `INBOX_FAILPOINT=apply:3` kills the process, as SIGKILL does, when it
//! comes by the step `apply` for the third time, and `INBOX_FAILPOINT=event:ID` whenever that event is
//! applied. Compiled to nothing in a release.

use crate::Event;

/// Passes a step of a transaction: `apply` (the handler was called, nothing is committed), `commit`
/// (nothing is acknowledged).
#[cfg(debug_assertions)]
pub(crate) fn hit(step: &str, events: &[Event]) {
    use std::sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    };

    static POINT: OnceLock<Option<(String, String)>> = OnceLock::new();
    static PASSED: AtomicU32 = AtomicU32::new(0);
    let point = POINT.get_or_init(|| {
        let value = std::env::var("INBOX_FAILPOINT").ok()?;
        let (step, when) = value.split_once(':')?;
        Some((step.to_owned(), when.to_owned()))
    });
    let Some((wanted, when)) = point else { return };
    let now = match wanted.as_str() {
        "event" => step == "apply" && events.iter().any(|event| event.id.to_string() == *when),
        wanted => {
            wanted == step
                && !events.is_empty()
                && when.parse() == Ok(PASSED.fetch_add(1, Ordering::Relaxed) + 1)
        }
    };
    if now {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

/// See above.
#[cfg(not(debug_assertions))]
pub(crate) fn hit(_: &str, _: &[Event]) {}
