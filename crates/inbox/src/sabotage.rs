//! In debug builds, a guard that is switched off: `INBOX_SABOTAGE=commit` acknowledges before the commit. So
//! `devstack chaos --sabotage` shows that its oracle sees what the guard is for. A release build refuses the
//! setting, and has nothing of it.

/// The setting.
pub const VARIABLE: &str = "INBOX_SABOTAGE";

/// What can be switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Guard {
    /// A message is acknowledged after the commit.
    Commit,
    /// A version that was applied is not applied again.
    Duplicates,
}

/// Refuses the setting in a release build, and what it does not know. To be called by a program before anything
/// else; the error says what the setting should be.
pub fn check() -> Result<(), &'static str> {
    match std::env::var_os(VARIABLE) {
        None => Ok(()),
        Some(_) if !cfg!(debug_assertions) => {
            Err("is for debug builds; a release switches no guard off. Unset it")
        }
        Some(name) if name == "commit" || name == "duplicates" => {
            tracing::warn!(guard = name.to_str(), "a guard is switched off; events will be lost or doubled");
            Ok(())
        }
        Some(_) => Err("should be one of commit, duplicates"),
    }
}

/// Whether a guard is switched off.
#[cfg(debug_assertions)]
pub(crate) fn is_off(guard: Guard) -> bool {
    static OFF: std::sync::OnceLock<Option<Guard>> = std::sync::OnceLock::new();
    let off = OFF.get_or_init(|| match std::env::var(VARIABLE).ok()?.as_str() {
        "commit" => Some(Guard::Commit),
        "duplicates" => Some(Guard::Duplicates),
        _ => None,
    });
    *off == Some(guard)
}

/// See above.
#[cfg(not(debug_assertions))]
pub(crate) fn is_off(_: Guard) -> bool {
    false
}
