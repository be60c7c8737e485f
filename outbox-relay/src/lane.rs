//! A lane: one connection that publishes one window after the other. Several of them publish in
//! parallel, each for its own aggregates.

mod ask;
mod patience;
mod quarantine;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use amqp::Reconnect;
use futures_util::FutureExt;
use lapin::types::ShortString;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    broker::{Broker, Link},
    condition::{BrokerError, Condition},
    lease::{self, Lease},
    message::Origin,
    publish::{Fate, Guards, OnStall, Published, Sender, publish},
    queue::{Route, Window},
};

use patience::Patience;

/// How often a lane with nothing to do looks whether its channel is still there.
const LOOK: Duration = Duration::from_millis(500);
/// A connection on demand is kept for so long with nothing to do.
const IDLE: Duration = Duration::from_mins(1);
/// How often it looks whether its lease is valid again.
const LEASE_LOOK: Duration = Duration::from_millis(20);
/// Confirms that take longer are a reason to be not ready.
const SLOW: Duration = Duration::from_secs(5);

/// What a lane tells the relay.
#[derive(Debug)]
pub enum Report {
    /// Whether it can publish, and why it cannot.
    State(Result<(), String>),
    /// It has no connection until it is given a window.
    Asleep,
    /// What became of a window, and how long it took.
    Published(Window, Published, Duration),
    /// A window that it did not begin, for want of a connection.
    Returned(Window),
}

/// What a lane works with.
#[derive(Debug)]
pub struct Lane {
    /// Which one it is.
    pub number: usize,
    /// The broker.
    pub broker: Broker,
    /// The exchange that it publishes to: that of the broker, or one that leads to fewer queues.
    pub exchange: ShortString,
    /// Who publishes.
    pub origin: Origin,
    /// Until when it may publish.
    pub lease: Lease,
    /// Where it tells what happened, with its number.
    pub reports: mpsc::UnboundedSender<(usize, Report)>,
    /// Ends its waiting.
    pub stop: CancellationToken,
    /// When the latest window was begun of which the broker answered anything, in milliseconds since boot. All lanes
    /// have the same.
    pub last_confirmed: Arc<AtomicU64>,
    /// So many lanes may ask over another connection at a time, which takes as much memory as theirs.
    pub ask_permits: Arc<Semaphore>,
    /// It connects only once there is something to publish for it, and goes again when there is nothing for a while.
    pub on_demand: bool,
    /// For windows that have a channel each.
    pub is_quarantine: bool,
}

impl Lane {
    /// Publishes until there are no more windows.
    pub async fn run(self, mut windows: mpsc::Receiver<Window>) {
        let mut reconnect = Reconnect::default();
        let mut patience = Patience::default();
        let mut asleep = self.on_demand;
        while !self.stop.is_cancelled() && !windows.is_closed() {
            let mut first = None;
            if asleep {
                self.report(Report::Asleep);
                first = windows.recv().await;
                if first.is_none() {
                    break;
                }
            }
            asleep = false;
            let Some(connected) = self.stop.run_until_cancelled(self.broker.connect(&mut reconnect)).await
            else {
                self.give_back(first);
                break;
            };
            match connected {
                Ok(mut link) => {
                    let ended = if self.is_quarantine {
                        self.serve_quarantine(&link, &mut windows, first, &mut reconnect).await
                    } else {
                        self.serve(&mut link, &mut windows, first, &mut reconnect, &mut patience).await
                    };
                    if let Err(error) = &ended {
                        self.report(Report::State(Err(error.to_string())));
                    }
                    link.close().await;
                    match ended {
                        Ok(End::Closed) => break,
                        Ok(End::Idle) => {
                            asleep = true;
                            continue;
                        }
                        Err(_) => reconnect.lost(),
                    }
                }
                Err(error) => {
                    reconnect.lost();
                    self.report(Report::State(Err(error.to_string())));
                    self.give_back(first);
                }
            }
            while let Ok(window) = windows.try_recv() {
                self.report(Report::Returned(window));
            }
            reconnect.wait(&self.stop).await;
        }
        windows.close();
        while let Some(window) = windows.recv().await {
            self.report(Report::Returned(window));
        }
    }

    fn give_back(&self, window: Option<Window>) {
        if let Some(window) = window {
            self.report(Report::Returned(window));
        }
    }

