//! What a relay has read and the broker has not taken: events that are set aside, and events that wait.

use std::fmt::Write as _;

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::PgConnection;
use uuid::Uuid;

use super::MAX_COUNT;
use crate::command::{many, time};

/// At most as many rows as `--max-parked` allows.
const PARKED: &str = "\
SELECT coalesce(sum(events) FILTER (WHERE reason = 'unroutable'), 0)::bigint AS unroutable,
       coalesce(sum(events) FILTER (WHERE reason = 'refused'), 0)::bigint AS refused,
       coalesce(sum(events) FILTER (WHERE reason = 'nacked'), 0)::bigint AS nacked,
       coalesce(sum(events) FILTER (WHERE reason = 'silent'), 0)::bigint AS silent
FROM outbox.parked_group WHERE relay = $1 AND state = 'parked'";

const WAITING: &str = "\
SELECT type, reason, aggregates, since, oldest_id AS oldest, detail, next_attempt_at
FROM outbox.waiting_group WHERE relay = $1 ORDER BY since, type, reason";

/// Events that are set aside, by reason.
#[derive(Clone, Copy, Debug, Default, Serialize, sqlx::FromRow)]
pub struct ParkedCounts {
    /// No queue takes them; tried again by themselves.
    pub unroutable: i64,
    /// The broker will not have them; tried again by hand.
    pub refused: i64,
    /// A full queue refuses them, and a rule lets later ones go on; tried again by themselves.
    pub nacked: i64,
    /// The broker does not answer for them, and a rule lets later ones go on; tried again by themselves.
    pub silent: i64,
}

impl ParkedCounts {
    /// All of them.
    pub fn all(self) -> i64 {
        self.unroutable + self.refused + self.nacked + self.silent
    }

    /// How many for which reason, without the reasons that only a rule brings up.
    pub fn text(self) -> String {
        let Self { unroutable, refused, nacked, silent } = self;
        let mut text = format!("{unroutable} unroutable, {refused} refused");
        for (count, reason) in [(nacked, "nacked"), (silent, "silent")] {
            if count > 0 {
                let _ = write!(text, ", {count} {reason}");
            }
        }
        text
    }
}

/// Events that wait in the database, and later events of their aggregates behind them.
#[derive(Clone, Debug, Serialize)]
pub struct WaitingEvents {
    /// How many; none when there are more than are counted.
    pub events: Option<i64>,
    /// When the first of them got its row.
    pub since: Option<DateTime<Utc>>,
    /// The first event of each aggregate, by type and reason.
    pub groups: Vec<WaitingGroup>,
}

/// The first events of aggregates, of one type and for one reason: they are tried again, and the rest waits behind.
#[derive(Clone, Debug, Serialize, sqlx::FromRow)]
pub struct WaitingGroup {
    /// The event type.
    #[sqlx(rename = "type")]
    #[serde(rename = "type")]
    pub type_: String,
    /// How they are not taken; `behind` when they were not tried yet.
    pub reason: String,
    /// How many; at most [`MAX_COUNT`] and one of each aggregate type.
    pub aggregates: i64,
    /// When the first of them got its row.
    pub since: DateTime<Utc>,
    /// The id of the oldest.
    pub oldest: Uuid,
    /// Why it is not taken, in the relay's words.
    pub detail: String,
    /// When one of them is tried next.
    pub next_attempt_at: DateTime<Utc>,
}

impl WaitingEvents {
    /// Nothing waits.
    pub fn is_empty(&self) -> bool {
        self.events == Some(0)
    }

    /// How many, and since when.
    pub fn text(&self) -> String {
        let since = time(self.since);
        match self.events {
            Some(events) => {
                let wait = if events == 1 { "waits" } else { "wait" };
                format!("{} {wait}, the oldest since {since}", many(events, "event"))
            }
            None => format!("more than {MAX_COUNT} events wait, the oldest since {since} or longer"),
        }
    }
}

impl WaitingGroup {
    /// How many, and for what.
    pub fn text(&self) -> String {
        let Self { type_, aggregates, reason, detail, .. } = self;
        let (count, begin) = match *aggregates {
            1 => ("1 aggregate".to_owned(), "begins"),
            count if count <= MAX_COUNT => (format!("{count} aggregates"), "begin"),
            _ => (format!("more than {MAX_COUNT} aggregates"), "begin"),
        };
        match &**reason {
            "behind" => format!("{count} {begin} with {type_}, not tried yet"),
            _ => format!("{count} {begin} with {type_}, {reason}: {detail}"),
        }
    }

    /// What to do so that they are taken.
    pub fn advice(&self) -> String {
        let advice = match &*self.reason {
            "unroutable" => "bind a queue that takes the type to the exchange",
            "nacked" => "let the full queue's consumers catch up, or raise or remove its length limit",
            "silent" => "start the broker's nodes that are down, so that the queue has its majority again",
            "refused" => {
                let oldest = self.oldest;
                return format!(
                    "remove the cause that the broker gives, or give the event up: outbox-relay parked drop --id \
                    {oldest} --yes"
                );
            }
            _ => "the leader tries them soon",
        };
        advice.to_owned()
    }
}

/// What a relay has read, and the broker has not taken.
#[derive(Clone, Debug)]
pub struct Undelivered {
    /// Set aside: later events of their aggregates go on.
    pub parked: ParkedCounts,
    /// Waiting: later events of their aggregates wait behind them.
    pub waiting: WaitingEvents,
}

impl Undelivered {
    /// Of the relay called `name`.
    pub(super) async fn of(conn: &mut PgConnection, name: &str) -> Result<Self, sqlx::Error> {
        let parked = sqlx::query_as(PARKED).bind(name).fetch_one(&mut *conn).await?;
        let count = sqlx::query_scalar("SELECT waiting_events FROM outbox.relay_status WHERE name = $1");
        let events: Option<i64> = count.bind(name).fetch_optional(&mut *conn).await?;
        let events = events.unwrap_or(0);
        let mut groups: Vec<WaitingGroup> = Vec::new();
        if events > 0 {
            groups = sqlx::query_as(WAITING).bind(name).fetch_all(conn).await?;
        }
        let since = groups.iter().map(|group| group.since).min();
        let waiting = WaitingEvents { events: (events <= MAX_COUNT).then_some(events), since, groups };
        Ok(Self { parked, waiting })
    }
}
