//! The relay's life: stand by, take leadership, and again when it is lost.

use std::{sync::atomic::Ordering, time::Duration};

use amqp::Backoff;
use tokio_util::sync::CancellationToken;

use crate::{
    lead::Lead,
    lease,
    relay::Relay,
    series::Series,
    session::{CandidateSession, SessionError, Watch},
};

/// How often a relay that does not lead asks whether it may.
const STANDBY: Duration = Duration::from_millis(500);

/// Relays until `stop`. Waits out whatever time can heal, and says in the health what it waits for.
pub(crate) async fn run(relay: Relay, stop: CancellationToken) -> anyhow::Result<()> {
    let mut pause = Backoff::default();
    while !stop.is_cancelled() {
        relay.pulse.renew(lease::now());
        let ended = tokio::select! {
            ended = lead(&relay, &mut pause, &stop) => ended,
            // Work is not cut in half, unless a server that does not answer would keep the process.
            () = async { stop.cancelled().await; tokio::time::sleep(relay.grace).await } => {
                tracing::warn!("not everything was answered in time; the next start publishes it again");
                return Ok(());
            }
        };
        match ended {
            Ok(()) => break,
            Err(error) if error.is_fatal() => return Err(error.into()),
            Err(error) => {
                relay.database_health.waiting(error.to_string());
                pause.wait(&stop).await;
            }
        }
    }
    Ok(())
}

/// One leadership, from standing by for it to losing it, which is an error, or to the process's end.
/// Whatever was in memory is forgotten then.
async fn lead(relay: &Relay, pause: &mut Backoff, stop: &CancellationToken) -> Result<(), SessionError> {
    let connect =
        CandidateSession::connect(&relay.database, &relay.name, relay.begin, &relay.identity, relay.lease);
    let Some(candidate) = stop.run_until_cancelled(connect).await else { return Ok(()) };
    let mut candidate = candidate?;
    relay.health.is_known_as("source", &candidate.source);
    let series = relay.series.get_or_init(|| Series::new(&candidate.source, &relay.name)).clone();
    // Other tasks begin now, and know the series.
    relay.connected.cancel();
    let mut watch = Watch::new(series.clone(), &relay.name);
    series.leader.set(0.0);
    let mut refused = false;
    while !candidate.ask().await? {
        relay.pulse.renew(lease::now());
        candidate.watch(&mut watch).await?;
        // Healthy: somebody publishes, and this one stands by. Not yet at the first refusal: that may be the lock
        // of this relay's own session, which was just ended and is not gone yet.
        if refused {
            let leaders = [&relay.events_health, &relay.paused_health, &relay.sequence_health];
            for part in [&relay.database_health, &relay.broker_health].into_iter().chain(leaders) {
                part.ready();
            }
            relay.nothing_flows.store(false, Ordering::Relaxed);
            pause.reset();
        }
        refused = true;
        let again = STANDBY.min(relay.lease / 4);
        if stop.run_until_cancelled(tokio::time::sleep(again)).await.is_none() {
            candidate.close().await;
            return Ok(());
        }
    }
    let session = candidate.lead().await?;
    relay.database_health.ready();
    pause.reset();
    series.leader.set(1.0);
    series.leaderships.increment(1);
    let mut lead = Lead::new(relay, (series.clone(), watch), session, stop);
    let ended = lead.work().await;
    series.leader.set(0.0);
    ended?;
    lead.end().await
}
