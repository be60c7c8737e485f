//! Publishing what a replay has read, over a lane like those of the relay.

use std::{
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, Instant},
};

use amqp::{Backoff, Reconnect};
use anyhow::{Context, bail};
use lapin::types::ShortString;
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    Progress, ReplayArgs,
    one_queue::OneQueue,
    page::Page,
    registration::{HEARTBEAT, Registration},
};
use crate::{
    broker::Broker,
    budget::Budget,
    condition::BrokerError,
    event::Event,
    lane::{Lane, Report},
    lease::Lease,
    message::Origin,
    publish::{Fate, Proof, Published},
    queue::{Route, Window},
};

/// How many times in a row retries may be in vain before the replay ends.
const ATTEMPTS: usize = 8;
/// It waits no shorter for the retry budget.
const SHORTEST_WAIT: Duration = Duration::from_millis(10);
/// The lane closes its connection within this time.
const CLOSE: Duration = Duration::from_secs(2);

/// Publishes pages, each aggregate's events in their order.
pub(super) struct Publisher {
    one_queue: Option<OneQueue>,
    windows: mpsc::Sender<Window>,
    reports: mpsc::UnboundedReceiver<(usize, Report)>,
    lane: JoinHandle<()>,
    stop_lane: CancellationToken,
    /// Why the lane cannot publish.
    trouble: Option<String>,
    /// What may be tried again: the relay's own rule.
    budget: Budget,
}

/// What a window came to.
struct Round {
    /// It had an event that was tried before.
    tried: bool,
    /// One of those was taken.
    taken: bool,
    /// Why something of it has to be tried again.
    why: Option<String>,
}

impl Publisher {
    /// Checks that the broker and the queue are there, and starts the lane.
    pub(super) async fn open(args: &ReplayArgs, origin: Origin, id: Uuid) -> anyhow::Result<Self> {
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
        let (send, windows) = mpsc::channel(1);
        let (report, reports) = mpsc::unbounded_channel();
        let stop_lane = CancellationToken::new();
        let lane = Lane {
            number: 0,
            exchange: one_queue
                .as_ref()
                .map_or_else(|| args.exchange.clone(), |queue| queue.exchange.clone()),
            broker,
            origin,
            // Any number of replays may publish.
            lease: Lease::new(Duration::MAX),
            reports: report,
            stop: stop_lane.clone(),
            last_confirmed: Arc::new(AtomicU64::new(0)),
            ask_permits: Arc::new(Semaphore::new(1)),
            is_quarantine: false,
        };
        let lane = tokio::spawn(lane.run(windows));
        let budget = Budget::new(Instant::now());
        Ok(Self { one_queue, windows: send, reports, lane, stop_lane, trouble: None, budget })
    }

    /// Publishes a page. What is not taken is tried again within the retry budget, until the broker takes nothing of it
    /// for long. False when it was interrupted.
    pub(super) async fn publish(
        &mut self,
        mut events: Vec<Event>,
        progress: &mut Progress,
        registration: &mut Registration<'_>,
        stop: &CancellationToken,
    ) -> anyhow::Result<bool> {
        for event in &mut events {
            event.headers.get_or_insert_default().insert("replayed".to_owned(), true.into());
        }
        let mut page = Page::new(events);
        let published = self.publish_page(&mut page, progress, registration, stop).await;
        if let Some(first) = page.first_left() {
            // What was refused in a row may be taken once the cause is gone.
            let first = progress.refused_in_a_row.map_or(first, |(_, refused)| refused.min(first));
            progress.next = first;
            progress.again = page.published.iter().filter(|position| **position >= first).count();
        }
        published
    }

    async fn publish_page(
        &mut self,
        page: &mut Page,
        progress: &mut Progress,
        registration: &mut Registration<'_>,
        stop: &CancellationToken,
    ) -> anyhow::Result<bool> {
        let (mut pause, mut rounds) = (Backoff::default(), 0);
        while !page.left.is_empty() {
            if stop.is_cancelled() {
                return Ok(false);
            }
            let events = page.window(&mut self.budget, Instant::now());
            if events.is_empty() {
                let until = self.budget.next().saturating_duration_since(Instant::now());
                registration.wait(until.max(SHORTEST_WAIT), stop).await?;
                continue;
            }
            // What may end its channel has one of its own.
            let route = if page.alone { Route::Quarantine } else { Route::Lane };
            let (window, published) = self.send(Window::of(events, route), registration).await?;
            let round = match published {
                Some(published) => self.settle(&window, published, page, progress).await?,
                None => self.put_back(&window, page).await,
            };
            if round.taken {
                rounds = 0;
                pause.reset();
            }
            let Some(why) = round.why else { continue };
            if round.tried && !round.taken {
                rounds += 1;
            }
            if rounds > ATTEMPTS {
                bail!("{why}");
            }
            if !round.taken {
                registration.wait(pause.step(), stop).await?;
            }
        }
        Ok(true)
    }