    /// One connection's life: one window after the other. Ends well when there are no more.
    async fn serve(
        &self,
        link: &mut Link,
        windows: &mut mpsc::Receiver<Window>,
        mut first: Option<Window>,
        reconnect: &mut Reconnect,
        patience: &mut Patience,
    ) -> Result<End, BrokerError> {
        let mut changes = link.changes();
        self.report(Report::State(state(link)));
        let mut worked = Instant::now();
        loop {
            let window = tokio::select! {
                biased;
                Some(first) = async { first.take() } => Some(first),
                window = windows.recv() => window,
                _ = changes.changed() => {
                    link.condition()?;
                    self.report(Report::State(state(link)));
                    continue;
                }
                () = tokio::time::sleep(LOOK) => {
                    if link.channel.status().connected() {
                        if self.on_demand && worked.elapsed() >= IDLE {
                            return Ok(End::Idle);
                        }
                        continue;
                    }
                    let closed = BrokerError::Publish("the channel was closed".to_owned());
                    return Err(link.reason(closed).await);
                }
            };
            let Some(window) = window else { return Ok(End::Closed) };
            self.wait_for_lease().await;
            let began = Instant::now();
            let (mut published, other) = match window.route {
                Route::Lane => self.publish(link, &mut changes, &window).await,
                Route::Quarantine => (self.over_own_channel(link, &window).await, None),
            };
            published.attribute_refusal();
            let nacked = published.fates.contains(&Some(Fate::Nacked));
            let (route, ended) = (window.route, published.ended.clone());
            self.report(Report::Published(window, published, began.elapsed()));
            worked = Instant::now();
            match (ended, other) {
                (None, _) => reconnect.works(),
                // It was a channel of its own.
                (Some(BrokerError::Refused { .. } | BrokerError::Silent(_)), _)
                    if route == Route::Quarantine && link.condition().is_ok() => {}
                // The broker is well, and the connection is. Which event it was is found elsewhere.
                (Some(BrokerError::Refused { .. }), _) if link.condition().is_ok() => {
                    // What it was given before may be of the same kind, and is handed out anew.
                    while let Ok(window) = windows.try_recv() {
                        self.report(Report::Returned(window));
                    }
                    link.reopen().await?;
                }
                // The connection stands still. Over the other one its events were sorted.
                (Some(BrokerError::Silent(_)), Some((other, permit))) => {
                    let still = std::mem::replace(link, other);
                    tokio::spawn(async move {
                        still.close().await;
                        drop(permit);
                    });
                    changes = link.changes();
                    while let Ok(window) = windows.try_recv() {
                        self.report(Report::Returned(window));
                    }
                    self.report(Report::State(state(link)));
                }
                (Some(error), _) => return Err(error),
            }
            if patience.ends(nacked, Instant::now()) {
                return Err(BrokerError::Refusing);
            }
        }
    }

    async fn wait_for_lease(&self) {
        while !self.lease.is_valid() {
            tokio::time::sleep(LEASE_LOOK).await;
        }
    }

    fn sender<'a>(&'a self, link: &'a Link) -> Sender<'a> {
        Sender { link, exchange: &self.exchange, origin: &self.origin }
    }

    fn note_confirm(&self, sent: u64) {
        self.last_confirmed.fetch_max(sent, Ordering::Relaxed);
    }

    /// Publishes a window. While the broker blocks the connection, that hangs without a word, so the reason is told
    /// from here. When the connection stands still, some of its events went over another one, which is returned.
    async fn publish(
        &self,
        link: &Link,
        changes: &mut watch::Receiver<Condition>,
        window: &Window,
    ) -> (Published, Replacement) {
        let events: Vec<_> = window.items.iter().map(|item| &*item.event).collect();
        let sent = lease::now();
        let other = Mutex::new(None);
        let guards = Guards {
            may_publish: &|| self.lease.is_valid(),
            on_confirm: &|| self.note_confirm(sent),
            on_stall: OnStall::Ask(&|unanswered| self.ask(&events, unanswered, &other).boxed()),
        };
        let published = {
            let publishing = publish(self.sender(link), &link.channel, &events, &guards);
            let mut publishing = std::pin::pin!(publishing);
            let mut slow = std::pin::pin!(tokio::time::sleep(SLOW));
            let mut reported_slow = false;
            loop {
                tokio::select! {
                    mut published = &mut publishing => {
                        match published.ended {
                            None if reported_slow => self.report(Report::State(state(link))),
                            Some(error @ BrokerError::Publish(_)) => {
                                published.ended = Some(link.reason(error).await);
                            }
                            _ => {}
                        }
                        break published;
                    }
                    Ok(()) = changes.changed() => self.report(Report::State(state(link))),
                    () = &mut slow, if !reported_slow => {
                        reported_slow = true;
                        let slow = format!("the broker has not confirmed what was published {SLOW:?} ago");
                        self.report(Report::State(state(link).and(Err(slow))));
                    }
                }
            }
        };
        (published, other.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    fn report(&self, report: Report) {
        // Nobody listens any more when the leadership is over.
        let _ = self.reports.send((self.number, report));
    }
}

/// Another connection, and the permit for it.
type Replacement = Option<(Link, OwnedSemaphorePermit)>;

/// How a connection's life ends well.
#[derive(Clone, Copy, Debug)]
enum End {
    /// There are no more windows.
    Closed,
    /// There was nothing to do for long.
    Idle,
}

fn state(link: &Link) -> Result<(), String> {
    match link.condition() {
        Ok(None) => Ok(()),
        Ok(Some(reason)) => Err(format!("the broker blocks publishers: {reason}")),
        Err(ended) => Err(ended.to_string()),
    }
}
