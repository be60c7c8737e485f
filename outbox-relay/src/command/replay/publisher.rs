//! Publishing what a replay has read, over lanes like those of the relay: while the broker confirms, more is read.

mod settle;

use std::{
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, Instant},
};

use amqp::{Backoff, Reconnect};
use anyhow::{Context, bail};
use daemon::progress::Progress;
use lapin::types::ShortString;
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::{sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    Outcome, ReplayArgs,
    history::{Page, Read},
    one_queue::OneQueue,
    pace::Pace,
    pool::Pool,
    registration::Registration,
};
use crate::{
    broker::Broker,
    budget::Budget,
    lane::{Lane, Report},
    lease::Lease,
    message::Origin,
    queue::Window,
};

/// As many as a relay has, unless told.
const LANES: usize = 4;
/// Windows that a lane has: one under way, and the next one.
const DEPTH: usize = 2;
/// Events of a window at most.
const WINDOW: usize = 250;
/// It waits no shorter for the retry budget or the rate.
const SHORTEST_WAIT: Duration = Duration::from_millis(5);
/// How often it looks around while nothing happens.
const LOOK: Duration = Duration::from_secs(1);
/// The lanes close their connections within this time.
const CLOSE: Duration = Duration::from_secs(2);

/// Publishes what was read, each aggregate's events in their order.
pub(in crate::command) struct Publisher {
    one_queue: Option<OneQueue>,
    lanes: Vec<LaneState>,
    reports: mpsc::UnboundedReceiver<(usize, Report)>,
    tasks: JoinSet<()>,
    stop_lanes: CancellationToken,
    pool: Pool,
    /// What may be tried again: the relay's own rule.
    budget: Budget,
    pace: Pace,
    patience: Patience,
}

struct LaneState {
    windows: mpsc::Sender<Window>,
    under_way: usize,
    /// Why it cannot publish.
    trouble: Option<String>,
}

/// How long retries may be in vain.
struct Patience {
    pause: Backoff,
    rounds: usize,
    /// Pauses so far. Of windows that went out between two of them, several may be in vain: that is one round.
    pauses: u64,
    until: Instant,
}

impl Publisher {
    /// Checks that the broker and the queue are there, and starts the lanes.
    pub(in crate::command) async fn open(
        args: &ReplayArgs,
        origin: Origin,
        id: Uuid,
    ) -> anyhow::Result<Self> {
        let broker = Broker {
            nodes: args.broker.nodes(args.common.database.require_tls)?,
            exchange: args.exchange.clone(),
            declare: false,
            name: "outbox-relay replay".to_owned(),
            was_missing: Arc::default(),
        };
        let queue = args.to_queue.as_deref().map(ShortString::try_new).transpose();
        let queue = queue.ok().context("--to-queue: a queue's name has at most 255 bytes")?;
        let one_queue = if let Some(queue) = queue {
            Some(OneQueue::open(broker.clone(), queue, id).await?)
        } else {
            broker.connect(&mut Reconnect::default()).await?.close().await;
            None
        };
        let exchange =
            one_queue.as_ref().map_or_else(|| args.exchange.clone(), |queue| queue.exchange.clone());
        let (report, reports) = mpsc::unbounded_channel();
        let (last_confirmed, ask_permits) = (Arc::new(AtomicU64::new(0)), Arc::new(Semaphore::new(1)));
        let (stop_lanes, mut tasks) = (CancellationToken::new(), JoinSet::new());
        let lanes = (0..LANES).map(|number| {
            let (windows, received) = mpsc::channel(DEPTH);
            let lane = Lane {
                number,
                exchange: exchange.clone(),
                broker: broker.clone(),
                origin: origin.clone(),
                // Any number of replays may publish.
                lease: Lease::new(Duration::MAX),
                reports: report.clone(),
                stop: stop_lanes.clone(),
                last_confirmed: Arc::clone(&last_confirmed),
                ask_permits: Arc::clone(&ask_permits),
                on_demand: false,
                is_quarantine: false,
            };
            tasks.spawn(lane.run(received));
            LaneState { windows, under_way: 0, trouble: None }
        });
        let lanes = lanes.collect();
        let now = Instant::now();
        Ok(Self {
            one_queue,
            lanes,
            reports,
            tasks,
            stop_lanes,
            pool: Pool::default(),
            budget: Budget::new(now),
            pace: Pace::new(args.rate, now),
            patience: Patience { pause: Backoff::default(), rounds: 0, pauses: 0, until: now },
        })
    }

