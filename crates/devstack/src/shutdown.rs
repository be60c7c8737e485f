//! When a command has to end: on a signal, or when its parent has ended.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The two phases of the end of a command.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// Requested: end in good order.
    pub requested: CancellationToken,
    /// Requested again: end at once.
    pub immediate: CancellationToken,
    first: Arc<OnceLock<Instant>>,
}

impl Shutdown {
    /// Watches for SIGINT, SIGTERM, SIGHUP and the end of the parent process, and says which it was.
    pub fn watch() -> anyhow::Result<Self> {
        let shutdown = Self::default();
        let mut signals = Vec::new();
        for (kind, name) in [
            (SignalKind::interrupt(), "Ctrl-C"),
            (SignalKind::terminate(), "SIGTERM"),
            (SignalKind::hangup(), "the terminal is gone"),
        ] {
            signals.push((signal(kind).context("cannot listen for signals")?, name));
        }
        for (mut signal, name) in signals {
            let shutdown = shutdown.clone();
            tokio::spawn(async move {
                while signal.recv().await.is_some() {
                    shutdown.ask(name);
                }
            });
        }
        let orphaned = shutdown.clone();
        tokio::spawn(async move {
            let parent = std::os::unix::process::parent_id();
            while std::os::unix::process::parent_id() == parent {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            // A terminal that closes also sends SIGHUP. The two together count once.
            if !orphaned.requested.is_cancelled() {
                orphaned.ask("the parent process has ended");
            }
        });
        Ok(shutdown)
    }

    fn ask(&self, reason: &str) {
        let first = self.first.get_or_init(Instant::now);
        if self.requested.is_cancelled() {
            // A signal to the process and to its group counts once.
            if first.elapsed() < Duration::from_millis(500) {
                return;
            }
            crate::say(&format!("{reason}: ending at once"));
            self.immediate.cancel();
        } else {
            crate::say(&format!("{reason}: stopping; once more to end at once"));
            self.requested.cancel();
        }
    }
}
