use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// A consumer whose messages wait for longer counts as stalled.
const LONG: Duration = Duration::from_secs(10);
/// After this time, returned messages that were not delivered again have gone to another consumer.
const GONE: Duration = Duration::from_mins(1);

/// Detects that received messages wait without being applied, over all attempts and connections. A locked table
/// interrupts each attempt by itself, and the database's responses in between look healthy.
#[derive(Debug, Default)]
pub(crate) struct StallDetector(Mutex<Option<Waiting>>);

#[derive(Debug)]
struct Waiting {
    /// Since the first attempt.
    since: Instant,
    /// When the last one ended, and how; none while one is under way.
    ended: Option<(Instant, String)>,
    /// What the one before said.
    said: Option<String>,
}

impl StallDetector {
    /// An attempt begins.
    pub(crate) fn begin(&self) {
        let mut waiting = self.lock();
        match &mut *waiting {
            Some(waiting) => {
                waiting.said = waiting.ended.take().map(|(_, reason)| reason).or(waiting.said.take());
            }
            None => *waiting = Some(Waiting { since: Instant::now(), ended: None, said: None }),
        }
    }

    /// Something was applied.
    pub(crate) fn settled(&self) {
        *self.lock() = None;
    }

    /// The attempt was interrupted.
    pub(crate) fn interrupted(&self, reason: &str) {
        if let Some(waiting) = &mut *self.lock() {
            waiting.ended = Some((Instant::now(), reason.to_owned()));
        }
    }

    /// Why the consumer counts as stalled, if it does.
    pub(crate) fn reason(&self) -> Option<String> {
        let mut state = self.lock();
        let waiting = state.as_ref()?;
        let last = match &waiting.ended {
            Some((ended, _)) if ended.elapsed() >= GONE => {
                *state = None;
                return None;
            }
            Some((_, reason)) => Some(reason),
            None => waiting.said.as_ref(),
        };
        let long = waiting.since.elapsed() >= LONG;
        long.then(|| match last {
            Some(reason) => {
                format!("messages wait, and none was applied for {LONG:?} or more; the last attempt: {reason}")
            }
            None => format!(
                "messages wait, and none was applied for {LONG:?} or more; the first attempt is still under way: \
                 the database may wait for a lock"
            ),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Waiting>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
