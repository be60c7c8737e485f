//! The verdict: what is wrong, whose fault it is, and what to do. The conditions are those of `outbox-relay status` and
//! `outbox-relay doctor`.

use chrono::{DateTime, Utc};
use outbox_relay::command::{
    many, span,
    state::{MAX_COUNT, WaitingEvents},
    status::{BacklogStatus, RelayStatus},
    time,
};

use crate::{
    inbox,
    outbox::{Look, Outbox},
    pages::inbox::Queues,
    watch::{Away, Seen},
};

/// A backlog whose oldest event is older is late.
const LATE: f64 = 30.0;
/// A transaction that holds the outbox lock for longer is worth a look.
const LONG: f64 = 60.0;

/// How bad it is, the worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Nothing flows.
    Broken,
    /// Something does not flow, or will not for long.
    Attention,
    /// Nothing is to be done.
    Well,
}

impl Level {
    /// For people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Broken => "Broken",
            Self::Attention => "Needs attention",
            Self::Well => "Well",
        }
    }
}

/// Something that was found.
#[derive(Clone, Debug)]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// What happened, to what.
    pub what: String,
    /// Whose it is: the component that has to change.
    pub whose: &'static str,
    /// What to do next.
    pub advice: String,
}

impl Finding {
    fn new(level: Level, whose: &'static str, what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { level, what: what.into(), whose, advice: advice.into() }
    }
}

/// What was found, the worst first. Never empty: the first is the verdict.
pub type Findings = Vec<Finding>;

fn sorted(mut findings: Findings, well: impl FnOnce() -> String) -> Findings {
    // Stable: of the same level, what is asked first comes first.
    findings.sort_by_key(|finding| finding.level);
    if findings.is_empty() {
        findings.push(Finding::new(Level::Well, "nobody", well(), "Nothing is to be done."));
    }
    findings
}

fn away(away: &Away, address: &str) -> Finding {
    Finding::new(
        Level::Broken,
        "the database",
        format!(
            "The console cannot look at this database since {}: {}. Address: {address}.",
            time(Some(away.since)),
            escape::line(&away.reason)
        ),
        "Start the database, or mend the way to it or the console's role. Until then, what follows is the last look.",
    )
}

const STARTING: &str = "The database has not responded yet.";

/// Of an outbox.
pub fn of_outbox(outbox: &Outbox, seen: &Seen<Look>) -> Findings {
    if let Some(gone) = &seen.away {
        return vec![away(gone, &outbox.address)];
    }
    let Some(good) = &seen.good else {
        return vec![Finding::new(Level::Attention, "the database", STARTING, "Wait for some seconds.")];
    };
    let look = &good.look;
    let mut findings = of_database(look);
    if look.status.relays.is_empty() {
        let (what, advice) = match &outbox.relay {
            Some(name) => (
                format!("No relay called {name:?} has led this outbox."),
                format!(
                    "Start one: outbox-relay run --name {name}. Or correct the name in the console's file."
                ),
            ),
            None => {
                ("No relay has led this outbox yet.".to_owned(), "Start one: outbox-relay run.".to_owned())
            }
        };
        findings.push(Finding::new(Level::Broken, "the relay", what, advice));
    }
    for relay in &look.status.relays {
        findings.extend(of_relay(relay));
    }
    let relays: Vec<&str> = look.status.relays.iter().map(|relay| relay.name.as_str()).collect();
    sorted(findings, || match look.status.relays.as_slice() {
        [relay] => format!("Everything flows. {}", backlog(&relay.backlog)),
        _ => format!("Everything flows, for each of the relays {}.", relays.join(", ")),
    })
}

/// `Nothing waits.`, `50 events wait, the oldest for 27 s.`
pub fn backlog(backlog: &BacklogStatus) -> String {
    let count = match backlog.events {
        Some(0) => return "Nothing waits.".to_owned(),
        Some(1) => "1 event waits".to_owned(),
        Some(events) => format!("{events} events wait"),
        None => format!("More than {MAX_COUNT} events wait (at most {})", backlog.at_most),
    };
    let oldest = backlog.age_seconds.map_or(String::new(), |age| format!(", the oldest for {}", span(age)));
    format!("{count}{oldest}.")
}

