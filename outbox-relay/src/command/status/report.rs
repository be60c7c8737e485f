//! What `status` reports, as JSON and as text.

use std::fmt::Write as _;

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::{
    command::{
        Verdict, many, span,
        state::{
            Backlog, LockHolder, MAX_COUNT, ParkedCounts, RelayRow, State, Undelivered, Waiting,
            WaitingEvents,
        },
        time,
    },
    row::Made,
};

/// So many holders of the outbox lock are in the text; JSON has more.
const HOLDERS_IN_TEXT: usize = 10;

/// Where the relays of a database stand.
#[derive(Debug, Serialize)]
pub(super) struct Status {
    /// The server is a standby, so that the rest is a copy, and of some time ago.
    in_recovery: bool,
    relays: Vec<RelayStatus>,
    lock_holders: Vec<LockHolder>,
}

#[derive(Debug, Serialize)]
struct RelayStatus {
    name: String,
    /// None when nobody holds the leader's lock, or its holder has been silent for too long.
    leader: Option<Leader>,
    /// Who led last, when nobody does.
    last_leader: Option<LastLeader>,
    position: Position,
    backlog: BacklogStatus,
    /// None at the first look.
    rate: Option<Rate>,
    open: Open,
    parked: ParkedCounts,
    /// Events that wait in the database.
    waiting_events: WaitingEvents,
    paused: Option<Paused>,
    /// What the leader waits for.
    waiting: Vec<Waiting>,
}

#[derive(Debug, Serialize)]
struct Leader {
    identity: Option<String>,
    since: Option<DateTime<Utc>>,
    heartbeat_age_seconds: Option<f64>,
    pid: Option<i32>,
}

#[derive(Debug, Serialize)]
struct LastLeader {
    identity: String,
    heartbeat_age_seconds: Option<f64>,
    /// A session that holds the leader's lock without a heartbeat.
    pid: Option<i32>,
}

#[derive(Debug, Serialize)]
struct Position {
    low_water: i64,
    high: i64,
    mark: i64,
}

