//! Injects the faults of a plan: each begins at its time, and is undone at its end.

mod bindings;
mod broker;
mod database;
mod foreign_sender;
mod retry;
mod transactions;
mod unpublishable;

use std::{collections::BTreeMap, time::Duration};

use anyhow::Context;
use futures_util::future::try_join_all;
use tokio::time::Instant;

use crate::{
    event::PositionRange,
    fault::{Fault, Instance, Link, ScheduledFault},
    proxy::LinkState,
    testbed::Testbed,
};

/// What was injected.
#[derive(Clone, Debug, Default)]
pub(crate) struct Injected {
    /// How often each kind of fault.
    pub(crate) counts: BTreeMap<&'static str, usize>,
    /// Where notes may have been parked, and so published out of order.
    pub(crate) parked_notes: Vec<PositionRange>,
}

/// Injects all faults of the plan. Returns when all are undone.
pub(crate) async fn carry_out(
    testbed: &Testbed,
    plan: &[ScheduledFault],
    begin: Instant,
    say: fn(&str),
) -> anyhow::Result<Injected> {
    let mut injected = Injected::default();
    for fault in plan {
        *injected.counts.entry(fault.fault.kind()).or_default() += 1;
    }
    let faults = plan.iter().enumerate().map(async |(number, fault)| {
        tokio::time::sleep_until(begin + Duration::from_millis(fault.at)).await;
        say(&fault.to_string());
        let done = inject(testbed, *fault, number).await;
        done.with_context(|| format!("this fault went wrong: {fault}"))
    });
    injected.parked_notes = try_join_all(faults).await?.into_iter().flatten().collect();
    Ok(injected)
}

/// Injects one fault, and returns the positions of the notes that may have been parked, if any.
async fn inject(
    testbed: &Testbed,
    fault: ScheduledFault,
    number: usize,
) -> anyhow::Result<Option<PositionRange>> {
    let lasts = Duration::from_millis(fault.lasts);
    match fault.fault {
        Fault::NotesUnbound => bindings::notes_unbound(testbed, lasts).await.map(Some),
        Fault::MemosUnbound => bindings::memos_unbound(testbed, lasts).await.map(Some),
        Fault::TypeDenied => {
            bindings::positions_during(testbed, unpublishable::type_denied(testbed, lasts)).await.map(Some)
        }
        _ => inject_other(testbed, fault, number).await.map(|()| None),
    }
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
        Fault::NotesUnbound | Fault::MemosUnbound | Fault::TypeDenied => Ok(()),
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
