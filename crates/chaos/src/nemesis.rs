//! Injects the faults of a plan: each begins at its time, and is undone at its end.

mod back_in_time;
mod bindings;
mod broker;
mod database;
mod foreign_sender;
mod recovery;
mod retry;
mod transactions;
mod unpublishable;

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context;
use futures_util::future::try_join_all;
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    event::PositionRange,
    fault::{Fault, Instance, Link, ScheduledFault},
    history::History,
    lost_time::LostTime,
    model::Person,
    oracle::{self, Outbox},
    proxy::LinkState,
    testbed::Testbed,
    violation::{Violation, Violations},
};

/// What was injected.
#[derive(Debug, Default)]
pub(crate) struct Injected {
    /// How often each kind of fault.
    pub(crate) counts: BTreeMap<&'static str, usize>,
    /// Where notes may have been parked, and so published out of order.
    pub(crate) parked_notes: Vec<PositionRange>,
    /// What was lost when databases went back in time.
    pub(crate) losses: Vec<LostTime>,
    /// What the clients did before, counted.
    pub(crate) forgotten: History,
}

/// What has been injected so far.
#[derive(Debug)]
struct Records<'a> {
    injected: Mutex<Injected>,
    violations: &'a Violations,
}

impl Records<'_> {
    fn lock(&self) -> MutexGuard<'_, Injected> {
        self.injected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often a database has gone back in time.
    fn count(&self) -> usize {
        self.lock().losses.len()
    }

    /// Compares what the clients did with what is stored before a database goes back in time.
    fn judge(&self, outbox: &Outbox, persons: &BTreeMap<Uuid, Person>, history: &History) {
        oracle::check_writes((outbox, persons), history, &self.lock().losses, self.violations);
    }

    /// A database has gone back in time. What the clients did, and where notes were parked in the lost time, is forgotten.
    fn lost(&self, mut lost: LostTime, history: History) {
        let mut injected = self.lock();
        lost.parked_notes.clone_from(&injected.parked_notes);
        let restored = lost.person.restored_position;
        for range in &mut injected.parked_notes {
            range.through = range.through.min(restored);
        }
        injected.forgotten.merge(history.forget());
        injected.losses.push(lost);
    }

    /// The procedure after the last lost time of this source has ended.
    fn recovered(&self, source: &str, incarnation: i64, from_position: i64, last: i64) {
        let mut injected = self.lock();
        let Some(loss) = injected.losses.last_mut().and_then(|lost| lost.of_mut(source)) else { return };
        (loss.incarnation, loss.from_position, loss.recovered_position) = (incarnation, from_position, last);
    }

    fn not_recovered(&self, why: String) {
        self.violations.add(Violation::NotRecovered, why);
    }
}

/// Injects all faults of the plan. Returns when all are undone.
pub(crate) async fn carry_out(
    testbed: &Testbed,
    plan: &[ScheduledFault],
    begin: Instant,
    violations: &Violations,
    say: fn(&str),
) -> anyhow::Result<Injected> {
    let mut injected = Injected::default();
    for fault in plan {
        *injected.counts.entry(fault.fault.kind()).or_default() += 1;
    }
    let records = Records { injected: Mutex::new(injected), violations };
    let faults = plan.iter().enumerate().map(async |(number, fault)| {
        tokio::time::sleep_until(begin + Duration::from_millis(fault.at)).await;
        let _no_procedure =
            if fault.fault.needs_repair() { Some(back_in_time::REPAIRS.read().await) } else { None };
        say(&fault.to_string());
        let done = inject(testbed, &records, *fault, number).await;
        done.with_context(|| format!("this fault went wrong: {fault}"))
    });
    try_join_all(faults).await?;
    Ok(records.injected.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// After the last lost time: an operator drops what a subscriber has rejected of it since.
pub(crate) async fn drop_rejected(testbed: &Testbed) -> anyhow::Result<()> {
    recovery::drop_rejected(testbed).await
}

/// Injects one fault.
async fn inject(
    testbed: &Testbed,
    records: &Records<'_>,
    fault: ScheduledFault,
    number: usize,
) -> anyhow::Result<()> {
    let lasts = Duration::from_millis(fault.lasts);
    let parked_notes = match fault.fault {
        Fault::Restored | Fault::FailedOver => {
            return Box::pin(back_in_time::back_in_time(testbed, records, fault.fault, lasts)).await;
        }
        Fault::NotesUnbound => bindings::notes_unbound(testbed, lasts).await?,
        Fault::MemosUnbound => bindings::memos_unbound(testbed, lasts).await?,
        Fault::TypeDenied => {
            bindings::positions_during(testbed, unpublishable::type_denied(testbed, lasts)).await?
        }
        _ => return inject_other(testbed, fault, number).await,
    };
    records.lock().parked_notes.push(parked_notes);
    Ok(())
}

async fn inject_other(testbed: &Testbed, fault: ScheduledFault, number: usize) -> anyhow::Result<()> {
    let lasts = Duration::from_millis(fault.lasts);
    let supervisor = &testbed.supervisor;
    match fault.fault {
        Fault::Killed(instance) => supervisor.kill(instance, lasts).await,
        Fault::Stopped(instance) => supervisor.suspend(instance, lasts).await,
        Fault::DatabaseCrashed | Fault::CommitsLost | Fault::SessionsEnded => {
            let affected = Instance::ALL;
            database::database(testbed, fault.fault, &affected, lasts).await?;
            supervisor.fault_ends(&affected);
            Ok(())
        }
        Fault::Transaction(open, commits) => {
            transactions::transaction(testbed, open, commits, lasts, number).await
        }
        Fault::Slow(link, delay) => {
            set_link(testbed, link, LinkState::Slow(Duration::from_millis(delay)), lasts).await
        }
        Fault::Cut(link) => set_link(testbed, link, LinkState::Cut, lasts).await,
        Fault::HalfOpen(link, direction) => {
            set_link(testbed, link, LinkState::HalfOpen(direction), lasts).await
        }
        Fault::BrokerKilled
        | Fault::BrokerApp
        | Fault::BrokerStopped
        | Fault::BrokerBlocked
        | Fault::ConnectionsClosed
        | Fault::ChannelsClosed => {
            let affected: Vec<Instance> =
                Instance::ALL.into_iter().filter(|instance| instance.has_broker()).collect();
            supervisor.fault_begins(&affected);
            broker::broker(testbed, fault.fault, lasts).await?;
            supervisor.fault_ends(&affected);
            Ok(())
        }
        Fault::ScoreUnbound => bindings::score_unbound(testbed, lasts).await,
        Fault::QueueFull => unpublishable::queue_full(testbed, lasts, number).await,
        Fault::BodyTooLarge => unpublishable::body_too_large(testbed, number).await,
        Fault::RowUnsendable => unpublishable::row_unsendable(testbed, number).await,
        Fault::ForeignSender => foreign_sender::foreign_sender(testbed).await,
        Fault::ReadOnly(database) => database::read_only(testbed, database, lasts).await,
        // See `inject`.
        Fault::NotesUnbound
        | Fault::MemosUnbound
        | Fault::TypeDenied
        | Fault::Restored
        | Fault::FailedOver => Ok(()),
    }
}

async fn set_link(testbed: &Testbed, link: Link, state: LinkState, lasts: Duration) -> anyhow::Result<()> {
    let affected: Vec<Instance> = link.instance().into_iter().collect();
    testbed.supervisor.fault_begins(&affected);
    testbed.set_link(link, state);
    tokio::time::sleep(lasts).await;
    testbed.set_link(link, LinkState::Up);
    testbed.supervisor.fault_ends(&affected);
    Ok(())
}
