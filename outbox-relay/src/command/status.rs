//! `status`: where each relay stands, how fast it goes, and what it waits for.

use std::{
    fmt::Write as _,
    io::{ErrorKind, IsTerminal, Write as _},
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::PgConnection;

use super::{
    CommandArgs, Verdict, connect, many, span,
    state::{
        self, Backlog, LockHolder, MAX_COUNT, NotTaken, Parked, RelayRow, State, Waiting, WaitingEvents,
    },
};
use crate::{
    config::{STATEMENT_TIMEOUT, relay_name},
    row::Made,
};

/// Rates are what changes within so long.
const SAMPLE: Duration = Duration::from_secs(1);
/// A look that takes longer failed: the connection may hang without a word.
const TIMEOUT: Duration = Duration::from_secs(30);
/// A terminal shows so many holders of the lock, JSON more.
const SHOWN_HOLDERS: usize = 10;

/// Settings of `status`.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// What every command takes.
    #[command(flatten)]
    pub common: CommandArgs,
    /// Only the relay of this name, instead of all.
    #[arg(long, env = "RELAY_NAME", value_parser = relay_name)]
    pub name: Option<String>,
    /// Show it again and again, until Ctrl-C. With --json, one line each time.
    #[arg(long)]
    pub watch: bool,
    /// How often.
    #[arg(long, default_value = "2s", value_parser = interval, value_name = "DURATION", requires = "watch")]
    pub interval: Duration,
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval = daemon::config::duration(text)?;
    if interval >= Duration::from_millis(100) {
        Ok(interval)
    } else {
        Err("it should be 100ms or more".to_owned())
    }
}

/// What `status` answers.
#[derive(Debug, Serialize)]
struct Status {
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
    parked: Parked,
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
    published_per_second: f64,
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

/// Shows where the relays stand: once, or until Ctrl-C.
pub async fn status(args: &StatusArgs) -> anyhow::Result<Verdict> {
    if !args.watch {
        return once(args).await;
    }
    tokio::select! {
        ended = watch(args) => ended,
        signal = tokio::signal::ctrl_c() => {
            signal.context("SIGINT cannot be handled")?;
            Ok(Verdict::Ok)
        }
    }
}

async fn once(args: &StatusArgs) -> anyhow::Result<Verdict> {
    let mut conn = connect(&args.common, "status", STATEMENT_TIMEOUT).await?;
    let before = progress(&look(args, &mut conn).await?);
    tokio::time::sleep(SAMPLE).await;
    let status = Status::new(look(args, &mut conn).await?, &before);
    args.common.answer(&status, || status.text())?;
    Ok(status.verdict())
}

/// Goes on while the database is away, once it was there.
async fn watch(args: &StatusArgs) -> anyhow::Result<Verdict> {
    let mut conn = Some(connect(&args.common, "status", STATEMENT_TIMEOUT).await?);
    let mut before: Option<Vec<Progress>> = None;
    let mut ticks = tokio::time::interval(args.interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match look_again(args, &mut conn).await {
            Ok(state) => {
                let progress = progress(&state);
                let status = Status::new(state, before.as_deref().unwrap_or_default());
                if !show(args, &status)? {
                    return Ok(Verdict::Ok);
                }
                before = Some(progress);
            }
            Err(error) if before.is_none() => return Err(error),
            Err(error) => {
                conn = None;
                eprintln!("outbox-relay: {error:#}; trying again");
            }
        }
    }
}

async fn look_again(args: &StatusArgs, conn: &mut Option<PgConnection>) -> anyhow::Result<State> {
    let conn = match conn {
        Some(conn) => conn,
        None => conn.insert(connect(&args.common, "status", STATEMENT_TIMEOUT).await?),
    };
    look(args, conn).await
}

async fn look(args: &StatusArgs, conn: &mut PgConnection) -> anyhow::Result<State> {
    let name = args.name.as_deref();
    let state = async {
        let state =
            state::look(conn, name).await.map_err(|error| anyhow!(outbox::database::reason(&error)))?;
        match name {
            Some(name) if state.relays.is_empty() => state::known(conn, name).await.map(|()| state),
            _ => Ok(state),
        }
    };
    match tokio::time::timeout(TIMEOUT, state).await {
        Ok(state) => state,
        Err(_) => bail!("the database did not answer within {TIMEOUT:?}"),
    }
}

/// Shows one of many. False when nobody reads it any more.
fn show(args: &StatusArgs, status: &Status) -> anyhow::Result<bool> {
    let mut stdout = std::io::stdout();
    let text = if args.common.json {
        format!("{}\n", serde_json::to_string(status)?)
    } else if stdout.is_terminal() {
        // Home, what is new, and away with what was below.
        format!("\x1b[H\x1b[2J{}", status.text())
    } else {
        format!("{}\n", status.text())
    };
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        written => Ok(written.map(|()| true)?),
    }
}

/// How far a relay was at a time, to know later how fast it went.
#[derive(Debug)]
struct Progress {
    name: String,
    at: DateTime<Utc>,
    settled: i64,
    mark: i64,
}

fn progress(state: &State) -> Vec<Progress> {
    state
        .relays
        .iter()
        .map(|(row, ..)| Progress {
            name: row.name.clone(),
            at: row.at,
            settled: row.settled(),
            mark: row.mark,
        })
        .collect()
}

