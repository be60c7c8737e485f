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
pub struct Status {
    /// The server is a standby, so that the rest is a copy, and of some time ago.
    pub in_recovery: bool,
    /// Each relay name.
    pub relays: Vec<RelayStatus>,
    /// The transactions that hold the outbox lock.
    pub lock_holders: Vec<LockHolder>,
}

/// Where one relay name stands.
#[derive(Debug, Serialize)]
pub struct RelayStatus {
    /// The relay name.
    pub name: String,
    /// None when nobody holds the leader's lock, or its holder has been silent for too long.
    pub leader: Option<Leader>,
    /// Who led last, when nobody does.
    pub last_leader: Option<LastLeader>,
    /// How far it is.
    pub position: Position,
    /// What is not settled.
    pub backlog: BacklogStatus,
    /// None at the first look.
    pub rate: Option<Rate>,
    /// What is not settled, below the last position read.
    pub open: Open,
    /// Events that are set aside.
    pub parked: ParkedCounts,
    /// Events that wait in the database.
    pub waiting_events: WaitingEvents,
    /// None unless it is paused.
    pub paused: Option<Paused>,
    /// What the leader waits for.
    pub waiting: Vec<Waiting>,
}

/// The relay that leads.
#[derive(Debug, Serialize)]
pub struct Leader {
    /// Its host and process.
    pub identity: Option<String>,
    /// When it began to lead.
    pub since: Option<DateTime<Utc>>,
    /// Seconds since its last heartbeat.
    pub heartbeat_age_seconds: Option<f64>,
    /// Its session.
    pub pid: Option<i32>,
}

/// The relay that led last.
#[derive(Debug, Serialize)]
pub struct LastLeader {
    /// Its host and process.
    pub identity: String,
    /// Seconds since its last heartbeat.
    pub heartbeat_age_seconds: Option<f64>,
    /// A session that holds the leader's lock without a heartbeat.
    pub pid: Option<i32>,
}

/// How far a relay is.
#[derive(Debug, Serialize)]
pub struct Position {
    /// Every position up to here is settled.
    pub low_water: i64,
    /// The last position read.
    pub high: i64,
    /// The last position handed out.
    pub mark: i64,
}

/// Events that are not settled.
#[derive(Debug, Serialize)]
pub struct BacklogStatus {
    /// None when there are more than are counted.
    pub events: Option<i64>,
    /// Positions handed out and not settled: never less than the events, and cheap to know.
    pub at_most: i64,
    /// When the oldest was made, as its writer says.
    pub oldest_created_at: Option<Made>,
    /// The age of the oldest.
    pub age_seconds: Option<f64>,
}

/// How fast a relay goes.
#[derive(Debug, Serialize)]
pub struct Rate {
    /// What was measured.
    pub over_seconds: f64,
    /// None while more events wait than are counted.
    pub published_per_second: Option<f64>,
    /// Positions handed out.
    pub appended_per_second: f64,
    /// None when the backlog does not shrink.
    pub drained_in_seconds: Option<f64>,
}

/// Positions below the last one read that are not settled.
#[derive(Debug, Serialize)]
pub struct Open {
    /// Stretches of positions.
    pub ranges: i64,
    /// The positions in them.
    pub positions: i64,
    /// How many of the positions have no stored event; none when there are too many to count.
    pub missing: Option<i64>,
}

/// A pause.
#[derive(Debug, Serialize)]
pub struct Paused {
    /// Since when.
    pub since: DateTime<Utc>,
    /// The operator who paused it, with the reason.
    pub by: Option<String>,
}

/// How far a relay was at a time, to know later how fast it went.
#[derive(Clone, Debug)]
pub struct Progress {
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

/// How far each relay is.
pub fn progress(state: &State) -> Vec<Progress> {
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
    pub fn new(state: State, before: &[Progress]) -> Self {
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

    /// The leader, for people.
    pub fn leader_text(&self) -> String {
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
    /// For people.
    pub fn text(&self) -> String {
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

    /// For people.
    pub fn text(&self) -> String {
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
    /// For people.
    pub fn text(&self) -> String {
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