fn of_database(look: &Look) -> Findings {
    let mut findings = Findings::new();
    if look.status.in_recovery {
        findings.push(Finding::new(
            Level::Broken,
            "the operator",
            "This server is a standby or still starting. No relay leads on it, and what follows is a copy.",
            "Give the console the address of the primary.",
        ));
    }
    let overview = &look.overview;
    if overview.used_position > overview.last_position {
        findings.push(Finding::new(
            Level::Broken,
            "the database",
            format!(
                "The sequence outbox.position stands at {}, behind {}, which is in use already. Writers fail, and no \
                 relay begins to lead.",
                overview.last_position, overview.used_position
            ),
            "As the owner of the schema, run: outbox-relay recover --sequence --yes.",
        ));
    }
    if overview.source.is_none() {
        findings.push(Finding::new(
            Level::Broken,
            "the operator",
            "The outbox has no source name to publish under.",
            "Run: outbox-relay migrate --source NAME.",
        ));
    }
    if overview.partitions_end.is_none() {
        findings.push(Finding::new(
            Level::Attention,
            "the relay",
            "The next event has no partition of its own. It is stored in the default partition.",
            "Let a relay run: it makes partitions ahead. Its /ready says what keeps it from that.",
        ));
    }
    let holder = look.status.lock_holders.iter().find(|holder| holder.seconds.is_some_and(|s| s > LONG));
    if let Some(holder) = holder {
        let missing = look.status.relays.iter().any(|relay| relay.open.missing != Some(0));
        let held_back = if missing {
            "It may still commit an event, so retention waits for it. Other events flow."
        } else {
            "Nothing waits for it now."
        };
        findings.push(Finding::new(
            Level::Attention,
            "the writer",
            format!(
                "A transaction that appended to the outbox is still open: {}. {held_back}",
                escape::line(&holder.text())
            ),
            "Find out what that session waits for. To end it: SELECT pg_terminate_backend(PID).",
        ));
    }
    if let Some(table) = look.unvacuumed.first() {
        findings.push(Finding::new(
            Level::Attention,
            "the database",
            format!(
                "The table outbox.{} has {} dead rows and {} that live.",
                escape::line(&table.name),
                table.dead,
                table.live
            ),
            "End the oldest transaction, which keeps vacuum from removing them, or look why autovacuum does not run.",
        ));
    }
    findings
}

fn of_relay(relay: &RelayStatus) -> Findings {
    let mut findings = Findings::new();
    let (name, waits) = (&relay.name, backlog(&relay.backlog));
    if let Some(paused) = &relay.paused {
        let by = paused.by.as_deref().map_or(String::new(), |by| format!(" by {}", escape::line(by)));
        findings.push(Finding::new(
            Level::Broken,
            "the operator who paused it",
            format!("The relay {name} is paused since {}{by}. {waits}", time(Some(paused.since))),
            "Resume it below, once the reason is gone.",
        ));
    }
    if relay.leader.is_none() {
        let what = match &relay.last_leader {
            Some(last) => format!(
                "No relay leads under the name {name}. The last was {}, {} ago. {waits}",
                escape::line(&last.identity),
                span(last.heartbeat_age_seconds.unwrap_or_default())
            ),
            None => format!("No relay has led under the name {name} yet. {waits}"),
        };
        let advice = match relay.last_leader.as_ref().and_then(|last| last.pid) {
            Some(pid) => format!(
                "Session {pid} holds the leadership without a heartbeat. Another relay takes over by itself; or run: \
                 SELECT pg_terminate_backend({pid})."
            ),
            None => format!(
                "Start it: outbox-relay run --name {name}. If it runs, its /ready says what it waits for."
            ),
        };
        findings.push(Finding::new(Level::Broken, "the relay", what, advice));
    }
    for waiting in relay.waiting.iter().filter(|waiting| waiting.part != "paused") {
        let whose = match &*waiting.part {
            "broker" | "exchange" => "the broker",
            "database" | "server" => "the database",
            _ => "the relay",
        };
        findings.push(Finding::new(
            Level::Broken,
            whose,
            format!(
                "The relay {name} waits for {}: {}, for {}. {waits}",
                waiting.part,
                escape::line(&waiting.reason),
                span(f64::from(u32::try_from(waiting.seconds).unwrap_or(u32::MAX)))
            ),
            "Mend what the reason names. The relay goes on by itself then.",
        ));
    }
    findings.extend(of_waiting(name, &relay.waiting_events));
    let parked = relay.parked.all();
    if parked > 0 {
        let unroutable = relay.parked.unroutable;
        let (whose, advice) = if unroutable > 0 {
            (
                "the subscriber",
                "Bind a queue that takes the type, or start the subscriber that declares it. The relay then publishes \
                 them by itself; later events of subscribers that follow versions wait for them.",
            )
        } else {
            ("the broker", "Look at the reasons below, remove the cause, and try them again.")
        };
        findings.push(Finding::new(
            Level::Attention,
            whose,
            format!("The relay {name} set {} aside: {}.", many(parked, "event"), relay.parked.text()),
            advice,
        ));
    }
    let is_late = relay.backlog.age_seconds.is_some_and(|age| age > LATE) && relay.backlog.events != Some(0);
    if is_late && findings.is_empty() {
        let eta = relay.rate.as_ref().map(|rate| match rate.drained_in_seconds {
            Some(seconds) => format!("At this rate it is drained in {}.", span(seconds)),
            None => "It does not shrink.".to_owned(),
        });
        findings.push(Finding::new(
            Level::Attention,
            "the relay",
            format!("The relay {name} is behind. {waits} {}", eta.unwrap_or_default()),
            "Wait while it shrinks. If it does not, look at the broker's load, and give the relay more lanes.",
        ));
    }
    findings
}

