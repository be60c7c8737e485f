//! When to end: a signal, or nobody left to work for.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The end of the command, once it is asked for.
#[derive(Clone, Debug, Default)]
pub struct Ending {
    /// Asked to end.
    pub asked: CancellationToken,
    /// Asked again: no time for good order.
    pub hurry: CancellationToken,
    first: Arc<OnceLock<Instant>>,
}

impl Ending {
    /// Watches for SIGINT, SIGTERM, SIGHUP and the parent's end, and says which it was.
    pub fn watch() -> anyhow::Result<Self> {
        let ending = Self::default();
        let mut signals = Vec::new();
        for (kind, name) in [
            (SignalKind::interrupt(), "Ctrl-C"),
            (SignalKind::terminate(), "SIGTERM"),
            (SignalKind::hangup(), "the terminal is gone"),
        ] {
            signals.push((signal(kind).context("cannot listen for signals")?, name));
        }
        for (mut signal, name) in signals {
            let ending = ending.clone();
            tokio::spawn(async move {
                while signal.recv().await.is_some() {
                    ending.ask(name);
                }
            });
        }
        let orphaned = ending.clone();
        tokio::spawn(async move {
            let parent = std::os::unix::process::parent_id();
            while std::os::unix::process::parent_id() == parent {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            // A terminal that closes also sends SIGHUP; the two together are no reason to hurry.
            if !orphaned.asked.is_cancelled() {
                orphaned.ask("whoever started this is gone");
            }
        });
        Ok(ending)
    }

    fn ask(&self, reason: &str) {
        let first = self.first.get_or_init(Instant::now);
        if self.asked.is_cancelled() {
            // Some send a signal to the process and to its group, which is no second wish.
            if first.elapsed() < Duration::from_millis(500) {
                return;
            }
            crate::say(&format!("{reason}: hurrying"));
            self.hurry.cancel();
        } else {
            crate::say(&format!("{reason}: stopping; once more to hurry"));
            self.asked.cancel();
        }
    }
}
