//! After the last fault: waits until everything has arrived everywhere.

use std::{collections::HashMap, time::Duration};

use sqlx::Connection;
use tokio::time::Instant;
use uuid::Uuid;

use super::{event::UNPUBLISHABLE, subscriber::Subscriber, testbed::Testbed};

/// How often it is checked.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// How often the run says what is missing.
const SAY_INTERVAL: Duration = Duration::from_secs(10);

/// Waits until all programs are ready. After the timeout the oracle reports those that are not.
pub(crate) async fn ready(testbed: &Testbed, timeout: Duration, say: fn(&str)) {
    if let Err(error) = testbed.supervisor.ready(timeout).await {
        say(&error.to_string());
    }
}

/// Waits until everything has arrived, or until there was no progress for `no_progress`.
pub(crate) async fn arrived(
    testbed: &Testbed,
    subscriber: &Subscriber,
    no_progress: Duration,
    say: fn(&str),
) -> anyhow::Result<()> {
    let (mut progressed, mut said) = (Instant::now(), Instant::now());
    let mut last = Vec::new();
    loop {
        let now = missing(testbed, subscriber).await?;
        if now.is_empty() {
            return Ok(());
        }
        let words = || now.iter().map(|(_, words)| words.as_str()).collect::<Vec<_>>().join("; ");
        if now != last {
            progressed = Instant::now();
        }
        if progressed.elapsed() > no_progress {
            let reasons: Vec<String> = testbed
                .supervisor
                .health()
                .into_iter()
                .filter_map(|(instance, health)| {
                    health.not_ready.map(|reason| format!("{}: {reason}", instance.name()))
                })
                .collect();
            say(&format!("no progress for {} s: {} {}", no_progress.as_secs(), words(), reasons.join("; ")));
            return Ok(());
        }
        if said.elapsed() > SAY_INTERVAL {
            said = Instant::now();
            say(&format!("missing: {}", words()));
        }
        last = now;
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// What has not arrived yet: how much, and in words.
async fn missing(testbed: &Testbed, subscriber: &Subscriber) -> anyhow::Result<Vec<(i64, String)>> {
    let mut missing = unsettled(testbed, "person").await?;
    missing.extend(unsettled(testbed, "score").await?);
    let mut conn = testbed.addresses.connect("person").await?;
    // What ended before the present incarnation began is not published under it.
    let last: Vec<(String, i64)> = sqlx::query_as(
        "SELECT aggregate_id, max(version) FROM outbox.event WHERE aggregate_type = 'person' GROUP BY 1
         HAVING max(position) > (SELECT from_position FROM outbox.source)",
    )
    .fetch_all(&mut conn)
    .await?;
    let mut stored: Vec<Uuid> = sqlx::query_scalar(
        "SELECT id FROM outbox.event WHERE aggregate_type <> $1 OR type = $1 || '.deleted'",
    )
    .bind(UNPUBLISHABLE)
    .fetch_all(&mut conn)
    .await?;
    conn.close().await?;
    let mut conn = testbed.addresses.connect("score").await?;
    let held: i64 = sqlx::query_scalar("SELECT count(*) FROM inbox.held").fetch_one(&mut conn).await?;
    let applied: Vec<(String, i64)> = sqlx::query_as(
        "SELECT a.aggregate_id, a.version FROM inbox.aggregate a JOIN inbox.source s USING (consumer)
         WHERE s.name = 'person' AND a.source = inbox.spell(s.name, s.incarnation)",
    )
    .fetch_all(&mut conn)
    .await?;
    let scores: Vec<Uuid> = sqlx::query_scalar("SELECT id FROM outbox.event").fetch_all(&mut conn).await?;
    stored.extend(scores);
    conn.close().await?;
    let mut count = |number: i64, words: &str| {
        if number != 0 {
            missing.push((number, format!("{number} {words}")));
        }
    };
    let applied: HashMap<String, i64> = applied.into_iter().collect();
    let behind = last.iter().filter(|(person, version)| applied.get(person) != Some(version)).count();
    count(i64::try_from(behind)?, "persons to apply");
    count(held, "held");
    let unseen = {
        let deliveries = subscriber.deliveries();
        stored.iter().filter(|id| !deliveries.ids.contains(*id)).count()
    };
    count(i64::try_from(unseen)?, "events to reach the subscriber");
    Ok(missing)
}

async fn unsettled(testbed: &Testbed, database: &str) -> anyhow::Result<Vec<(i64, String)>> {
    let mut conn = testbed.addresses.connect(database).await?;
    let (behind, parked): (i64, i64) = sqlx::query_as(
        "SELECT greatest((SELECT coalesce(max(position), 0) FROM outbox.event)
                         - (SELECT coalesce(min(low_water), 0) FROM outbox.relay), 0),
                (SELECT count(*) FROM outbox.parked)",
    )
    .fetch_one(&mut conn)
    .await?;
    conn.close().await?;
    let mut missing = Vec::new();
    if behind > 0 {
        missing.push((behind, format!("the relay of {database} is {behind} positions behind")));
    }
    if parked > 0 {
        missing.push((parked, format!("{parked} events of {database} are parked")));
    }
    Ok(missing)
}
