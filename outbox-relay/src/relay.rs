//! The relay's life: take leadership, read, hand out to the lanes, settle, and again.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use chrono::Utc;
use lapin::types::ShortString;
use serde_json::json;
use service::health::{Health, Part};
use sqlx::postgres::PgConnectOptions;
use tokio::{
    sync::{Notify, mpsc},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::{
    broker::{BrokerError, Nodes},
    failpoint,
    lane::{Lane, Report, Window},
    leader::{Begin, Candidate, Leader, LeaderError},
    lease::{self, Lease},
    parked::{Due, Kind, Parking, Reason},
    pause::Pause,
    publish::Fate,
    queue::{DEPTH, Held, Item, Outcome, Queue},
    reader::Budget,
    sabotage,
    unroutable::{Action, Policy},
};

/// One read brings at most this into memory, and one event more.
const BUDGET: Budget = Budget { events: 2_000, bytes: 4 * 1024 * 1024 };
/// Events that a lane has on their way to the broker together.
const WINDOW: usize = 250;
/// Progress is stored at most this often: a hot row bloats under somebody's old snapshot.
const SAVE_INTERVAL: Duration = Duration::from_millis(250);
/// But for the end of a burst of at least so many events: a restart would publish all of them again.
const BURST: u64 = 1_000;
/// Without notices, new events are found after at most this long.
const POLL: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// How often a relay that does not lead asks whether it may.
const STANDBY: Duration = Duration::from_millis(500);
/// How often a leader looks for events that were set aside and are due, once there are any.
const LOOK_ASIDE: Duration = Duration::from_secs(1);
/// Lanes close their connections in good order for at most this long.
const CLOSE: Duration = Duration::from_secs(2);

/// How much a relay has in memory, and sets aside.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Parallel connections to the broker.
    pub lanes: usize,
    /// Events in memory at most.
    pub events: usize,
    /// Bytes in memory at most, but for one event that is larger by itself.
    pub bytes: usize,
    /// Events set aside at most; beyond it the relay waits.
    pub parked: i64,
}

/// What a relay relays, from where to where.
#[derive(Debug)]
pub struct Relay {
    /// The database.
    pub database: PgConnectOptions,
    /// The relay name: each has its own progress.
    pub name: String,
    /// Where a new name begins.
    pub begin: Begin,
    /// Who this process is, for the leader's row.
    pub identity: String,
    /// How long a leader that says nothing stays the leader.
    pub lease: Duration,
    /// The broker.
    pub nodes: Nodes,
    /// What to do with what no queue takes.
    pub policy: Policy,
    /// How much at a time.
    pub limits: Limits,
    /// Told when there may be something to read.
    pub wake: Arc<Notify>,
    /// Renewed whenever it goes round, whatever it waits for.
    pub pulse: Lease,
    /// What is shown at `/ready`, and stored with each heartbeat.
    pub health: Health,
    /// The database and leadership.
    pub database_health: Part,
    /// The broker.
    pub broker_health: Part,
    /// Events that are not taken.
    pub events_health: Part,
    /// An operator's pause.
    pub paused_health: Part,
    /// How long what is under way may go on once the process is to end.
    pub grace: Duration,
}

impl Relay {
    /// Relays until `stop`. Waits out whatever time can heal, and says in the health what it waits for.
    pub async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut pause = Pause::default();
        while !stop.is_cancelled() {
            self.pulse.renew(lease::now());
            let ended = tokio::select! {
                ended = self.lead(&mut pause, &stop) => ended,
                // Work is not cut in half, unless a server that does not answer would keep the process.
                () = async { stop.cancelled().await; tokio::time::sleep(self.grace).await } => {
                    tracing::warn!("not everything was answered in time; the next start publishes it again");
                    return Ok(());
                }
            };
            match ended {
                Ok(()) => break,
                Err(error) if error.is_fatal() => return Err(error.into()),
                Err(error) => {
                    self.database_health.waiting(error.to_string());
                    pause.wait(&stop).await;
                }
            }
        }
        Ok(())
    }

    /// One leadership, from standing by for it to losing it, which is an error, or to the process's end.
    /// Whatever was in memory is forgotten then.
    async fn lead(&self, pause: &mut Pause, stop: &CancellationToken) -> Result<(), LeaderError> {
        let connect = Candidate::connect(&self.database, &self.name, self.begin, &self.identity, self.lease);
        let Some(candidate) = stop.run_until_cancelled(connect).await else { return Ok(()) };
        let mut candidate = candidate?;
        while !candidate.ask().await? {
            self.pulse.renew(lease::now());
            // Healthy: somebody publishes, and this one stands by.
            for part in [&self.database_health, &self.broker_health, &self.events_health, &self.paused_health]
            {
                part.ready();
            }
            pause.reset();
            let again = STANDBY.min(self.lease / 4);
            if stop.run_until_cancelled(tokio::time::sleep(again)).await.is_none() {
                candidate.close().await;
                return Ok(());
            }
        }
        let leader = candidate.lead().await?;
        self.database_health.ready();
        self.events_health.ready();
        pause.reset();
        let mut lead = Lead::new(self, leader, stop);
        let worked = lead.work().await;
        sabotage::keep(lead.leader.positions());
        worked?;
        lead.end().await
    }
}

