//! A leadership at work: it reads, hands out to the lanes, settles, and again.

mod aside;
mod health;
mod retries;
mod settle;

use std::{
    collections::HashSet,
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, Instant},
};

use amqp::Backoff;
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use aside::ToPark;

use crate::{
    broker::Broker,
    evidence::EventKind,
    failpoint,
    lane::{Lane, Report},
    queue::{DEPTH, QUARANTINE_WINDOWS, Queue, Route, Window},
    reader::Budget,
    relay::Relay,
    series::{Series, number},
    session::{LeaderSession, SessionError, Watch},
    waiting::WaitingCounts,
};

/// One read brings at most this into memory, and one event more.
const BUDGET: Budget = Budget { events: 2_000, bytes: 4 * 1024 * 1024 };
/// Events that a lane has on their way to the broker together.
const WINDOW: usize = 250;
/// Progress is stored at most this often: a hot row bloats under somebody's old snapshot.
const SAVE_INTERVAL: Duration = Duration::from_millis(250);
/// Without notices, new events are found after at most this long.
const POLL: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// So many lanes may have another connection at a time, to find out which of their events have no answer.
const ASK_PERMITS: usize = 2;
/// Lanes close their connections in good order for at most this long.
const CLOSE: Duration = Duration::from_secs(2);
/// How often the leader looks where the database is, and where its sequence stands.
const LOCATE: Duration = Duration::from_secs(30);
/// While something waits in memory, how often the relay looks whether it waits for too long.
const LOOK: Duration = Duration::from_secs(1);

/// How often the relay looks whether what is due may go out, besides when something under way has ended.
const GATED_LOOK: Duration = Duration::from_millis(100);

/// What is to be done when the database is elsewhere.
pub(crate) const ELSEWHERE: &str = "the database was restored, or its server failed over or was replaced. If commits \
                                    may have been lost, subscribers keep what this database does not have: \
                                    outbox-relay recover leads through it. If none were lost: outbox-relay recover \
                                    --nothing-lost";

/// A leadership at work.
pub(crate) struct Lead<'a> {
    relay: &'a Relay,
    series: Series,
    watch: Watch,
    session: LeaderSession,
    stop: &'a CancellationToken,
    queue: Queue,
    /// The last one is for what may end the channel, or have no answer.
    lanes: Vec<mpsc::Sender<Window>>,
    tasks: JoinSet<()>,
    reports: mpsc::UnboundedReceiver<(usize, Report)>,
    /// Why each lane cannot publish; none when it can.
    states: Vec<Option<String>>,
    /// Which of them have no connection until they are given something.
    asleep: Vec<bool>,
    /// How many windows each lane has.
    windows: Vec<usize>,
    saved: Instant,
    /// How many events the broker had confirmed by then.
    saved_confirmed: u64,
    /// What the relay waits for, as the last save stored it: a JSON array.
    stored_reasons: String,
    /// How many events the broker confirmed.
    confirmed: u64,
    /// How many are set aside.
    parked: i64,
    /// What is to be, once no erasure is in the way.
    to_park: ToPark,
    /// How many wait in the database, by kind.
    waiting: WaitingCounts,
    /// When those were counted.
    counted: Instant,
    /// When to look for those of either that are due.
    load_at: Instant,
    /// When to look where the database is.
    locate_at: Instant,
    /// Kinds of events that had a row, and are taken again.
    flowing: HashSet<EventKind>,
    /// A read has found nothing new.
    has_read_all: bool,
}

