//! Carries a plan out: each fault at its time, and undone at its end.

mod bindings;
mod broker;
mod database;
mod refused;
mod retry;
mod stranger;
mod transactions;

use std::{collections::BTreeMap, time::Duration};

use anyhow::Context;
use futures_util::future::try_join_all;
use tokio::time::Instant;

use crate::{
    event::Stretch,
    fault::{Fault, Member, Place, What},
    field::Field,
    wire::Weather,
};

/// What was done.
#[derive(Clone, Debug, Default)]
pub(crate) struct Done {
    /// How often each kind was.
    pub(crate) counts: BTreeMap<&'static str, usize>,
    /// What may have been set aside.
    pub(crate) notes_aside: Vec<Stretch>,
}

/// Carries out all of it, from `begin` on. Returns when everything is undone.
pub(crate) async fn carry_out(
    field: &Field,
    plan: &[Fault],
    begin: Instant,
    say: fn(&str),
) -> anyhow::Result<Done> {
    let mut done = Done::default();
    for fault in plan {
        *done.counts.entry(fault.what.kind()).or_default() += 1;
    }
    let faults = plan.iter().enumerate().map(async |(number, fault)| {
        tokio::time::sleep_until(begin + Duration::from_millis(fault.at)).await;
        say(&fault.to_string());
        let one = one(field, *fault, number).await;
        one.with_context(|| format!("this fault went wrong: {fault}"))
    });
    done.notes_aside = try_join_all(faults).await?.into_iter().flatten().collect();
    Ok(done)
}

/// Returns the positions of the notes that may have been set aside, if any.
async fn one(field: &Field, fault: Fault, number: usize) -> anyhow::Result<Option<Stretch>> {
    let lasts = Duration::from_millis(fault.lasts);
    match fault.what {
        What::NotesUnbound => bindings::notes_unbound(field, lasts).await.map(Some),
        What::MemosUnbound => bindings::memos_unbound(field, lasts).await.map(Some),
        What::TypeDenied => {
            bindings::positions_during(field, refused::type_denied(field, lasts)).await.map(Some)
        }
        _ => plain(field, fault, number).await.map(|()| None),
    }
}

async fn plain(field: &Field, fault: Fault, number: usize) -> anyhow::Result<()> {
    let lasts = Duration::from_millis(fault.lasts);
    let crew = &field.crew;
    match fault.what {
        What::Killed(member) => crew.kill(member, lasts).await,
        What::Stopped(member) => crew.stop_and_go_on(member, lasts).await,
        What::DatabaseCrashed | What::CommitsLost | What::SessionsEnded => {
            let disturbed = Member::ALL;
            database::database(field, fault.what, &disturbed, lasts).await?;
            crew.calm(&disturbed);
            Ok(())
        }
        What::Transaction(open, commits) => {
            transactions::transaction(field, open, commits, lasts, number).await
        }
        What::Slow(place, delay) => {
            weather(field, place, Weather::Slow(Duration::from_millis(delay)), lasts).await
        }
        What::Cut(place) => weather(field, place, Weather::Cut, lasts).await,
        What::Silent(place, direction) => weather(field, place, Weather::Silent(direction), lasts).await,
        What::BrokerKilled
        | What::BrokerApp
        | What::BrokerStopped
        | What::BrokerBlocked
        | What::ConnectionsClosed
        | What::ChannelsClosed => {
            let disturbed: Vec<Member> =
                Member::ALL.into_iter().filter(|member| member.has_broker()).collect();
            crew.disturb(&disturbed);
            broker::broker(field, fault.what, lasts).await?;
            crew.calm(&disturbed);
            Ok(())
        }
        What::ScoreUnbound => bindings::score_unbound(field, lasts).await,
        What::QueueFull => refused::queue_full(field, lasts, number).await,
        What::BodyTooLarge => refused::body_too_large(field, number).await,
        What::RowUnsendable => refused::row_unsendable(field, number).await,
        What::ForeignSender => stranger::foreign_sender(field).await,
        What::ReadOnly(database) => database::read_only(field, database, lasts).await,
        // See `one`.
        What::NotesUnbound | What::MemosUnbound | What::TypeDenied => Ok(()),
    }
}

async fn weather(field: &Field, place: Place, weather: Weather, lasts: Duration) -> anyhow::Result<()> {
    let disturbed: Vec<Member> = place.member().into_iter().collect();
    field.crew.disturb(&disturbed);
    field.turn(place, weather);
    tokio::time::sleep(lasts).await;
    field.turn(place, Weather::Clear);
    field.crew.calm(&disturbed);
    Ok(())
}