/// Why an event was not taken.
struct Why {
    reason: String,
    /// What had been confirmed when it was first published.
    confirmed: u64,
}

/// A leadership at work.
struct Lead<'a> {
    relay: &'a Relay,
    leader: Leader,
    stop: &'a CancellationToken,
    queue: Queue,
    lanes: Vec<mpsc::Sender<Window>>,
    tasks: JoinSet<()>,
    reports: mpsc::UnboundedReceiver<(usize, Report)>,
    /// Why each lane cannot publish; none when it can.
    states: Vec<Option<String>>,
    saved: Instant,
    /// How many events the broker had confirmed by then.
    saved_confirmed: u64,
    /// What the last save told the database.
    told: String,
    /// Why each event in memory that was not taken was not.
    why: HashMap<i64, Why>,
    /// How many events the broker confirmed.
    confirmed: u64,
    /// How many are set aside.
    parked: i64,
    /// When to look for those that are due.
    look_at: Instant,
    /// Kinds of events that were set aside and are taken again.
    flowing: HashSet<Kind>,
}

impl<'a> Lead<'a> {
    fn new(relay: &'a Relay, leader: Leader, stop: &'a CancellationToken) -> Self {
        let (report, reports) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        let lanes = (0..relay.limits.lanes)
            .map(|number| {
                let (send, windows) = mpsc::channel(DEPTH - 1);
                let lane = Lane {
                    number,
                    nodes: relay.nodes.clone(),
                    source: leader.source.clone(),
                    lease: leader.lease(),
                    windows,
                    reports: report.clone(),
                    stop: stop.clone(),
                };
                tasks.spawn(lane.run());
                send
            })
            .collect();
        Self {
            relay,
            leader,
            stop,
            queue: Queue::new(relay.limits.lanes, WINDOW),
            lanes,
            tasks,
            reports,
            states: vec![Some("connecting".to_owned()); relay.limits.lanes],
            saved: Instant::now(),
            saved_confirmed: 0,
            told: "[]".to_owned(),
            why: HashMap::new(),
            confirmed: 0,
            parked: 0,
            look_at: Instant::now(),
            flowing: HashSet::new(),
        }
    }

    /// Reads and publishes until the process is to end and nothing is under way any more.
    async fn work(&mut self) -> Result<(), LeaderError> {
        let mut idle = Pause::new(POLL.0, POLL.1);
        let mut poll_at = Instant::now();
        // What an earlier leader set aside.
        self.look_aside().await?;
        loop {
            let stopping = self.stop.is_cancelled();
            while let Ok((lane, report)) = self.reports.try_recv() {
                self.take_in(lane, report).await?;
            }
            let at_work = !stopping && self.leader.paused.is_none();
            if at_work {
                self.hand_out();
            } else if stopping && self.queue.windows() == 0 {
                return Ok(());
            }
            self.say();
            self.save_if_due().await?;

            // No more than half of what may be in memory, so that reads are few and large.
            let limits = self.relay.limits;
            let room =
                at_work && self.queue.events() * 2 <= limits.events && self.queue.bytes() * 2 <= limits.bytes;
            if room && self.parked > 0 && self.look_at <= Instant::now() {
                self.look_aside().await?;
            }
            if room && poll_at <= Instant::now() {
                let (found, more) = self.read().await?;
                if found {
                    idle.reset();
                }
                if !more {
                    poll_at = Instant::now() + idle.step();
                }
                continue;
            }

            let mut until = self.saved + self.heartbeat();
            if self.leader.has_progress() {
                until = self.saved + SAVE_INTERVAL;
            }
            if room {
                until = until.min(poll_at);
                if self.parked > 0 {
                    until = until.min(self.look_at);
                }
            }
            if at_work {
                let able = |n: &usize| self.states[*n].is_none() && self.lanes[*n].capacity() > 0;
                let retries = (0..self.lanes.len()).filter(able).filter_map(|n| self.queue.retry_at(n));
                until = retries.fold(until, Instant::min);
            }
            tokio::select! {
                biased;
                Some((lane, report)) = self.reports.recv() => self.take_in(lane, report).await?,
                () = self.relay.wake.notified() => { poll_at = Instant::now(); idle.reset(); }
                () = self.stop.cancelled(), if !stopping => {}
                Some(ended) = self.tasks.join_next(), if !stopping => {
                    return Err(LeaderError::Lane(ended.err().map_or_else(String::new, |e| e.to_string())));
                }
                () = tokio::time::sleep_until(until.into()) => {}
            }
        }
    }

