//! The relay's life: take leadership, read, publish, settle, and again.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use chrono::Utc;
use lapin::types::ShortString;
use service::health::Part;
use sqlx::postgres::PgConnectOptions;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::{
    broker::{Link, Nodes},
    leader::{Begin, Leader, LeaderError},
    pause::Pause,
    publish::{Fate, publish},
    reader::{Budget, Event},
    unroutable::{Action, Policy},
};

/// One read brings at most this into memory, and one event more.
const BUDGET: Budget = Budget { events: 1_000, bytes: 8 * 1024 * 1024 };
/// Events that are on their way to the broker together.
const WINDOW: usize = 500;
/// Progress is stored at most this often: a hot row bloats under somebody's old snapshot.
const SAVE_INTERVAL: Duration = Duration::from_millis(250);
/// With nothing to store, the leader's row is written this often, which keeps the lease and tells that
/// the database and the leadership are still there.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Without notices, new events are found after at most this long.
const POLL: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// How often a relay that does not lead asks whether it may.
const STANDBY: Duration = Duration::from_secs(1);

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
    /// The broker.
    pub nodes: Nodes,
    /// What to do with what no queue takes.
    pub policy: Policy,
    /// Told when there may be something to read.
    pub wake: Arc<Notify>,
    /// Shown at `/ready`: the database and leadership.
    pub database_health: Part,
    /// Shown at `/ready`: the broker and what it does not take.
    pub broker_health: Part,
    /// How long what is under way may go on once the process is to end.
    pub grace: Duration,
}

/// How a leadership ended, when nothing failed.
enum End {
    /// There was none: another relay leads.
    Standby,
    /// The process is to end.
    Stopped,
}

impl Relay {
    /// Relays until `stop`. Waits out whatever time can heal, and says in the health what it waits for.
    pub async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut pause = Pause::default();
        let mut link = None;
        while !stop.is_cancelled() {
            let grace = self.grace;
            let ended = tokio::select! {
                ended = self.lead(&mut link, &mut pause, &stop) => ended,
                // Work is not cut in half, unless a server that does not answer would keep the process.
                () = async { stop.cancelled().await; tokio::time::sleep(grace).await } => {
                    tracing::warn!("not everything was answered in time; the next start publishes it again");
                    return Ok(());
                }
            };
            match ended {
                Ok(End::Stopped) => break,
                Ok(End::Standby) => {
                    // Healthy: somebody publishes, and this one stands by.
                    self.database_health.ready();
                    self.broker_health.ready();
                    stop.run_until_cancelled(tokio::time::sleep(STANDBY)).await;
                }
                Err(error) if error.is_fatal() => return Err(error.into()),
                Err(error) => {
                    self.database_health.waiting(error.to_string());
                    pause.wait(&stop).await;
                }
            }
        }
        if let Some(link) = link {
            link.close().await;
        }
        Ok(())
    }

    /// One leadership, from taking it to losing it. Whatever was in memory is forgotten at its end.
    async fn lead(
        &mut self,
        link: &mut Option<Link>,
        pause: &mut Pause,
        stop: &CancellationToken,
    ) -> Result<End, LeaderError> {
        let take = Leader::take(&self.database, &self.name, self.begin, &self.identity);
        let Some(taken) = stop.run_until_cancelled(take).await else { return Ok(End::Stopped) };
        let Some(mut leader) = taken? else { return Ok(End::Standby) };
        self.database_health.ready();
        pause.reset();
        let mut lead = Lead { relay: self, leader: &mut leader, link, stop, saved: Instant::now() };
        lead.work().await?;
        leader.resign().await?;
        Ok(End::Stopped)
    }
}

/// A leadership at work.
struct Lead<'a> {
    relay: &'a Relay,
    leader: &'a mut Leader,
    link: &'a mut Option<Link>,
    stop: &'a CancellationToken,
    saved: Instant,
}