#[derive(Debug, Serialize)]
struct BacklogStatus {
    /// None when there are more than are counted.
    events: Option<i64>,
    /// Positions handed out and not settled: never less than the events, and cheap to know.
    at_most: i64,
    oldest_created_at: Option<Made>,
    age_seconds: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Rate {
    over_seconds: f64,
    /// None while more events wait than are counted.
    published_per_second: Option<f64>,
    appended_per_second: f64,
    /// None when the backlog does not shrink.
    drained_in_seconds: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Open {
    ranges: i64,
    positions: i64,
    /// How many of the positions have no stored event; none when there are too many to count.
    missing: Option<i64>,
}

#[derive(Debug, Serialize)]
struct Paused {
    since: DateTime<Utc>,
    by: Option<String>,
}

/// How far a relay was at a time, to know later how fast it went.
#[derive(Debug)]
pub(super) struct Progress {
    name: String,
    at: DateTime<Utc>,
    published: Option<i64>,
    last_position: i64,
}

/// How many positions are settled and not set aside, and do not wait in the database: grows by what is published. None
/// while more wait than are counted.
fn published(row: &RelayRow, undelivered: &Undelivered) -> Option<i64> {
    let waiting = undelivered.waiting.events?;
    Some(row.settled() - undelivered.parked.all() - waiting)
}

/// Of each relay.
pub(super) fn progress(state: &State) -> Vec<Progress> {
    state
        .relays
        .iter()
        .map(|(row, _, undelivered)| Progress {
            name: row.name.clone(),
            at: row.at,
            published: published(row, undelivered),
            last_position: row.last_position,
        })
        .collect()
}

impl Status {
    /// `before`: an earlier look, for the rates.
    pub(super) fn new(state: State, before: &[Progress]) -> Self {
        let relays = state.relays.into_iter().map(|(row, backlog, undelivered)| {
            let before = before.iter().find(|before| before.name == row.name);
            RelayStatus::new(row, &backlog, undelivered, before)
        });
        Self { in_recovery: state.in_recovery, relays: relays.collect(), lock_holders: state.lock_holders }
    }

    pub(super) fn verdict(&self) -> Verdict {
        let well =
            !self.in_recovery && !self.relays.is_empty() && self.relays.iter().all(RelayStatus::is_well);
        if well { Verdict::Ok } else { Verdict::Attention }
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        if self.in_recovery {
            text.push_str(
                "this server is in recovery: a standby, or still starting. No relay leads on it, and what \
                 follows is a copy; connect to the primary\n",
            );
        }
        if self.relays.is_empty() {
            text.push_str("no relay has run on this database yet; start outbox-relay run\n");
        }
        for relay in &self.relays {
            let _ = writeln!(text, "relay {}: {}", relay.name, escape::line(&relay.leader_text()));
            for (what, said) in relay.lines() {
                let _ = writeln!(text, "  {what:<9} {}", escape::line(&said));
            }
        }
        if !self.lock_holders.is_empty() {
            text.push_str("the outbox lock is held by\n");
        }
        for holder in self.lock_holders.iter().take(HOLDERS_IN_TEXT) {
            let _ = writeln!(text, "  {}", escape::line(&holder.text()));
        }
        if let Some(more) = self.lock_holders.len().checked_sub(HOLDERS_IN_TEXT).filter(|more| *more > 0) {
            let _ = writeln!(text, "  and {more} more, all younger");
        }
        text
    }
}

impl RelayStatus {
    fn new(row: RelayRow, backlog: &Backlog, undelivered: Undelivered, before: Option<&Progress>) -> Self {
        let published = published(&row, &undelivered);
        let Undelivered { parked, waiting: waiting_events } = undelivered;
        let leads = row.leads;
        // Zero when the sequence is behind, which doctor tells.
        let at_most = (row.last_position - row.settled()).max(0);
        let events = (backlog.open_events + backlog.new_events <= MAX_COUNT)
            .then_some(backlog.open_events + backlog.new_events);
        Self {
            rate: before.and_then(|before| Rate::new(before, &row, published, events.unwrap_or(at_most))),
            leader: leads.then(|| Leader {
                identity: row.leader.clone(),
                since: row.leader_since,
                heartbeat_age_seconds: row.heartbeat_age_seconds.map(tenths),
                pid: row.leader_pid,
            }),
            last_leader: row.leader.filter(|_| !leads).map(|identity| LastLeader {
                identity,
                heartbeat_age_seconds: row.heartbeat_age_seconds.map(tenths),
                pid: row.leader_pid,
            }),
            position: Position { low_water: row.low_water, high: row.high, mark: row.last_position },
            backlog: BacklogStatus {
                events,
                at_most: at_most.max(events.unwrap_or(0)),
                oldest_created_at: backlog.oldest_created_at,
                age_seconds: backlog.oldest_age_seconds.map(|age| tenths(age.max(0.0))),
            },
            open: Open {
                ranges: row.open_ranges,
                positions: row.open_positions,
                missing: (backlog.open_events <= MAX_COUNT)
                    .then_some(row.open_positions - backlog.open_events),
            },
            parked,
            waiting_events,
            paused: row.paused_at.map(|since| Paused { since, by: row.paused_by }),
            // Of a leader that is gone, it tells nothing.
            waiting: if leads { row.waiting.0 } else { Vec::new() },
            name: row.name,
        }
    }

    fn is_well(&self) -> bool {
        self.leader.is_some()
            && self.waiting.is_empty()
            && self.parked.all() == 0
            && self.waiting_events.is_empty()
    }

    fn leader_text(&self) -> String {
        if let Some(leader) = &self.leader {
            return format!(
                "led by {} since {}, heartbeat {} ago",
                leader.identity.as_deref().unwrap_or("somebody"),
                time(leader.since),
                span(leader.heartbeat_age_seconds.unwrap_or_default())
            );
        }
        let Some(last) = &self.last_leader else {
            return "no relay has led under this name yet; start one with this name: outbox-relay run"
                .to_owned();
        };
        let silent = last
            .pid
            .map(|pid| format!("; session {pid} holds the leadership without a heartbeat"))
            .unwrap_or_default();
        let age = span(last.heartbeat_age_seconds.unwrap_or_default());
        format!("no leader; the last was {}, heartbeat {age} ago{silent}", last.identity)
    }

    /// The rest of the block: what and how. What is as it should be is left out.
    fn lines(&self) -> Vec<(&'static str, String)> {
        let Position { low_water, high, mark } = self.position;
        let mut lines = vec![
            ("position", format!("settled up to {low_water}, read up to {high}, handed out up to {mark}")),
            ("backlog", self.backlog.text()),
        ];
        lines.extend(self.rate.iter().map(|rate| ("rate", rate.text())));
        if self.open.ranges > 0 {
            lines.push(("open", self.open.text()));
        }
        if self.parked.all() > 0 {
            lines.push(("parked", format!("{} (outbox-relay parked list)", self.parked.text())));
        }
        if !self.waiting_events.is_empty() {
            let said = self.waiting_events.text();
            let once = "the relay publishes them once they are taken (outbox-relay parked list)";
            lines.push(("waiting", format!("{said}; {once}")));
            let groups = self.waiting_events.groups.iter();
            lines.extend(groups.map(|group| ("", format!("{}; {}", group.text(), group.advice()))));
        }
        if let Some(paused) = &self.paused {
            let by = paused.by.as_ref().map_or(String::new(), |by| format!(" by {by}"));
            lines.push(("paused", format!("since {}{by} (outbox-relay resume)", time(Some(paused.since)))));
        }
        lines.extend(self.waiting.iter().map(|waiting| ("waits", waiting.text())));
        lines
    }
}

impl BacklogStatus {
    fn text(&self) -> String {
        let count = match self.events {
            Some(0) if self.at_most > 0 => {
                let positions = many(self.at_most, "position");
                return format!(
                    "none; {positions} without an event, of transactions that are open or were rolled back"
                );
            }
            Some(0) => return "none".to_owned(),
            Some(events) => many(events, "event"),
            None => format!("more than {MAX_COUNT} events, at most {}", self.at_most),
        };
        self.age_seconds.map_or(count.clone(), |age| format!("{count}, the oldest {} old", span(age)))
    }
}

impl Rate {
    /// None when no time has passed.
    fn new(before: &Progress, now: &RelayRow, published: Option<i64>, backlog: i64) -> Option<Self> {
        let seconds = (now.at - before.at).as_seconds_f64();
        if seconds <= 0.0 {
            return None;
        }
        let both = before.published.zip(published);
        let published = both.map(|(before, now)| float(now - before).max(0.0) / seconds);
        let appended = float(now.last_position - before.last_position).max(0.0) / seconds;
        let drained = match backlog {
            0 => Some(0.0),
            _ => published
                .filter(|published| *published > appended)
                .map(|published| float(backlog) / (published - appended)),
        };
        Some(Self {
            over_seconds: tenths(seconds),
            published_per_second: published.map(tenths),
            appended_per_second: tenths(appended),
            drained_in_seconds: drained.map(tenths),
        })
    }

    fn text(&self) -> String {
        let drained = match (self.drained_in_seconds, self.published_per_second) {
            (Some(0.0), _) | (None, None) => String::new(),
            (Some(seconds), _) => format!("; drained in {}", span(seconds)),
            (None, Some(_)) => "; the backlog does not shrink".to_owned(),
        };
        let published = self.published_per_second.map_or_else(
            || format!("published/s unknown while more than {MAX_COUNT} events wait"),
            |published| format!("{published} published/s"),
        );
        format!("{published}, {} appended/s, over {} s{drained}", self.appended_per_second, self.over_seconds)
    }
}

impl Open {
    fn text(&self) -> String {
        let (positions, ranges) = (many(self.positions, "position"), many(self.ranges, "range"));
        let missing =
            self.missing.map_or_else(|| "too many to count".to_owned(), |missing| missing.to_string());
        format!("{positions} in {ranges}, of which {missing} without an event so far")
    }
}

fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

#[expect(clippy::cast_precision_loss, reason = "for a rate it is exact enough")]
fn float(count: i64) -> f64 {
    count as f64
}