    /// Stores what was settled, and gives up leadership and the lanes.
    async fn end(mut self) -> Result<(), LeaderError> {
        self.leader.save(&self.told).await?;
        self.leader.resign().await?;
        self.lanes.clear();
        let closed = async { while self.tasks.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(CLOSE, closed).await;
        Ok(())
    }

    /// Reads once. Says whether there was anything, and whether there is more right away.
    async fn read(&mut self) -> Result<(bool, bool), LeaderError> {
        let batch = self.leader.read(BUDGET).await?;
        if self.leader.is_stalled() {
            self.relay.database_health.waiting(
                "too many positions are missing that an open transaction may still fill, so nothing above \
                 them is read; end the transaction that holds the outbox lock for longest (outbox-relay doctor \
                 names it), and grant the relay's role pg_read_all_stats if it lacks it",
            );
        } else {
            self.relay.database_health.ready();
        }
        for position in &batch.late {
            metrics::counter!("outbox_relay_late_events_total").increment(1);
            tracing::error!(
                position,
                "an event appeared at a position that was given up as rolled back; \
                 it is published now, out of order; was the outbox written around outbox.next_position()?"
            );
        }
        let (found, more) = (!batch.events.is_empty(), batch.more);
        if found {
            failpoint::hit("read");
        }
        for event in batch.events {
            self.queue.add(event);
        }
        let positions = self.leader.positions();
        metrics::gauge!("outbox_relay_open_gaps").set(count(positions.gaps()));
        metrics::gauge!("outbox_relay_low_water").set(position(positions.low_water()));
        metrics::gauge!("outbox_relay_high").set(position(positions.high()));
        Ok((found, more))
    }

    /// Gives each lane that can publish as much as it takes.
    fn hand_out(&mut self) {
        let now = Instant::now();
        for (number, lane) in self.lanes.iter().enumerate() {
            // A lane that is connecting or blocked has enough to do with what it has.
            while self.states[number].is_none() && lane.capacity() > 0 {
                let window = Window { items: self.queue.next(number, now), confirmed: self.confirmed };
                if window.items.is_empty() {
                    break;
                }
                if let Err(refused) = lane.try_send(window) {
                    // The lane has ended, which only happens once the process is to end.
                    self.queue.back(number, &refused.into_inner().items, false, now);
                    break;
                }
            }
        }
    }

    /// Acts on what a lane says.
    async fn take_in(&mut self, lane: usize, report: Report) -> Result<(), LeaderError> {
        match report {
            Report::State(state) => self.states[lane] = state.err(),
            Report::Back(window) => self.queue.back(lane, &window.items, false, Instant::now()),
            Report::Done(window, Ok(fates), took) => {
                failpoint::hit("confirm");
                metrics::histogram!("outbox_relay_window_seconds").record(took);
                self.settle(lane, &window, &fates).await?;
            }
            // Alone, so this event is what the broker refuses, or it refuses everything.
            Report::Done(window, Err(BrokerError::Refused(why)), _) if window.items.len() == 1 => {
                metrics::counter!("outbox_relay_publish_failures_total").increment(1);
                self.settle(lane, &window, &[Fate::Refused { why, certain: false }]).await?;
            }
            Report::Done(window, Err(error), _) => {
                metrics::counter!("outbox_relay_publish_failures_total").increment(1);
                let failed = !matches!(error, BrokerError::NoLease);
                self.queue.back(lane, &window.items, failed, Instant::now());
            }
        }
        Ok(())
    }

    /// Acts on what became of each event of a window.
    async fn settle(&mut self, lane: usize, window: &Window, fates: &[Fate]) -> Result<(), LeaderError> {
        let Window { items, confirmed } = window;
        let mut outcomes = HashMap::with_capacity(items.len());
        let (mut published, mut dropped) = (0, 0);
        let (mut park, mut unpark): (Vec<Parking>, Vec<i64>) = (Vec::new(), Vec::new());
        let (mut in_vain, mut refused) = (Vec::new(), Vec::new());
        self.confirmed += fates.iter().filter(|fate| **fate == Fate::Confirmed).count() as u64;
        for (item, fate) in items.iter().zip(fates) {
            let event = &item.event;
            let outcome = match fate {
                Fate::Confirmed => {
                    published += 1;
                    let delay = (Utc::now() - event.created_at).to_std().unwrap_or_default();
                    metrics::histogram!("outbox_relay_delay_seconds").record(delay);
                    if item.parked {
                        unpark.push(event.position);
                        self.flowing.insert(Kind::of(event));
                    }
                    Outcome::Settled
                }
                Fate::Unroutable if self.relay.policy.action(&event.type_) == Action::Drop => {
                    dropped += 1;
                    if item.parked {
                        unpark.push(event.position);
                    }
                    Outcome::Settled
                }
                Fate::Unroutable if item.parked => {
                    self.flowing.remove(&Kind::of(event));
                    in_vain.push(event.position);
                    Outcome::Settled
                }
                Fate::Refused { why, .. } if item.parked => {
                    refused.push((event.position, why.clone()));
                    Outcome::Settled
                }
                Fate::Nacked => {
                    let why = format!(
                        "the broker refuses events of type {} for now; is a queue at its limit?",
                        event.type_
                    );
                    self.hold(item, why, *confirmed, Held::Stop)
                }
                Fate::Unroutable => {
                    let (type_, exchange) = (&event.type_, &self.relay.nodes.exchange);
                    let why = format!(
                        "no queue takes events of type {type_}: bind a queue to the exchange {exchange}"
                    );
                    if self.relay.policy.action(type_) == Action::Hold {
                        let why = format!("{why}, or let them go with --unroutable '{type_}=drop'");
                        self.hold(item, why, *confirmed, Held::Stop)
                    } else {
                        self.aside(&mut park, item, Reason::Unroutable, why, Some(*confirmed))
                    }
                }
                Fate::Refused { why, certain } => {
                    let why = format!("event {} of type {}: {why}", event.id, event.type_);
                    let since = if *certain { None } else { Some(*confirmed) };
                    self.aside(&mut park, item, Reason::Refused, why, since)
                }
            };
            if outcome == Outcome::Settled {
                self.why.remove(&event.position);
            }
            outcomes.insert(event.position, outcome);
        }
        // In the database first: what is lost on the way is published again.
        self.park(&park).await?;
        if !unpark.is_empty() {
            self.leader.unpark(&unpark).await?;
            self.parked -= i64::try_from(unpark.len()).unwrap_or(0);
        }
        if !in_vain.is_empty() {
            self.leader.postpone(&in_vain).await?;
        }
        for (position, why) in refused {
            self.leader.refuse(position, &why).await?;
        }
        self.queue.done(lane, &outcomes, Instant::now());
        for item in items.iter().filter(|item| !item.parked) {
            if outcomes[&item.event.position] == Outcome::Settled {
                self.leader.settle(item.event.position);
            }
        }
        metrics::counter!("outbox_relay_published_total").increment(published);
        metrics::counter!("outbox_relay_dropped_total").increment(dropped);
        metrics::gauge!("outbox_relay_held_events").set(count(self.queue.held()));
        metrics::gauge!("outbox_relay_parked_events").set(position(self.parked));
        Ok(())
    }

    /// What becomes of an event that would be set aside. While too many are, it is waited for. And so it
    /// is while nothing at all was taken `since` it was first published, by the number of confirms: then
    /// nobody listens, or the broker refuses everything, and it is not the event.
    fn aside(
        &mut self,
        park: &mut Vec<Parking>,
        item: &Item,
        reason: Reason,
        why: String,
        since: Option<u64>,
    ) -> Outcome {
        let position = item.event.position;
        let parked = self.parked + i64::try_from(park.len()).unwrap_or(i64::MAX);
        let first = self.why.get(&position).map(|why| why.confirmed);
        let since = since.map(|since| first.unwrap_or(since));
        if parked >= self.relay.limits.parked {
            let why = format!(
                "{parked} events are set aside already, as many as --max-parked allows, so this one is waited for: {why}"
            );
            self.hold(item, why, since.unwrap_or(self.confirmed), Held::Stop)
        } else if since.is_none_or(|since| self.confirmed > since) {
            park.push(Parking { position, reason, detail: why });
            Outcome::Settled
        } else {
            self.hold(item, why, since.unwrap_or(self.confirmed), Held::Doubt)
        }
    }

    /// Remembers why an event is not taken.
    fn hold(&mut self, item: &Item, reason: String, confirmed: u64, held: Held) -> Outcome {
        self.why.insert(item.event.position, Why { reason, confirmed });
        Outcome::Held(held)
    }

    async fn park(&mut self, parkings: &[Parking]) -> Result<(), LeaderError> {
        if parkings.is_empty() {
            return Ok(());
        }
        self.leader.park(parkings).await?;
        failpoint::hit("park");
        self.parked += i64::try_from(parkings.len()).unwrap_or(0);
        for parking in parkings {
            metrics::counter!("outbox_relay_parked_total", "reason" => parking.reason.as_str()).increment(1);
        }
        tracing::debug!(events = parkings.len(), detail = parkings[0].detail, "set aside");
        Ok(())
    }

    /// Fetches what is due of what was set aside.
    async fn look_aside(&mut self) -> Result<(), LeaderError> {
        let except = self.queue.parked();
        let aside = self.leader.due(Due { flowing: &self.flowing, except: &except }).await?;
        self.parked = aside.count;
        if aside.events.is_empty() && except.is_empty() {
            self.flowing.clear();
        }
        // More of what flows right away.
        let pause =
            if self.flowing.is_empty() || aside.events.is_empty() { LOOK_ASIDE } else { Duration::ZERO };
        self.look_at = Instant::now() + pause;
        for event in aside.events {
            self.queue.add_parked(event);
        }
        metrics::gauge!("outbox_relay_parked_events").set(position(self.parked));
        Ok(())
    }

    /// Says at `/ready` what the relay waits for.
    fn say(&self) {
        let relay = self.relay;
        relay.pulse.renew(lease::now());
        match self.states.iter().flatten().next() {
            None => relay.broker_health.ready(),
            Some(reason) => relay.broker_health.waiting(reason.clone()),
        }
        match &self.leader.paused {
            None => relay.paused_health.ready(),
            Some(paused) => {
                relay.paused_health.waiting(format!("{paused}; it goes on with: outbox-relay resume"));
            }
        }
        // The oldest that is held says it for all.
        let held = self.why.iter().min_by_key(|(position, _)| **position);
        match held {
            Some((_, why)) if self.queue.held() > 0 => relay.events_health.waiting(why.reason.clone()),
            _ if self.parked > 0 => relay
                .events_health
                .attention("events are set aside (outbox-relay parked list); the rest goes on"),
            _ => relay.events_health.ready(),
        }
    }

    async fn save_if_due(&mut self) -> Result<(), LeaderError> {
        let interval = if self.leader.has_progress() { SAVE_INTERVAL } else { self.heartbeat() };
        let end_of_burst = self.queue.events() == 0 && self.confirmed - self.saved_confirmed >= BURST;
        if end_of_burst || self.saved.elapsed() >= interval.min(self.heartbeat()) {
            let waiting: Vec<_> = self
                .relay
                .health
                .reasons()
                .into_iter()
                .map(|(part, reason, seconds)| json!({"part": part, "reason": reason, "seconds": seconds}))
                .collect();
            self.told = json!(waiting).to_string();
            let progress = self.leader.has_progress();
            self.leader.save(&self.told).await?;
            (self.saved, self.saved_confirmed) = (Instant::now(), self.confirmed);
            if progress {
                failpoint::hit("save");
            }
        }
        Ok(())
    }

    /// With nothing to store, the leader's row is written this often: it keeps the lease, and tells that
    /// the database and the leadership are still there.
    fn heartbeat(&self) -> Duration {
        self.relay.lease / 3
    }
}

#[expect(clippy::cast_precision_loss, reason = "a gauge is a float")]
fn position(position: i64) -> f64 {
    position as f64
}

#[expect(clippy::cast_precision_loss, reason = "a gauge is a float")]
fn count(count: usize) -> f64 {
    count as f64
}

/// The exchange's name, from the setting.
pub fn exchange(name: &str) -> Result<ShortString, String> {
    match ShortString::try_new(name) {
        Ok(name) if !name.as_str().is_empty() => Ok(name),
        _ => Err("an exchange's name has 1 to 255 bytes".to_owned()),
    }
}
