//! What the service manager is told, when there is one: ready, what it waits for, and that it lives.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use daemon::health::{Health, Said};
use sd_notify::NotifyState;
use tokio_util::sync::CancellationToken;

use crate::lease::Lease;

/// A relay that goes round less often than this hangs: whatever it waits for ends sooner.
pub(crate) const PULSE: Duration = Duration::from_secs(30);
/// How often its state is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// The relays of this process that should go round.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pulses(Arc<Mutex<Vec<Lease>>>);

/// One of them, until it is dropped.
#[derive(Debug)]
pub(crate) struct Pulse {
    lease: Lease,
    all: Pulses,
}

impl Pulses {
    /// One more.
    pub(crate) fn begin(&self) -> Pulse {
        let lease = Lease::new(PULSE);
        self.lock().push(lease.clone());
        Pulse { lease, all: self.clone() }
    }

    fn are_valid(&self) -> bool {
        self.lock().iter().all(Lease::is_valid)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Lease>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pulse {
    /// What the relay renews.
    pub(crate) fn lease(&self) -> Lease {
        self.lease.clone()
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.all.lock().retain(|lease| !lease.is_same(&self.lease));
    }
}

/// Tells the service manager until `stop`. Ready once, when the relay first can do its work, or stands by: of several
/// relays the first that can, since one whose database is away must not keep the others. What they wait for as the status;
/// and the watchdog only while each goes round.
pub(crate) async fn notify(health: Health, pulses: Pulses, stop: CancellationToken) -> anyhow::Result<()> {
    let watchdog = sd_notify::watchdog_enabled();
    // The usual half of what is allowed, or sooner.
    let look = watchdog.map_or(LOOK, |within| LOOK.min(within / 2));
    let (mut ready, mut last_status) = (false, String::new());
    loop {
        let reasons = health.reasons();
        let status = match reasons.first() {
            None => "at work, or standing by".to_owned(),
            Some(Said { member: Some(member), part, reason, .. }) => {
                format!("waiting: {member}: {part}: {reason}")
            }
            Some(Said { part, reason, .. }) => format!("waiting: {part}: {reason}"),
        };
        if !ready && health.can_anything() {
            ready = true;
            tell_manager(&[NotifyState::Ready]);
        }
        if status != last_status {
            tell_manager(&[NotifyState::Status(&status)]);
            last_status = status;
        }
        if watchdog.is_some() && pulses.are_valid() {
            tell_manager(&[NotifyState::Watchdog]);
        }
        if stop.run_until_cancelled(tokio::time::sleep(look)).await.is_none() {
            tell_manager(&[NotifyState::Stopping]);
            return Ok(());
        }
    }
}

/// Nothing is told, and nothing is wrong, where no service manager listens.
fn tell_manager(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "the service manager was not told");
    }
}