impl Status {
    fn new(state: State, before: &[Progress]) -> Self {
        let relays = state.relays.into_iter().map(|(row, backlog, not_taken)| {
            let before = before.iter().find(|before| before.name == row.name);
            RelayStatus::new(row, &backlog, not_taken, before)
        });
        Self { in_recovery: state.in_recovery, relays: relays.collect(), lock_holders: state.holders }
    }

    fn verdict(&self) -> Verdict {
        let well =
            !self.in_recovery && !self.relays.is_empty() && self.relays.iter().all(RelayStatus::is_well);
        if well { Verdict::Ok } else { Verdict::Attention }
    }

    fn text(&self) -> String {
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
        for holder in self.lock_holders.iter().take(SHOWN_HOLDERS) {
            let _ = writeln!(text, "  {}", escape::line(&holder_text(holder)));
        }
        if let Some(more) = self.lock_holders.len().checked_sub(SHOWN_HOLDERS).filter(|more| *more > 0) {
            let _ = writeln!(text, "  and {more} more, all younger");
        }
        text
    }
}

impl RelayStatus {
    fn new(row: RelayRow, backlog: &Backlog, not_taken: NotTaken, before: Option<&Progress>) -> Self {
        let NotTaken { parked, waiting: waiting_events } = not_taken;
        let leads = row.is_led();
        // Zero when the sequence is behind, which doctor tells.
        let at_most = (row.mark - row.settled()).max(0);
        let events = (backlog.open + backlog.above <= MAX_COUNT).then_some(backlog.open + backlog.above);
        Self {
            rate: before.and_then(|before| Rate::new(before, &row, events.unwrap_or(at_most))),
            leader: leads.then(|| Leader {
                identity: row.leader.clone(),
                since: row.leader_since,
                heartbeat_age_seconds: row.heartbeat_age.map(tenths),
                pid: row.pid,
            }),
            last_leader: row.leader.filter(|_| !leads).map(|identity| LastLeader {
                identity,
                heartbeat_age_seconds: row.heartbeat_age.map(tenths),
                pid: row.pid,
            }),
            position: Position { low_water: row.low_water, high: row.high, mark: row.mark },
            backlog: BacklogStatus {
                events,
                at_most: at_most.max(events.unwrap_or(0)),
                oldest_created_at: backlog.oldest,
                age_seconds: backlog.age.map(|age| tenths(age.max(0.0))),
            },
            open: Open {
                ranges: row.open_ranges,
                positions: row.open_positions,
                missing: (backlog.open <= MAX_COUNT).then_some(row.open_positions - backlog.open),
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
        let Some(last) = &self.last_leader else { return "none leads, and none ever did".to_owned() };
        let silent =
            last.pid.map_or(String::new(), |pid| format!("; session {pid} holds its lock and says nothing"));
        let age = span(last.heartbeat_age_seconds.unwrap_or_default());
        format!("none leads; the last was {}, heartbeat {age} ago{silent}", last.identity)
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
        lines.extend(self.waiting.iter().map(|Waiting { part, reason, seconds }| {
            ("waits", format!("{part}: {reason} (for {seconds} s)"))
        }));
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
    fn new(before: &Progress, now: &RelayRow, backlog: i64) -> Option<Self> {
        let seconds = (now.at - before.at).as_seconds_f64();
        if seconds <= 0.0 {
            return None;
        }
        let published = float(now.settled() - before.settled).max(0.0) / seconds;
        let appended = float(now.mark - before.mark).max(0.0) / seconds;
        let drained = match backlog {
            0 => Some(0.0),
            _ => (published > appended).then(|| float(backlog) / (published - appended)),
        };
        Some(Self {
            over_seconds: tenths(seconds),
            published_per_second: tenths(published),
            appended_per_second: tenths(appended),
            drained_in_seconds: drained.map(tenths),
        })
    }

    fn text(&self) -> String {
        let drained = match self.drained_in_seconds {
            Some(0.0) => String::new(),
            Some(seconds) => format!("; drained in {}", span(seconds)),
            None => "; the backlog does not shrink".to_owned(),
        };
        format!(
            "{} published/s, {} appended/s, over {} s{drained}",
            self.published_per_second, self.appended_per_second, self.over_seconds
        )
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

/// Who holds the outbox lock, for people.
pub(super) fn holder_text(holder: &LockHolder) -> String {
    let who = match (&holder.gid, holder.pid) {
        (Some(gid), _) => format!("the prepared transaction {gid:?}"),
        (None, Some(pid)) => {
            let name = holder.application_name.as_deref().filter(|name| !name.is_empty());
            let state = holder.state.as_deref().map_or(String::new(), |state| format!(", {state}"));
            format!("pid {pid} ({}){state}", name.unwrap_or("without a name"))
        }
        (None, None) => "a prepared transaction that ends just now".to_owned(),
    };
    match (holder.since, holder.seconds) {
        (Some(since), Some(seconds)) => format!("{who}, for {} (since {})", span(seconds), time(Some(since))),
        _ => format!("{who}, for an unknown time (pg_read_all_stats tells it)"),
    }
}

/// A time for people.
pub(super) fn time(at: Option<DateTime<Utc>>) -> String {
    at.map_or_else(|| "an unknown time".to_owned(), |at| at.format("%Y-%m-%d %H:%M:%S UTC").to_string())
}

fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

#[expect(clippy::cast_precision_loss, reason = "for a rate it is exact enough")]
fn float(count: i64) -> f64 {
    count as f64
}