    /// Publishes what comes. What is not taken is tried again within the retry budget, until the broker takes nothing of
    /// it for long. False when it was interrupted; an error or an interruption waits for what is under way.
    pub(in crate::command) async fn publish(
        &mut self,
        mut read: mpsc::Receiver<anyhow::Result<Read>>,
        outcome: &mut Outcome,
        mut registration: Option<&mut Registration<'_>>,
        said: &Progress,
        stop: &CancellationToken,
    ) -> anyhow::Result<bool> {
        let (mut expected, mut first, mut ended) = (None, None, false);
        let mut failed = None;
        loop {
            let stopping = failed.is_some() || stop.is_cancelled();
            if stopping && self.under_way() == 0 {
                self.note_next(outcome);
                return failed.map_or(Ok(false), Err);
            }
            if ended && self.pool.is_empty() {
                self.note_next(outcome);
                return failed.map_or(Ok(true), Err);
            }
            if stopping {
                // Those that are connecting give their windows back; the others end theirs.
                self.stop_lanes.cancel();
            } else {
                self.hand_out();
            }
            let wake = self.wake_at(stopping);
            let done = tokio::select! {
                biased;
                Some((lane, report)) = self.reports.recv() => self.take_in(lane, report, outcome).await,
                page = read.recv(), if !stopping && !ended && self.pool.wants_more() => match page {
                    None => { ended = true; Ok(()) }
                    Some(Ok(Read::Expected(events))) => { expected = Some(events); Ok(()) }
                    Some(Ok(Read::Page(page))) => {
                        first.get_or_insert_with(|| page.events.first().map_or(page.up_to, |event| event.position));
                        self.add(page, outcome);
                        Ok(())
                    }
                    Some(Err(error)) => Err(error),
                },
                Some(_) = self.tasks.join_next(), if !stopping => bail!("a lane has ended by itself"),
                () = stop.cancelled(), if !stopping => Ok(()),
                () = sleep_until(wake.into()) => Ok(()),
            };
            if let Err(error) = done {
                failed = failed.or(Some(error));
            }
            self.note_next(outcome);
            let settled = outcome.events + outcome.unroutable + outcome.refused;
            match (expected, first) {
                (Some(expected), _) => said.along((settled, expected), outcome.events),
                (None, Some(first)) => {
                    said.along((outcome.next.abs_diff(first), outcome.to.abs_diff(first)), outcome.events);
                }
                (None, None) => {}
            }
            if let Some(registration) = &mut registration
                && let Err(error) = registration.keep_up(outcome.next).await
            {
                failed = failed.or(Some(error));
            }
        }
    }

    fn add(&mut self, Page { up_to, mut events, unreadable }: Page, outcome: &mut Outcome) {
        for row in unreadable {
            outcome.refused += 1;
            tracing::warn!(position = row.position, why = row.reason, "not replayed");
        }
        for event in &mut events {
            event.headers.get_or_insert_default().insert("replayed".to_owned(), true.into());
        }
        self.pool.add(events, up_to);
    }

    /// Where to go on.
    fn note_next(&self, outcome: &mut Outcome) {
        if let Some(next) = self.pool.next() {
            // What was refused in a row may be taken once the cause is gone.
            outcome.next = outcome.refused_in_a_row.map_or(next, |(_, refused)| refused.min(next));
            outcome.again = self.pool.again_from(outcome.next);
        }
    }

    fn under_way(&self) -> usize {
        self.lanes.iter().map(|lane| lane.under_way).sum()
    }

    /// The lane that has least to do. One that cannot publish gets a window only when none can, to learn why.
    fn free_lane(&mut self) -> Option<&mut LaneState> {
        let none_works = self.lanes.iter().all(|lane| lane.trouble.is_some());
        let free = self.lanes.iter_mut().filter(|lane| lane.under_way < DEPTH);
        free.filter(|lane| none_works || lane.trouble.is_none()).min_by_key(|lane| lane.under_way)
    }

    fn hand_out(&mut self) {
        let now = Instant::now();
        // What was in vain pauses. What was not tried yet goes on, if a lane works.
        let may_retry = now >= self.patience.until;
        while may_retry || self.lanes.iter().any(|lane| lane.trouble.is_none()) {
            let open = self.pace.open(now);
            // Not one by one, where the rate is high.
            if open == 0 || self.pace.next(self.pool.ready().min(WINDOW)) > now {
                return;
            }
            if self.free_lane().is_none() {
                return;
            }
            let budget = may_retry.then_some(&mut self.budget);
            let (events, route) = self.pool.window(budget, now, open.min(WINDOW));
            if events.is_empty() {
                return;
            }
            self.pace.take(events.len());
            let mut window = Window::of(events, route);
            window.published = self.patience.pauses;
            let Some(lane) = self.free_lane() else { return };
            lane.under_way += 1;
            // One that has ended is found when it is joined.
            let _ended = lane.windows.try_send(window);
        }
    }

    /// When to go on, if nothing happens before.
    fn wake_at(&mut self, stopping: bool) -> Instant {
        let now = Instant::now();
        let look = now + LOOK;
        if stopping || self.pool.ready() == 0 || self.free_lane().is_none() {
            return look;
        }
        let pace = self.pace.next(self.pool.ready().min(WINDOW));
        // What may go by its rate, and did not, is a retry, or waits for what has its id.
        let at = if pace > now { pace } else { self.patience.until.max(self.budget.next()) };
        at.max(now + SHORTEST_WAIT).min(look)
    }

    /// Closes its connections.
    pub(in crate::command) async fn close(mut self) {
        self.stop_lanes.cancel();
        self.lanes.clear();
        let _ = timeout(CLOSE, async { while self.tasks.join_next().await.is_some() {} }).await;
        if let Some(queue) = self.one_queue {
            queue.close().await;
        }
    }
}