impl Lead<'_> {
    async fn work(&mut self) -> Result<(), LeaderError> {
        let mut idle = Pause::new(POLL.0, POLL.1);
        // Connected before there is anything to publish, so that readiness tells the truth.
        while self.connect().await? {
            match self.link.as_ref().and_then(Link::blocked) {
                None => self.relay.broker_health.ready(),
                Some(reason) => self.relay.broker_health.waiting(blocked(&reason)),
            }
            let batch = self.leader.read(BUDGET).await?;
            if self.leader.is_stalled() {
                self.relay.database_health.waiting(
                    "too many positions are missing that an open transaction may still fill, so nothing above \
                     them is read; end the transaction that holds the outbox lock for longest (pg_locks, advisory, \
                     classid 1869968482), and grant the relay's role pg_read_all_stats if it lacks it",
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
            let found = !batch.events.is_empty();
            self.publish_all(batch.events.into()).await?;
            self.gauge();
            self.save_if_due(SAVE_INTERVAL).await?;
            if found || batch.more {
                idle.reset();
                continue;
            }
            let wait = idle.step().min(if self.leader.has_progress() { SAVE_INTERVAL } else { POLL.1 });
            tokio::select! {
                () = self.relay.wake.notified() => idle.reset(),
                () = tokio::time::sleep(wait) => {}
                () = self.stop.cancelled() => {}
            }
        }
        self.leader.save().await
    }

    /// Publishes all of `queue`, in the order of each aggregate, and returns when everything is settled
    /// or the process is to end.
    async fn publish_all(&mut self, mut queue: VecDeque<Event>) -> Result<(), LeaderError> {
        let mut pause = Pause::default();
        // Events that were not taken; nothing else is published until they are.
        let mut held: HashSet<i64> = HashSet::new();
        let mut limit = WINDOW;
        let source = self.leader.source.clone();
        while !queue.is_empty() && !self.stop.is_cancelled() {
            if !self.connect().await? {
                break;
            }
            let Some(link) = self.link.as_ref() else { break };
            let picked = pick(&queue, &held, limit);
            let window: Vec<&Event> = picked.iter().map(|&n| &queue[n]).collect();
            let began = Instant::now();
            let outcome = publish(link, &self.relay.nodes.exchange, &source, &window);
            // While the broker blocks the connection, publishing hangs without a word.
            let watch = || {
                if let Some(reason) = link.blocked() {
                    self.relay.broker_health.waiting(blocked(&reason));
                }
            };
            let fates = match alive(self.leader, &mut self.saved, outcome, watch).await {
                Ok(Ok(fates)) => fates,
                Err(error) => {
                    // Its confirms were given up, which would confuse those of the next window.
                    *self.link = None;
                    return Err(error);
                }
                Ok(Err(error)) => {
                    // Unknown which of them arrived: all are published again, on a new connection. In
                    // smaller windows, so that an event over which the broker ends the channel is soon
                    // alone, and does not have the others published over and over.
                    limit = (window.len() / 8).max(1);
                    self.relay.broker_health.waiting(match window[..] {
                        [event] => format!("event {} of type {}: {error}", event.id, event.type_),
                        _ => error.to_string(),
                    });
                    metrics::counter!("outbox_relay_publish_failures_total").increment(1);
                    if let Some(link) = self.link.take() {
                        link.close().await;
                    }
                    pause.wait(self.stop).await;
                    self.save_if_due(HEARTBEAT).await?;
                    continue;
                }
            };
            metrics::histogram!("outbox_relay_window_seconds").record(began.elapsed());
            let waiting = self.settle(&window, &fates, &mut held);
            let settled: HashSet<i64> =
                window.iter().map(|e| e.position).filter(|p| !held.contains(p)).collect();
            queue.retain(|e| !settled.contains(&e.position));
            if !settled.is_empty() {
                pause.reset();
            }
            match waiting {
                None => self.relay.broker_health.ready(),
                Some(reason) => {
                    self.relay.broker_health.waiting(reason);
                    pause.wait(self.stop).await;
                }
            }
            self.save_if_due(SAVE_INTERVAL).await?;
        }
        Ok(())
    }

    /// Acts on what became of each event of a window. Returns what the relay now waits for, if anything.
    fn settle(&mut self, window: &[&Event], fates: &[Fate], held: &mut HashSet<i64>) -> Option<String> {
        let mut reason = None;
        let (mut published, mut dropped) = (0, 0);
        for (event, fate) in window.iter().zip(fates) {
            let why = match fate {
                Fate::Confirmed => {
                    published += 1;
                    let delay = (Utc::now() - event.created_at).to_std().unwrap_or_default();
                    metrics::histogram!("outbox_relay_delay_seconds").record(delay);
                    None
                }
                Fate::Unroutable => match self.relay.policy.action(&event.type_) {
                    Action::Drop => {
                        dropped += 1;
                        None
                    }
                    Action::Hold => Some(format!(
                        "no queue takes events of type {}: bind a queue to the exchange {}, or let them go with \
                         --unroutable '{}=drop'",
                        event.type_, self.relay.nodes.exchange, event.type_
                    )),
                },
                Fate::Nacked => Some(format!(
                    "the broker refuses events of type {} for now; is a queue at its limit?",
                    event.type_
                )),
                Fate::Refused(why) => {
                    Some(format!("AMQP cannot carry event {} of type {}: {why}", event.id, event.type_))
                }
            };
            match why {
                None => {
                    held.remove(&event.position);
                    self.leader.settle(event.position);
                }
                Some(why) => {
                    held.insert(event.position);
                    reason.get_or_insert(why);
                }
            }
        }
        metrics::counter!("outbox_relay_published_total").increment(published);
        metrics::counter!("outbox_relay_dropped_total").increment(dropped);
        metrics::gauge!("outbox_relay_held_events").set(count(held.len()));
        reason
    }

    /// Makes sure that there is a link, waiting for the broker as long as it takes. False when the
    /// process is to end.
    async fn connect(&mut self) -> Result<bool, LeaderError> {
        let mut pause = Pause::default();
        let mut attempt = 0;
        loop {
            if self.stop.is_cancelled() {
                return Ok(false);
            }
            if self.link.as_ref().is_some_and(|link| link.channel.status().connected()) {
                return Ok(true);
            }
            let connect = self.stop.run_until_cancelled(self.relay.nodes.connect(attempt));
            match alive(self.leader, &mut self.saved, connect, || {}).await? {
                None => return Ok(false),
                Some(Ok(link)) => *self.link = Some(link),
                Some(Err(error)) => {
                    *self.link = None;
                    self.relay.broker_health.waiting(error.to_string());
                    pause.wait(self.stop).await;
                    attempt += 1;
                    // Not the broker's absence but the database's would end the leadership.
                    self.save_if_due(HEARTBEAT).await?;
                }
            }
        }
    }

    async fn save_if_due(&mut self, interval: Duration) -> Result<(), LeaderError> {
        let interval = if self.leader.has_progress() { interval } else { HEARTBEAT };
        if self.saved.elapsed() >= interval {
            self.leader.save().await?;
            self.saved = Instant::now();
        }
        Ok(())
    }

    fn gauge(&self) {
        let positions = self.leader.positions();
        metrics::gauge!("outbox_relay_open_gaps").set(count(positions.gaps()));
        metrics::gauge!("outbox_relay_low_water").set(position(positions.low_water()));
        metrics::gauge!("outbox_relay_high").set(position(positions.high()));
    }
}

/// What the broker says when it takes nothing, because of its memory or disk alarm.
fn blocked(reason: &str) -> String {
    format!("the broker blocks publishers: {reason}")
}

/// Awaits what may take longer than the leader's lease, with heartbeats meanwhile, and a look at what
/// else there is to see at each.
async fn alive<T>(
    leader: &mut Leader,
    saved: &mut Instant,
    work: impl Future<Output = T>,
    look: impl Fn(),
) -> Result<T, LeaderError> {
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return Ok(done),
            () = tokio::time::sleep_until((*saved + HEARTBEAT).into()) => {
                look();
                leader.save().await?;
                *saved = Instant::now();
            }
        }
    }
}

/// Picks what goes out together, at most `limit`: the oldest event of each aggregate, or of those that
/// are held. No two have the same id, by which a returned message is known: nothing in the schema keeps
/// a writer from using one twice.
fn pick(queue: &VecDeque<Event>, held: &HashSet<i64>, limit: usize) -> Vec<usize> {
    let (mut aggregates, mut ids) = (HashSet::new(), HashSet::new());
    let mut picked = Vec::new();
    for (n, event) in queue.iter().enumerate() {
        if picked.len() == limit {
            break;
        }
        if !held.is_empty() && !held.contains(&event.position) {
            continue;
        }
        if aggregates.insert((&*event.aggregate_type, &*event.aggregate_id)) && ids.insert(event.id) {
            picked.push(n);
        }
    }
    picked
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
