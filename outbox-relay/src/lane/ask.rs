//! Finding out, over another connection, which events of a window have no answer.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use amqp::Reconnect;

use super::{Lane, Replacement};
use crate::{
    event::Event,
    evidence::EventKind,
    lease,
    publish::{Fates, Guards, OnStall},
    queue::QUARANTINE_WINDOWS,
};

/// Events that are published once more, each over a channel of its own, to find out which of them have no answer.
/// Their bytes, and one event more.
const SAMPLE: (usize, usize) = (QUARANTINE_WINDOWS, 4 * 1024 * 1024);
/// The broker may be slow for all. Without an answer to anybody, nothing is said of these for so long.
const SLOW_FOR_ALL: Duration = Duration::from_secs(4);

impl Lane {
    /// A connection stands still over these events: a queue that has lost its majority stops it after about thirty. Asks
    /// the broker over another one, each event over a channel of its own, what it says to some of them.
    pub(super) async fn ask(
        &self,
        events: &[&Event],
        unanswered: Vec<usize>,
        other: &Mutex<Replacement>,
    ) -> Option<Fates> {
        let permit = Arc::clone(&self.ask_permits).acquire_owned().await.ok()?;
        let link = self.broker.connect(&mut Reconnect::beginning_with(self.number)).await.ok()?;
        let sent = lease::now();
        let guards = Guards {
            may_publish: &|| self.lease.is_valid(),
            on_confirm: &|| self.note_confirm(sent),
            // A broker that is slow answers nobody.
            on_stall: OnStall::GiveUp(&|still| {
                still >= SLOW_FOR_ALL || self.last_confirmed.load(Ordering::Relaxed) >= sent
            }),
        };
        let sample = sample(events, unanswered);
        let fates = self.sender(&link).each_over_own_channel(sample, &guards).await;
        *other.lock().unwrap_or_else(PoisonError::into_inner) = Some((link, permit));
        (!fates.is_empty()).then_some(fates)
    }
}

/// One event of each kind, and then as many more as may be; of an aggregate the first only, since channels keep no order
/// among them.
fn sample<'a>(events: &[&'a Event], mut unanswered: Vec<usize>) -> Vec<(usize, &'a Event)> {
    let (mut aggregates, mut kinds) = (HashSet::new(), HashSet::new());
    unanswered.retain(|n| aggregates.insert((&events[*n].aggregate_type, &events[*n].aggregate_id)));
    let (first, more): (Vec<usize>, Vec<usize>) =
        unanswered.into_iter().partition(|n| kinds.insert(EventKind::of(events[*n])));
    let mut bytes = 0;
    let all = first.into_iter().chain(more).map(|n| (n, events[n]));
    let fitting = all.take(SAMPLE.0).take_while(|(_, event)| {
        let fits = bytes < SAMPLE.1;
        bytes += event.size();
        fits
    });
    fitting.collect()
}
