//! What the service manager is told, when there is one: ready, what it waits for, and that it lives.

use std::time::Duration;

use daemon::health::Health;
use sd_notify::NotifyState;
use tokio_util::sync::CancellationToken;

use crate::lease::Lease;

/// A relay that goes round less often than this hangs: whatever it waits for ends sooner.
pub(crate) const PULSE: Duration = Duration::from_secs(30);
/// How often its state is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Tells the service manager until `stop`. Ready once, when the relay first can do its work, or stands by;
/// what it waits for as the status; and the watchdog only while the relay goes round.
pub(crate) async fn notify(health: Health, pulse: Lease, stop: CancellationToken) -> anyhow::Result<()> {
    let watchdog = sd_notify::watchdog_enabled();
    // The usual half of what is allowed, or sooner.
    let look = watchdog.map_or(LOOK, |within| LOOK.min(within / 2));
    let (mut ready, mut last_status) = (false, String::new());
    loop {
        let reasons = health.reasons();
        let status = match reasons.first() {
            None => "at work, or standing by".to_owned(),
            Some((part, reason, _)) => format!("waiting: {part}: {reason}"),
        };
        if reasons.is_empty() && !ready {
            ready = true;
            tell_manager(&[NotifyState::Ready]);
        }
        if status != last_status {
            tell_manager(&[NotifyState::Status(&status)]);
            last_status = status;
        }
        if watchdog.is_some() && pulse.is_valid() {
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
