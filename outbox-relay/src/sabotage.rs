//! In debug builds, a guard that is switched off: `OUTBOX_RELAY_SABOTAGE=confirms` publishes without waiting
//! for confirms. So `devstack chaos --sabotage` shows that its oracle sees what the guard is for. A release
//! build refuses the setting, and has nothing of it.

use service::config::SettingError;
use sqlx::PgConnection;

use crate::position::Positions;

/// The setting.
const VARIABLE: &str = "OUTBOX_RELAY_SABOTAGE";

/// What can be switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(debug_assertions), expect(dead_code, reason = "the others are named in debug builds alone"))]
pub(crate) enum Guard {
    /// What was published counts once it is confirmed.
    Confirms,
    /// `low_water` counts what is settled alone.
    LowWater,
    /// Gaps and what lies above are read in one snapshot.
    Snapshot,
    /// A lost connection to the database voids everything in memory.
    Memory,
}

/// Refuses the setting in a release build, and what it does not know. To be called before anything else.
pub(crate) fn check() -> Result<(), SettingError> {
    let Some(name) = std::env::var_os(VARIABLE) else { return Ok(()) };
    if !cfg!(debug_assertions) {
        return Err(SettingError::new(
            VARIABLE,
            "is for debug builds; a release switches no guard off. Unset it",
        ));
    }
    match name.to_str() {
        Some("confirms" | "low-water" | "snapshot" | "memory") => {
            tracing::warn!(guard = name.to_str(), "a guard is switched off; events will be lost");
            Ok(())
        }
        _ => Err(SettingError::new(VARIABLE, "should be one of confirms, low-water, snapshot, memory")),
    }
}

#[cfg(debug_assertions)]
pub(crate) use on::{has_read, is_off, keep, kept, look_first};
#[cfg(not(debug_assertions))]
pub(crate) use out::{has_read, is_off, keep, kept, look_first};

#[cfg(debug_assertions)]
mod on {
    use std::sync::{Mutex, OnceLock, PoisonError};

    use super::{Guard, PgConnection, Positions, VARIABLE};
    use crate::reader::{Event, READ, Row};

    type Progress = (i64, Vec<(i64, i64)>);
    static KEPT: Mutex<Option<Progress>> = Mutex::new(None);
    /// What was read last, while it is not certain that a crash cannot take it back.
    static READ_LAST: Mutex<Vec<i64>> = Mutex::new(Vec::new());

    /// Whether a guard is switched off.
    pub(crate) fn is_off(guard: Guard) -> bool {
        static OFF: OnceLock<Option<Guard>> = OnceLock::new();
        let off = OFF.get_or_init(|| match std::env::var(VARIABLE).ok()?.as_str() {
            "confirms" => Some(Guard::Confirms),
            "low-water" => Some(Guard::LowWater),
            "snapshot" => Some(Guard::Snapshot),
            "memory" => Some(Guard::Memory),
            _ => None,
        });
        *off == Some(guard)
    }

    /// Looks for what is missing in a statement of its own: the statement that follows reads what was found, and
    /// what lies above.
    pub(crate) async fn look_first(
        conn: &mut PgConnection,
        (from, to): (&mut Vec<i64>, &mut Vec<i64>),
        high: i64,
    ) -> Result<(), sqlx::Error> {
        if is_off(Guard::Snapshot) && !from.is_empty() {
            let gaps = sqlx::query_as::<_, Row>(READ).bind(&*from).bind(&*to).bind(high);
            let found = gaps.bind(1_000_i64).bind(0_i64).fetch_all(conn).await?;
            *from = found.into_iter().map(|(position, ..)| position).collect();
            to.clone_from(from);
        }
        Ok(())
    }

    /// These events were just read.
    pub(crate) fn has_read(events: &[Event]) {
        if is_off(Guard::Memory) {
            let positions = events.iter().map(|event| event.position).collect();
            *READ_LAST.lock().unwrap_or_else(PoisonError::into_inner) = positions;
        }
    }

    /// Remembers where the reading stood when the connection was lost: what was read, was read. (What lay in
    /// the queue is read again, as if the queue had been kept, too.)
    pub(crate) fn keep(positions: &Positions) {
        if is_off(Guard::Memory) {
            let read = READ_LAST.lock().unwrap_or_else(PoisonError::into_inner);
            let (high, open) = positions.open(usize::MAX);
            let open = open.into_iter().flat_map(|(from, to)| from..=to);
            let open = open.filter(|position| !read.contains(position)).map(|position| (position, position));
            *KEPT.lock().unwrap_or_else(PoisonError::into_inner) = Some((high, open.collect()));
        }
    }

    /// What was remembered.
    pub(crate) fn kept() -> Option<Progress> {
        KEPT.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// See above.
#[cfg(not(debug_assertions))]
mod out {
    use super::{Guard, PgConnection, Positions};
    use crate::reader::Event;

    pub(crate) fn is_off(_: Guard) -> bool {
        false
    }

    #[expect(clippy::unused_async, reason = "in a debug build it looks")]
    pub(crate) async fn look_first(
        _: &mut PgConnection,
        _: (&mut Vec<i64>, &mut Vec<i64>),
        _: i64,
    ) -> Result<(), sqlx::Error> {
        Ok(())
    }

    pub(crate) fn has_read(_: &[Event]) {}

    pub(crate) fn keep(_: &Positions) {}

    pub(crate) fn kept() -> Option<(i64, Vec<(i64, i64)>)> {
        None
    }
}
