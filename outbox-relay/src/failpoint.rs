//! Points at which the fault suite kills the process, by the crate `fail`. They are behind the feature `failpoints`,
//! which no release has. `FAILPOINTS=publish=2*off->return` kills the process, as SIGKILL does, when it passes the step
//! `publish` for the third time.

/// Passes a step: `read` (events are in memory), `publish` (a window is written, nothing confirmed),
/// `confirm` (its fate is known, nothing settled), `park` (events are set aside, nothing settled), `save`
/// (progress is stored), `erase` (a step of an erasure is not committed yet).
#[cfg(feature = "failpoints")]
pub(crate) fn hit(step: &str) {
    static READ_SETTING: std::sync::Once = std::sync::Once::new();
    // What is dropped takes its settings along.
    READ_SETTING.call_once(|| std::mem::forget(fail::FailScenario::setup()));
    fail::fail_point!(step, |_| {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    });
}

/// See above.
#[cfg(not(feature = "failpoints"))]
pub(crate) fn hit(_: &str) {}