    /// Gives the lane a window, and waits for what becomes of it: none when it was not begun.
    async fn send(
        &mut self,
        window: Window,
        registration: &mut Registration<'_>,
    ) -> anyhow::Result<(Window, Option<Published>)> {
        const ENDED: &str = "the lane has ended by itself";
        self.windows.send(window).await.ok().context(ENDED)?;
        loop {
            match timeout(HEARTBEAT, self.reports.recv()).await {
                Err(_) => registration.beat().await?,
                Ok(report) => match report.context(ENDED)?.1 {
                    Report::State(state) => self.trouble = state.err(),
                    Report::Published(window, published, _) => return Ok((window, Some(published))),
                    Report::Returned(window) => return Ok((window, None)),
                },
            }
        }
    }

    /// Takes out of the page what is settled of a window.
    async fn settle(
        &mut self,
        window: &Window,
        Published { fates, ended }: Published,
        page: &mut Page,
        progress: &mut Progress,
    ) -> anyhow::Result<Round> {
        let mut round = Round { tried: false, taken: false, why: None };
        let unknown = fates.contains(&None);
        for (item, fate) in window.items.iter().zip(fates) {
            let event = &*item.event;
            let tried = page.tried.contains(&event.position);
            round.tried |= tried;
            match fate {
                Some(Fate::Unroutable) if self.one_queue.is_some() => bail!("the queue is gone"),
                Some(fate @ (Fate::Confirmed | Fate::Unroutable)) => {
                    round.taken |= tried;
                    if tried {
                        self.budget.succeeded(event.size());
                    }
                    progress.refused_in_a_row = None;
                    if fate == Fate::Confirmed {
                        progress.events += 1;
                        page.published.push(event.position);
                    } else {
                        progress.unroutable += 1;
                    }
                    page.settle(event);
                }
                // It may have been this event, or an operator who closed all channels.
                Some(Fate::Refused { why, proof: Proof::Internal }) => {
                    page.again(event, &mut self.budget);
                    round.why = Some(format!("the broker closed the channel of event {}: {why}", event.id));
                }
                Some(Fate::Refused { why, proof }) => {
                    // What was not sent has cost the broker nothing, and says nothing of others.
                    if proof != Proof::Certain {
                        self.budget.failed();
                        progress.refused(event, &why)?;
                    }
                    tracing::warn!(event = %event.id, why, "not replayed");
                    progress.refused += 1;
                    page.settle(event);
                }
                Some(Fate::Nacked) => {
                    page.again(event, &mut self.budget);
                    round.why = Some(format!(
                        "the broker refuses event {} of type {} for now; is a queue at its limit?",
                        event.id, event.type_
                    ));
                }
                Some(Fate::Silent) => {
                    page.again(event, &mut self.budget);
                    round.why = Some(format!(
                        "the broker does not answer for event {} of type {}; has a queue lost the majority of its \
                         nodes?",
                        event.id, event.type_
                    ));
                }
                None => page.again(event, &mut self.budget),
            }
        }
        match ended {
            // Which event it is, is found out one by one.
            Some(BrokerError::Refused { why, .. }) if unknown => {
                page.alone = true;
                round.why = Some(format!("the broker refused: {why}"));
            }
            None | Some(BrokerError::Refused { .. }) => {}
            Some(error @ BrokerError::Silent(_)) => {
                round.why.get_or_insert_with(|| error.to_string());
            }
            Some(error) => {
                // One of several events may have ended it again.
                page.alone |= round.tried;
                round.why = Some(error.to_string());
                self.restore().await;
            }
        }
        Ok(round)
    }

    /// The lane has not begun a window.
    async fn put_back(&mut self, window: &Window, page: &mut Page) -> Round {
        let mut round = Round { tried: false, taken: false, why: self.trouble.clone() };
        for item in &window.items {
            round.tried |= page.tried.contains(&item.event.position);
            page.again(&item.event, &mut self.budget);
        }
        if round.why.is_some() {
            self.restore().await;
        }
        round
    }

    async fn restore(&mut self) {
        if let Some(queue) = &mut self.one_queue {
            queue.restore().await;
        }
    }

    /// Closes its connections.
    pub(super) async fn close(self) {
        self.stop_lane.cancel();
        drop(self.windows);
        let _ = timeout(CLOSE, self.lane).await;
        if let Some(queue) = self.one_queue {
            queue.close().await;
        }
    }
}