fn of_waiting(name: &str, events: &WaitingEvents) -> Findings {
    let of_group = |group: &outbox_relay::command::state::WaitingGroup| {
        let whose = match &*group.reason {
            "unroutable" | "nacked" => "the subscriber",
            "silent" => "the broker",
            _ => "the relay",
        };
        Finding::new(
            Level::Attention,
            whose,
            format!(
                "The relay {name} cannot deliver to all: {}, since {}. Later events of these aggregates wait behind; \
                 all others flow.",
                escape::line(&group.text()),
                time(Some(group.since))
            ),
            format!("{}. They are published by themselves then.", capital(&group.advice())),
        )
    };
    events.groups.iter().map(of_group).collect()
}

/// With a large first letter.
fn capital(text: &str) -> String {
    let mut rest = text.chars();
    rest.next().map_or(String::new(), |first| first.to_uppercase().chain(rest).collect())
}

/// Of an inbox.
pub fn of_inbox(inbox: &inbox::Inbox, seen: &Seen<inbox::Look>, queues: &Queues) -> Findings {
    if let Some(gone) = &seen.away {
        return vec![away(gone, &inbox.address)];
    }
    let Some(good) = &seen.good else {
        return vec![Finding::new(Level::Attention, "the database", STARTING, "Wait for some seconds.")];
    };
    let look = &good.look;
    let mut findings = Findings::new();
    for (name, queue) in &queues.found {
        match queue {
            None => findings.push(Finding::new(
                Level::Broken,
                "the subscriber",
                format!("The queue {} does not exist at the broker.", escape::line(name)),
                "Start the subscriber, which declares and binds it. If it runs, its /ready says what it waits for.",
            )),
            Some(queue) if queue.consumers == 0 => findings.push(Finding::new(
                Level::Broken,
                "the subscriber",
                format!(
                    "No consumer takes messages from the queue {}: {} waiting.",
                    escape::line(name),
                    match queue.messages_ready {
                        1 => "1 message is".to_owned(),
                        messages => format!("{messages} messages are"),
                    }
                ),
                "Start the subscriber. If it runs, its /ready says what it waits for.",
            )),
            Some(_) => {}
        }
    }
    for group in &look.held.groups {
        let first = &group.oldest;
        let waits = format!("{} of {}", many(group.events, "event"), many(group.aggregates, "aggregate"));
        let since = since(group.first_at);
        findings.push(match &*group.reason {
            "gap" => Finding::new(
                Level::Attention,
                "the relay or the broker",
                format!(
                    "{waits} wait {since} for an event that has not arrived, such as version {} of {}/{}.",
                    group.version,
                    escape::line(&first.aggregate_type),
                    escape::line(&first.aggregate_id)
                ),
                "Find the aggregate: its line of time says whether the event is parked, dropped or lost in a queue.",
            ),
            _ => Finding::new(
                Level::Attention,
                "the subscriber",
                format!(
                    "The handler refuses events: {waits} wait {since}, with the error: {}.",
                    escape::line(group.error.as_deref().unwrap_or("none"))
                ),
                "Mend the handler or what it needs, then apply them again.",
            ),
        });
    }
    for group in &look.rejected.groups {
        findings.push(Finding::new(
            Level::Attention,
            "the publisher",
            format!(
                "{} rejected as {}: {}.",
                match group.messages {
                    1 => "1 message was".to_owned(),
                    messages => format!("{messages} messages were"),
                },
                group.reason,
                escape::line(&group.detail)
            ),
            "Find out who publishes them. What is no event of a source that is followed may be dropped.",
        ));
    }
    sorted(findings, || "Everything that arrived is applied.".to_owned())
}

fn since(at: DateTime<Utc>) -> String {
    format!("since {}", time(Some(at)))
}