impl<'a> Lead<'a> {
    pub(crate) fn new(
        relay: &'a Relay,
        (series, watch): (Series, Watch),
        session: LeaderSession,
        stop: &'a CancellationToken,
    ) -> Self {
        let (report, reports) = mpsc::unbounded_channel();
        let (last_confirmed, ask_permits) =
            (Arc::new(AtomicU64::new(0)), Arc::new(Semaphore::new(ASK_PERMITS)));
        let mut tasks = JoinSet::new();
        // The broker's management shows whose connections they are.
        let name = format!("outbox-relay {} {} {}", session.origin.source(), relay.name, relay.identity);
        let broker = Broker { name, ..relay.broker.clone() };
        let lanes: Vec<_> = (0..=relay.limits.lanes)
            .map(|number| {
                let is_quarantine = number == relay.limits.lanes;
                let (send, windows) =
                    mpsc::channel(if is_quarantine { QUARANTINE_WINDOWS } else { DEPTH - 1 });
                let lane = Lane {
                    number,
                    broker: broker.clone(),
                    exchange: relay.broker.exchange.clone(),
                    origin: session.origin.clone().with_cloudevents(relay.cloudevents),
                    lease: session.lease(),
                    reports: report.clone(),
                    stop: stop.clone(),
                    last_confirmed: Arc::clone(&last_confirmed),
                    ask_permits: Arc::clone(&ask_permits),
                    // The first one shows how the broker is.
                    on_demand: number > 0,
                    is_quarantine,
                };
                tasks.spawn(lane.run(windows).in_current_span());
                send
            })
            .collect();
        let now = Instant::now();
        Self {
            relay,
            series,
            watch,
            session,
            stop,
            queue: Queue::new(relay.limits.lanes, WINDOW, relay.policies.clone(), now),
            states: vec![Some("connecting".to_owned()); lanes.len()],
            asleep: vec![false; lanes.len()],
            windows: vec![0; lanes.len()],
            lanes,
            tasks,
            reports,
            saved: now,
            saved_confirmed: 0,
            stored_reasons: "[]".to_owned(),
            confirmed: 0,
            parked: 0,
            to_park: ToPark::new(now),
            waiting: WaitingCounts::new(),
            counted: now,
            load_at: now,
            locate_at: now,
            flowing: HashSet::new(),
            has_read_all: false,
        }
    }

    /// Whether there is nothing to publish.
    fn is_caught_up(&self) -> bool {
        self.has_read_all && self.waiting.is_empty() && !self.queue.has_unsettled()
    }

    /// Reads and publishes until the process is to end and nothing is under way any more.
    pub(crate) async fn work(&mut self) -> Result<(), SessionError> {
        let mut idle = Backoff::new(POLL.0, POLL.1);
        let mut poll_at = Instant::now();
        // What an earlier leader left.
        self.count_waiting().await?;
        self.load_retries().await?;
        loop {
            let stopping = self.stop.is_cancelled();
            while let Ok((lane, report)) = self.reports.try_recv() {
                self.take_in(lane, report).await?;
            }
            let at_work = !stopping && self.session.paused.is_none();
            if at_work {
                self.hand_out();
                self.spill().await?;
            } else if stopping && self.queue.windows() == 0 {
                return Ok(());
            }
            self.report_health();
            self.save_if_due().await?;
            self.locate_if_due().await?;
            self.session.watch(&mut self.watch).await?;
            self.park_if_due().await?;

            // No more than half of what may be in memory, so that reads are few and large.
            let limits = self.relay.limits;
            let events = self.queue.events() + self.to_park();
            let has_capacity =
                at_work && events * 2 <= limits.events && self.queue.bytes() * 2 <= limits.bytes;
            if has_capacity && self.has_rows() && self.load_at <= Instant::now() {
                self.load_retries().await?;
                self.hand_out();
            }
            if has_capacity && poll_at <= Instant::now() {
                let (found, more) = self.read().await?;
                if found {
                    idle.reset();
                }
                self.has_read_all |= !found;
                if !more {
                    poll_at = Instant::now() + idle.step();
                }
                continue;
            }
            let until = self.until(has_capacity.then_some(poll_at), at_work);
            tokio::select! {
                biased;
                Some((lane, report)) = self.reports.recv() => self.take_in(lane, report).await?,
                () = self.relay.wake.notified() => { poll_at = Instant::now(); idle.reset(); }
                () = self.stop.cancelled(), if !stopping => {}
                Some(ended) = self.tasks.join_next(), if !stopping => {
                    return Err(SessionError::Lane(ended.err().map_or_else(String::new, |e| e.to_string())));
                }
                () = tokio::time::sleep_until(until.into()) => {}
            }
        }
    }

    /// When to go on, if nothing happens before.
    fn until(&self, poll_at: Option<Instant>, at_work: bool) -> Instant {
        let pause = if self.session.has_progress() { SAVE_INTERVAL } else { self.heartbeat() };
        let mut until = self.saved + pause;
        until = self.park_at().map_or(until, |at| until.min(at));
        if let Some(poll_at) = poll_at {
            until = until.min(poll_at);
            if self.has_rows() {
                until = until.min(self.load_at);
            }
        }
        if at_work {
            if self.lanes.iter().zip(&self.states).any(|(lane, state)| state.is_none() && lane.capacity() > 0)
                && let Some(at) = self.queue.wake_at()
            {
                // What is due and was not handed out waits for something that is under way.
                let now = Instant::now();
                until = until.min(if at > now { at } else { now + GATED_LOOK });
            }
            if self.queue.waiting() > 0 {
                until = until.min(Instant::now() + LOOK);
            }
        }
        until
    }

