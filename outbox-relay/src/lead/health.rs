//! What the relay says of itself at `/ready` and in its metrics.

use std::sync::atomic::Ordering;

use super::Lead;
use crate::{evidence::PublishFailure, lease, rules::Unroutable, series::number};

impl Lead<'_> {
    /// Says at `/ready` what the relay waits for.
    pub(super) fn report_health(&self) {
        let relay = self.relay;
        relay.pulse.renew(lease::now());
        self.report_broker();
        self.report_exchange();
        match &self.session.paused {
            None => relay.paused_health.ready(),
            Some(paused) => {
                relay.paused_health.waiting(format!("{paused}; it goes on with: outbox-relay resume"));
            }
        }
        let in_memory = self.queue.waiting();
        let rows: i64 = self.waiting.values().sum();
        self.series.held.set(count(in_memory) + number(rows));
        self.series.waiting_rows.set(number(rows));
        self.series.parked.set(number(self.parked));
        self.report_events(i64::try_from(in_memory).unwrap_or(i64::MAX).saturating_add(rows));
    }

    /// Lanes without a connection are no outage while others have one: they publish everything.
    fn report_broker(&self) {
        let lanes = self.states.iter().zip(&self.asleep).take(self.states.len() - 1);
        let lanes: Vec<_> = lanes.filter(|(_, asleep)| !**asleep).map(|(state, _)| state).collect();
        let away: Vec<&String> = lanes.iter().copied().flatten().collect();
        let health = &self.relay.broker_health;
        match away.first() {
            None => health.ready(),
            Some(reason) if away.len() == lanes.len() => health.waiting((*reason).clone()),
            Some(reason) => health.attention(format!(
                "{} of {} connections cannot publish, and the others do: {reason}",
                away.len(),
                lanes.len()
            )),
        }
    }

    /// An exchange that is missing after events were settled was lost with everything that its queues had. It stays said
    /// until the process ends: nothing tells whether a replay has brought back what was lost.
    fn report_exchange(&self) {
        let relay = self.relay;
        let low_water = self.session.positions().low_water();
        if relay.broker.was_missing.swap(false, Ordering::Relaxed) && low_water > 0 {
            let lost = format!(
                "the exchange {:?} did not exist, although everything up to position {low_water} is settled: RabbitMQ \
                 lost its data, or the exchange was deleted. What lay in queues and was not consumed is lost with \
                 them. When the subscribers' queues exist again, publish it again: outbox-relay replay \
                 --to-everybody --from POSITION, where each subscriber had consumed everything below that position; if \
                 that is unknown: outbox-relay replay --to-everybody --all. Subscribers that follow versions ignore \
                 what they have, and those with side effects should ignore what is replayed. This message ends when \
                 the relay is restarted",
                relay.broker.exchange.as_str()
            );
            tracing::warn!(low_water, reason = lost, "the exchange did not exist any more");
            relay.exchange_health.attention(lost);
        }
    }

    fn report_events(&self, waiting: i64) {
        let relay = self.relay;
        let health = &relay.events_health;
        let evidence = &self.queue.evidence;
        if !evidence.is_untested() && evidence.flows() {
            relay.nothing_flows.store(false, Ordering::Relaxed);
        }
        let why = || {
            let why = evidence.why(|_, _| true);
            why.unwrap_or("outbox-relay parked list says which and why").to_owned()
        };
        if let Some((kind, n)) = self.full() {
            health.waiting(format!(
                "{n} events of type {} wait, as many as --max-waiting allows, so those that follow stay in memory \
                 until it is full: {}",
                kind.type_,
                why()
            ));
        } else if waiting > 0 && self.queue.is_crowded() && self.parked >= relay.limits.parked {
            health.waiting(format!(
                "{} events are set aside already, as many as --max-parked allows, so others wait: {}",
                self.parked,
                why()
            ));
        } else if !evidence.flows() && (waiting > 0 || self.queue.has_unsettled()) {
            // Also while each of them is under way, for another try.
            relay.nothing_flows.store(true, Ordering::Relaxed);
            health.waiting(why());
        } else if evidence.is_untested()
            && relay.nothing_flows.load(Ordering::Relaxed)
            && !self.is_caught_up()
        {
            // What an earlier session of the leader has said, until something is known.
        } else if let Some(why) = evidence.why(|type_, failure| {
            failure == PublishFailure::Unroutable && relay.policies.unroutable.of(type_) == Unroutable::Hold
        }) {
            health.waiting(why);
        } else if waiting > 0 {
            let events =
                if waiting == 1 { "1 event waits".to_owned() } else { format!("{waiting} events wait") };
            health.attention(format!("{events}, and everything else goes on: {}", why()));
        } else if self.parked > 0 {
            health.attention("events are set aside (outbox-relay parked list); the rest goes on");
        } else {
            health.ready();
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a gauge is a float")]
pub(super) fn count(count: usize) -> f64 {
    count as f64
}
