//! After the last fault: waiting until everything has arrived.

use std::{collections::BTreeMap, time::Duration};

use sqlx::Connection;
use tokio::time::Instant;

use super::{event::MISFIT, field::Field, subscriber::Subscriber};

/// How often it is looked, and said what is waited for.
const LOOK: Duration = Duration::from_millis(500);
const SAY: Duration = Duration::from_secs(10);

/// Waits until all programs are ready. Who is not is found by the oracle.
pub(crate) async fn ready(field: &Field, patience: Duration, say: fn(&str)) {
    if let Err(error) = field.crew.ready(patience).await {
        say(&error.to_string());
    }
}

/// Waits until everything has arrived everywhere, or nothing moves any more for `still`.
pub(crate) async fn arrived(
    field: &Field,
    subscriber: &Subscriber,
    still: Duration,
    say: fn(&str),
) -> anyhow::Result<()> {
    until(field, still, say, "everything has arrived", async || left(field, subscriber).await).await
}

/// Waits until nothing is `left`: how much of what, and in words.
async fn until(
    field: &Field,
    still: Duration,
    say: fn(&str),
    what: &str,
    left: impl AsyncFn() -> anyhow::Result<Vec<(i64, String)>>,
) -> anyhow::Result<()> {
    let (mut moved, mut said) = (Instant::now(), Instant::now());
    let mut last = Vec::new();
    loop {
        let now = left().await?;
        if now.is_empty() {
            return Ok(());
        }
        let words = || now.iter().map(|(_, words)| words.as_str()).collect::<Vec<_>>().join("; ");
        if now != last {
            moved = Instant::now();
        }
        if moved.elapsed() > still {
            let reasons: Vec<String> = field
                .crew
                .seen()
                .into_iter()
                .filter_map(|(member, log)| {
                    log.waits_for.map(|reason| format!("{}: {reason}", member.name()))
                })
                .collect();
            say(&format!("nothing has moved for {} s: {} {}", still.as_secs(), words(), reasons.join("; ")));
            return Ok(());
        }
        if said.elapsed() > SAY {
            said = Instant::now();
            say(&format!("until {what}: {}", words()));
        }
        last = now;
        tokio::time::sleep(LOOK).await;
    }
}

/// What has not arrived yet.
async fn left(field: &Field, subscriber: &Subscriber) -> anyhow::Result<Vec<(i64, String)>> {
    let mut left = unsettled(field, "person").await?;
    left.extend(unsettled(field, "score").await?);
    let mut conn = field.addresses.connect("person").await?;
    let (persons, events): (i64, i64) = sqlx::query_as(
        "SELECT count(*) FILTER (WHERE aggregate_type = 'person'), count(*) FILTER (WHERE aggregate_type <> $1)
         FROM outbox.event",
    )
    .bind(MISFIT)
    .fetch_one(&mut conn)
    .await?;
    conn.close().await?;
    let mut conn = field.addresses.connect("score").await?;
    let (applied, held, scores): (i64, i64, i64) = sqlx::query_as(
        "SELECT (SELECT coalesce(sum(version), 0)::bigint FROM inbox.aggregate),
                (SELECT count(*) FROM inbox.held), (SELECT count(*) FROM outbox.event)",
    )
    .fetch_one(&mut conn)
    .await?;
    conn.close().await?;
    let mut count = |number: i64, words: &str| {
        if number != 0 {
            left.push((number, format!("{number} {words}")));
        }
    };
    count(persons - applied, "events of persons to apply");
    count(held, "held");
    let seen: usize = subscriber.memory().chains.values().map(BTreeMap::len).sum();
    count(events + scores - i64::try_from(seen)?, "events to reach the subscriber");
    Ok(left)
}

async fn unsettled(field: &Field, database: &str) -> anyhow::Result<Vec<(i64, String)>> {
    let mut conn = field.addresses.connect(database).await?;
    let (behind, parked): (i64, i64) = sqlx::query_as(
        "SELECT greatest((SELECT coalesce(max(position), 0) FROM outbox.event)
                         - (SELECT coalesce(min(low_water), 0) FROM outbox.relay), 0),
                (SELECT count(*) FROM outbox.parked)",
    )
    .fetch_one(&mut conn)
    .await?;
    conn.close().await?;
    let mut left = Vec::new();
    if behind > 0 {
        left.push((behind, format!("the relay of {database} is {behind} positions behind")));
    }
    if parked > 0 {
        left.push((parked, format!("{parked} events of {database} are parked")));
    }
    Ok(left)
}
