//! Points at which the fault suite kills the process, by the crate `fail`. They are behind the feature `failpoints`,
//! which no release has. `FAILPOINTS=apply=2*off->return` kills the process, as SIGKILL does, when it passes the step
//! `apply` for the third time, and `FAILPOINTS=apply=return(ID)` whenever that event is applied.

use crate::Event;

/// Passes a step of a transaction with events: `apply` (the handler was called, nothing is committed), `commit`
/// (nothing is acknowledged).
#[cfg(feature = "failpoints")]
pub(crate) fn hit(step: &str, events: &[Event]) {
    static READ_SETTING: std::sync::Once = std::sync::Once::new();
    // What is dropped takes its settings along.
    READ_SETTING.call_once(|| std::mem::forget(fail::FailScenario::setup()));
    fail::fail_point!(step, !events.is_empty(), |id| {
        if id.is_none_or(|id: String| events.iter().any(|event| event.id.to_string() == id)) {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        }
    });
}

/// See above.
#[cfg(not(feature = "failpoints"))]
pub(crate) fn hit(_: &str, _: &[Event]) {}
