//! The metrics of a consumer. All of them exist, with 0, from its start: a counter that began with its first failure would
//! hide that one from `increase()`.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use chrono::{DateTime, Utc};
use lapin::{Connection, options::QueueDeclareOptions, types::FieldTable};
use tokio_util::sync::CancellationToken;

use crate::{
    Topology,
    alarms::HELD,
    rejected::REASONS,
    subscription::{Trouble, answer},
};

/// How often the broker is asked how much waits.
const ASK: Duration = Duration::from_secs(5);

/// By reason.
pub(crate) const HELD_EVENTS: &str = "inbox_held_events";
/// By reason.
pub(crate) const REJECTED_MESSAGES: &str = "inbox_rejected_messages";
const BACKLOG: &str = "inbox_backlog_messages";
const AGE: &str = "inbox_backlog_age_seconds";

const COUNTERS: [(&str, &str); 11] = [
    ("inbox_applied_total", "Events that were applied."),
    ("inbox_duplicates_total", "Messages with an event that had been applied before."),
    ("inbox_held_total", "Events that were held, since an earlier version was missing or refused."),
    ("inbox_poison_total", "Events that the handler refused."),
    (
        "inbox_rejected_total",
        "Messages that cannot be applied: they are malformed, or contradict what was applied.",
    ),
    ("inbox_foreign_total", "Messages of sources that are not followed."),
    ("inbox_wrong_user_total", "Messages of a followed source from a broker user that does not publish it."),
    ("inbox_forks_total", "Suspected forks: events that contradict the applied ones."),
    ("inbox_superseded_total", "Messages of an earlier incarnation of a source."),
    ("inbox_unrelated_total", "Messages of an unrelated incarnation of a source."),
    ("inbox_erased_rows_total", "Stored rows that erasures have removed."),
];

const GAUGES: [(&str, &str); 5] = [
    ("inbox_holes", "Aggregates of which a version is missing for too long."),
    ("inbox_left_behind", "Aggregates of an earlier incarnation of their source."),
    (
        "inbox_breaker_open",
        "1 while nothing is consumed because the handler seems to be broken, otherwise 0.",
    ),
    (BACKLOG, "Messages that wait in the queue of the consumer and in that of its dead letters."),
    (AGE, "Greatest possible age of the oldest message that waits in these queues; 0 without one."),
];

/// Describes and begins them.
pub(crate) fn begin(consumer: &str) {
    let label = || consumer.to_owned();
    for (name, help) in COUNTERS {
        metrics::describe_counter!(name, metrics::Unit::Count, help);
        metrics::counter!(name, "consumer" => label()).increment(0);
    }
    for (name, help) in GAUGES {
        metrics::describe_gauge!(name, metrics::Unit::Count, help);
        metrics::gauge!(name, "consumer" => label()).increment(0.0);
    }
    metrics::describe_gauge!(HELD_EVENTS, metrics::Unit::Count, "Events that are held now, by reason.");
    for reason in HELD {
        metrics::gauge!(HELD_EVENTS, "consumer" => label(), "reason" => reason).increment(0.0);
    }
    metrics::describe_gauge!(
        REJECTED_MESSAGES,
        metrics::Unit::Count,
        "Rejected messages that are stored now, by reason."
    );
    for reason in REASONS {
        metrics::gauge!(REJECTED_MESSAGES, "consumer" => label(), "reason" => reason).increment(0.0);
    }
    metrics::describe_histogram!(
        "inbox_lag_seconds",
        metrics::Unit::Seconds,
        "From an event's creation to the commit of its effect."
    );
}

/// How much waits in the queues, and how old it is at most.
#[derive(Debug, Default)]
pub(crate) struct Backlog(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    messages: u32,
    /// When the queues were seen empty, or first seen.
    empty: Option<DateTime<Utc>>,
    /// When the event was created that was applied last. Those behind it are younger.
    applied: Option<DateTime<Utc>>,
}

impl Backlog {
    /// An event of this time was applied.
    pub(crate) fn applied(&self, made: DateTime<Utc>) {
        self.lock().applied = Some(made);
    }

    /// Asks the broker, until `session` ends. A queue that cannot be asked for is the subscription's trouble.
    pub(crate) async fn ask(
        &self,
        connection: &Connection,
        topology: &Topology,
        session: &CancellationToken,
    ) {
        while !session.is_cancelled() {
            if let Some(Err(error)) = session.run_until_cancelled(self.ask_on(connection, topology)).await {
                tracing::debug!(?error, "how much waits in the queues is not known");
            }
            session.run_until_cancelled(tokio::time::sleep(ASK)).await;
        }
    }

    /// On one channel for as long as it lives.
    async fn ask_on(&self, connection: &Connection, topology: &Topology) -> Result<(), Trouble> {
        let channel = answer(connection.create_channel()).await?;
        loop {
            let mut messages = 0_u32;
            for queue in [topology.queue(), topology.dead()] {
                let options = QueueDeclareOptions { passive: true, ..Default::default() };
                let queue =
                    answer(channel.queue_declare(queue.clone(), options, FieldTable::default())).await?;
                messages = messages.saturating_add(queue.message_count());
            }
            self.waits(messages);
            tokio::time::sleep(ASK).await;
        }
    }

    fn waits(&self, messages: u32) {
        let mut waiting = self.lock();
        waiting.messages = messages;
        if messages == 0 || waiting.empty.is_none() {
            waiting.empty = Some(Utc::now());
        }
    }

    /// Shows it. What waits grows older, also while the broker cannot be asked.
    pub(crate) fn show(&self, consumer: &str) {
        let waiting = self.lock();
        let since = waiting.empty.max(waiting.applied).filter(|_| waiting.messages > 0);
        let age = since.and_then(|since| (Utc::now() - since).to_std().ok()).unwrap_or_default();
        metrics::gauge!(BACKLOG, "consumer" => consumer.to_owned()).set(f64::from(waiting.messages));
        metrics::gauge!(AGE, "consumer" => consumer.to_owned()).set(age.as_secs_f64());
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