    /// Stores what was settled, and gives up leadership and the lanes.
    pub(crate) async fn end(mut self) -> Result<(), SessionError> {
        self.session.save(&self.stored_reasons).await?;
        self.session.resign().await?;
        self.lanes.clear();
        let closed = async { while self.tasks.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(CLOSE, closed).await;
        Ok(())
    }

    /// Reads once. Says whether there was anything, and whether there is more right away.
    async fn read(&mut self) -> Result<(bool, bool), SessionError> {
        let batch = self.session.read(BUDGET).await?;
        if self.session.is_stalled() {
            self.relay.database_health.waiting(
                "too many positions are missing that an open transaction may still fill, so nothing above \
                 them is read; end the transaction that holds the outbox lock for longest (outbox-relay doctor \
                 names it), and grant the relay's role pg_read_all_stats if it lacks it",
            );
        } else {
            self.relay.database_health.ready();
        }
        for position in &batch.late {
            self.series.late_events.increment(1);
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
        let diverted = self.divert(&batch.events).await?;
        for event in batch.events {
            if !diverted.contains(&event.position) {
                self.queue.add(event);
            }
        }
        let positions = self.session.positions();
        self.series.open_gaps.set(health::count(positions.gaps()));
        self.series.low_water.set(number(positions.low_water()));
        self.series.high.set(number(positions.high()));
        Ok((found, more))
    }

    /// Says at `/ready` when the database is somewhere else than where it was last known to have lost nothing. It stops
    /// no event: whether commits were lost, only an operator knows. And when the sequence was set back meanwhile: the
    /// writers notice that, and nothing else here does.
    async fn locate_if_due(&mut self) -> Result<(), SessionError> {
        if self.locate_at <= Instant::now() {
            self.locate_at = Instant::now() + LOCATE;
            let look = self.session.look().await?;
            if look.is_elsewhere {
                self.relay.server_health.attention(ELSEWHERE);
            } else {
                self.relay.server_health.ready();
            }
            if look.last_position < look.used_position {
                self.relay.sequence_health.waiting(format!(
                    "the sequence outbox.position stands at {}, behind {}, which is stored or published already. \
                     Writers fail at each position that is taken, and what they write at a free one is not \
                     published. See: outbox-relay recover --sequence",
                    look.last_position, look.used_position
                ));
            } else {
                self.relay.sequence_health.ready();
            }
        }
        Ok(())
    }

    /// Gives each lane that can publish as much as it takes.
    fn hand_out(&mut self) {
        let now = Instant::now();
        let apart = self.lanes.len() - 1;
        for number in 0..self.lanes.len() {
            // A lane that is connecting or blocked has enough to do with what it has.
            while self.states[number].is_none() && self.lanes[number].capacity() > 0 {
                // Without a connection for it, what goes apart goes over one with nothing else on it.
                let route = if number == apart || self.states[apart].is_some() && self.windows[number] == 0 {
                    Route::Quarantine
                } else {
                    Route::Lane
                };
                let window = match self.queue.next(route, now) {
                    None if number != apart && route == Route::Quarantine => {
                        self.queue.next(Route::Lane, now)
                    }
                    window => window,
                };
                let Some(window) = window else { break };
                if let Err(refused) = self.lanes[number].try_send(window) {
                    // The lane has ended, which only happens once the process is to end.
                    self.queue.back(refused.into_inner());
                    break;
                }
                self.windows[number] += 1;
            }
        }
    }

    /// Acts on what a lane says.
    async fn take_in(&mut self, lane: usize, report: Report) -> Result<(), SessionError> {
        match report {
            Report::State(state) => (self.states[lane], self.asleep[lane]) = (state.err(), false),
            Report::Asleep => (self.states[lane], self.asleep[lane]) = (None, true),
            Report::Returned(window) => {
                self.windows[lane] -= 1;
                self.queue.back(window);
            }
            Report::Published(window, published, took) => {
                self.windows[lane] -= 1;
                if published.ended.is_some() {
                    self.series.publish_failures.increment(1);
                } else {
                    failpoint::hit("confirm");
                    self.series.window.record(took);
                }
                self.settle(window, published).await?;
            }
        }
        Ok(())
    }
}
