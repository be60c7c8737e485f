//! A lane: one connection that publishes one window after the other. Several of them publish in
//! parallel, each for its own aggregates.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{
    FutureExt,
    stream::{FuturesUnordered, StreamExt},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    broker::{BrokerError, Condition, Link, Nodes},
    event::Event,
    evidence::Kind,
    lease::{self, Lease},
    pause::Pause,
    publish::{Fate, Fates, Guards, Published, Sender, StandsStill, publish},
    queue::{APART, Route, Window},
};

/// How often a lane with nothing to do looks whether its channel is still there.
const LOOK: Duration = Duration::from_millis(500);
/// How often it looks whether its lease is valid again.
const LEASE_LOOK: Duration = Duration::from_millis(20);
/// A connection on demand is kept for so long with nothing to do.
const IDLE: Duration = Duration::from_mins(1);
/// Confirms that take longer are a reason to be not ready.
const SLOW: Duration = Duration::from_secs(5);
/// Events that are published once more, each over a channel of its own, to find out which of them have no answer.
/// Their bytes, and one event more.
const SAMPLE: (usize, usize) = (APART, 4 * 1024 * 1024);
/// The broker may be slow for all. Without an answer to anybody, nothing is said of these for so long.
const SLOW_FOR_ALL: Duration = Duration::from_secs(4);

/// What a lane tells the relay.
#[derive(Debug)]
pub enum Report {
    /// Whether it can publish, and why it cannot.
    State(Result<(), String>),
    /// What became of a window, and how long it took.
    Done(Window, Published, Duration),
    /// A window that it did not begin, for want of a connection.
    Back(Window),
}

/// What a lane works with.
#[derive(Debug)]
pub struct Lane {
    /// Which one it is.
    pub number: usize,
    /// The broker.
    pub nodes: Nodes,
    /// Who publishes, as `app_id` spells it.
    pub source: String,
    /// Until when it may publish.
    pub lease: Lease,
    /// Where it tells what happened, with its number.
    pub reports: mpsc::UnboundedSender<(usize, Report)>,
    /// Ends its waiting.
    pub stop: CancellationToken,
    /// When the latest window was begun of which the broker answered anything, in milliseconds since boot. All lanes
    /// have the same.
    pub answered: Arc<AtomicU64>,
    /// So many lanes may ask over another connection at a time, which takes as much memory as theirs.
    pub asks: Arc<Semaphore>,
    /// For windows that have a channel each. It connects only once there is something to publish, and goes again when
    /// there is nothing for a while.
    pub is_apart: bool,
}

impl Lane {
    /// Publishes until there are no more windows.
    pub async fn run(self, mut windows: mpsc::Receiver<Window>) {
        let mut pause = Pause::default();
        let mut patience = Patience::default();
        let (mut attempt, mut asleep) = (0, self.is_apart);
        while !self.stop.is_cancelled() && !windows.is_closed() {
            let mut first = None;
            if asleep {
                self.report(Report::State(Ok(())));
                first = windows.recv().await;
                if first.is_none() {
                    break;
                }
            }
            asleep = false;
            let Some(connected) = self.stop.run_until_cancelled(self.nodes.connect(attempt)).await else {
                self.back(first);
                break;
            };
            match connected {
                Ok(mut link) => {
                    let ended = if self.is_apart {
                        self.serve_apart(&link, &mut windows, first, &mut pause).await
                    } else {
                        self.serve(&mut link, &mut windows, &mut pause, &mut patience).await
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
                        Err(_) => attempt += 1,
                    }
                }
                Err(error) => {
                    attempt += 1;
                    self.report(Report::State(Err(error.to_string())));
                    self.back(first);
                }
            }
            while let Ok(window) = windows.try_recv() {
                self.report(Report::Back(window));
            }
            pause.wait(&self.stop).await;
        }
        windows.close();
        while let Some(window) = windows.recv().await {
            self.report(Report::Back(window));
        }
    }

    fn back(&self, window: Option<Window>) {
        if let Some(window) = window {
            self.report(Report::Back(window));
        }
    }

    /// One connection's life: one window after the other. Ends well when there are no more.
    async fn serve(
        &self,
        link: &mut Link,
        windows: &mut mpsc::Receiver<Window>,
        pause: &mut Pause,
        patience: &mut Patience,
    ) -> Result<End, BrokerError> {
        let mut changes = link.changes();
        self.report(Report::State(state(link)));
        loop {
            let window = tokio::select! {
                biased;
                window = windows.recv() => window,
                _ = changes.changed() => {
                    link.condition()?;
                    self.report(Report::State(state(link)));
                    continue;
                }
                () = tokio::time::sleep(LOOK) => {
                    if link.channel.status().connected() {
                        continue;
                    }
                    let closed = BrokerError::Publish("the channel was closed".to_owned());
                    return Err(link.reason(closed).await);
                }
            };
            let Some(window) = window else { return Ok(End::Closed) };
            self.may_publish().await;
            let began = Instant::now();
            let (published, other) = match window.route {
                Route::Lane => self.publish(link, &mut changes, &window).await,
                Route::Apart => (self.apart(link, &window).await, None),
            };
            let nacked = published.fates.contains(&Some(Fate::Nacked));
            let (route, ended) = (window.route, published.ended.clone());
            self.report(Report::Done(window, published, began.elapsed()));
            match (ended, other) {
                (None, _) => pause.reset(),
                // It was a channel of its own.
                (Some(BrokerError::Refused(_) | BrokerError::Silent(_)), _)
                    if route == Route::Apart && link.condition().is_ok() => {}
                // The broker is well, and the connection is. Which event it was is found elsewhere.
                (Some(BrokerError::Refused(_)), _) if link.condition().is_ok() => {
                    // What it was given before may be of the same kind, and is handed out anew.
                    while let Ok(window) = windows.try_recv() {
                        self.report(Report::Back(window));
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
                        self.report(Report::Back(window));
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

    /// The same, for windows that have a channel each: many at once, because those without an answer take seconds. Ends
    /// well, too, when there was nothing to do for long.
    async fn serve_apart(
        &self,
        link: &Link,
        windows: &mut mpsc::Receiver<Window>,
        first: Option<Window>,
        pause: &mut Pause,
    ) -> Result<End, BrokerError> {
        let mut changes = link.changes();
        self.report(Report::State(state(link)));
        let mut under_way = FuturesUnordered::new();
        under_way.extend(first.map(|window| self.window_apart(link, window)));
        let mut worked = Instant::now();
        let mut end = None;
        loop {
            tokio::select! {
                biased;
                Some((window, published, took)) = under_way.next() => {
                    match &published.ended {
                        None => pause.reset(),
                        Some(BrokerError::Refused(_) | BrokerError::Silent(_)) if link.condition().is_ok() => {}
                        Some(error) => end = end.or_else(|| Some(Err(error.clone()))),
                    }
                    self.report(Report::Done(window, published, took));
                    worked = Instant::now();
                }
                window = windows.recv(), if end.is_none() => match window {
                    Some(window) => under_way.push(self.window_apart(link, window)),
                    None => end = Some(Ok(End::Closed)),
                },
                _ = changes.changed(), if end.is_none() => match link.condition() {
                    Ok(_) => self.report(Report::State(state(link))),
                    Err(error) => end = Some(Err(error)),
                },
                () = tokio::time::sleep(LOOK), if end.is_none() => {
                    if !link.channel.status().connected() {
                        let closed = BrokerError::Publish("the channel was closed".to_owned());
                        end = Some(Err(link.reason(closed).await));
                    } else if under_way.is_empty() && worked.elapsed() >= IDLE {
                        end = Some(Ok(End::Idle));
                    }
                }
                else => {}
            }
            if under_way.is_empty()
                && let Some(end) = end
            {
                return end;
            }
        }
    }

    async fn may_publish(&self) {
        while !self.lease.is_valid() {
            tokio::time::sleep(LEASE_LOOK).await;
        }
    }

    fn sender<'a>(&'a self, link: &'a Link) -> Sender<'a> {
        Sender { link, exchange: &self.nodes.exchange, source: &self.source }
    }

    fn heard(&self, sent: u64) {
        self.answered.fetch_max(sent, Ordering::Relaxed);
    }

    async fn window_apart(&self, link: &Link, window: Window) -> (Window, Published, Duration) {
        self.may_publish().await;
        let began = Instant::now();
        let published = self.apart(link, &window).await;
        (window, published, began.elapsed())
    }

    /// Publishes a window over a channel of its own. It is known to be strange, so nobody else is asked.
    async fn apart(&self, link: &Link, window: &Window) -> Published {
        let events: Vec<_> = window.items.iter().map(|item| &*item.event).collect();
        let sent = lease::now();
        let guards = Guards {
            allowed: &|| self.lease.is_valid(),
            heard: &|| self.heard(sent),
            stands_still: StandsStill::GiveUp(&|_| true),
        };
        let mut published = self.sender(link).apart(&events, &guards).await;
        if let Some(error @ BrokerError::Publish(_)) = published.ended {
            published.ended = Some(link.reason(error).await);
        }
        published
    }

    /// Publishes a window. While the broker blocks the connection, that hangs without a word, so the reason is told
    /// from here. When the connection stands still, some of its events went over another one, which is returned.
    async fn publish(
        &self,
        link: &Link,
        changes: &mut watch::Receiver<Condition>,
        window: &Window,
    ) -> (Published, Other) {
        let events: Vec<_> = window.items.iter().map(|item| &*item.event).collect();
        let sent = lease::now();
        let other = Mutex::new(None);
        let guards = Guards {
            allowed: &|| self.lease.is_valid(),
            heard: &|| self.heard(sent),
            stands_still: StandsStill::Ask(&|unanswered| self.ask(&events, unanswered, &other).boxed()),
        };
        let published = {
            let publishing = publish(self.sender(link), &link.channel, &events, &guards);
            let mut publishing = std::pin::pin!(publishing);
            let mut slow = std::pin::pin!(tokio::time::sleep(SLOW));
            let mut told = false;
            loop {
                tokio::select! {
                    mut published = &mut publishing => {
                        match published.ended {
                            None if told => self.report(Report::State(state(link))),
                            Some(error @ BrokerError::Publish(_)) => {
                                published.ended = Some(link.reason(error).await);
                            }
                            _ => {}
                        }
                        break published;
                    }
                    Ok(()) = changes.changed() => self.report(Report::State(state(link))),
                    () = &mut slow, if !told => {
                        told = true;
                        let slow = format!("the broker has not confirmed what was published {SLOW:?} ago");
                        self.report(Report::State(state(link).and(Err(slow))));
                    }
                }
            }
        };
        (published, other.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// A connection stands still over these events: a queue that has lost its majority stops it after about thirty. Asks
    /// the broker over another one, each event over a channel of its own, what it says to some of them.
    async fn ask(&self, events: &[&Event], unanswered: Vec<usize>, other: &Mutex<Other>) -> Option<Fates> {
        let permit = Arc::clone(&self.asks).acquire_owned().await.ok()?;
        let link = self.nodes.connect(self.number).await.ok()?;
        let sent = lease::now();
        let guards = Guards {
            allowed: &|| self.lease.is_valid(),
            heard: &|| self.heard(sent),
            // A broker that is slow answers nobody.
            stands_still: StandsStill::GiveUp(&|still| {
                still >= SLOW_FOR_ALL || self.answered.load(Ordering::Relaxed) >= sent
            }),
        };
        let sample = sample(events, unanswered);
        let fates = self.sender(&link).each_apart(sample, &guards).await;
        *other.lock().unwrap_or_else(PoisonError::into_inner) = Some((link, permit));
        (!fates.is_empty()).then_some(fates)
    }

    fn report(&self, report: Report) {
        // Nobody listens any more when the leadership is over.
        let _ = self.reports.send((self.number, report));
    }
}

/// One event of each kind, and then as many more as may be.
fn sample<'a>(events: &[&'a Event], unanswered: Vec<usize>) -> Vec<(usize, &'a Event)> {
    let mut kinds = HashSet::new();
    let (first, more): (Vec<usize>, Vec<usize>) =
        unanswered.into_iter().partition(|n| kinds.insert(Kind::of(events[*n])));
    let mut bytes = 0;
    let all = first.into_iter().chain(more).map(|n| (n, events[n]));
    let fitting = all.take(SAMPLE.0).take_while(|(_, event)| {
        let fits = bytes < SAMPLE.1;
        bytes += event.size();
        fits
    });
    fitting.collect()
}

/// Another connection, and the permit for it.
type Other = Option<(Link, OwnedSemaphorePermit)>;

/// How a connection's life ends well.
#[derive(Clone, Copy, Debug)]
enum End {
    /// There are no more windows.
    Closed,
    /// There was nothing to do for long.
    Idle,
}

/// How long a connection is kept over which the broker refuses events. A node may refuse for ever what
/// another one would take: RabbitMQ 3.10 does when a connection first publishes to a quorum queue whose
/// leader has just died. When it is a queue that is full, a new connection changes nothing, so each is
/// kept for twice as long as the one before.
#[derive(Debug)]
struct Patience {
    /// The first refusal on this connection, and the last on any.
    first: Option<Instant>,
    last: Option<Instant>,
    limit: Duration,
}

impl Patience {
    const SHORTEST: Duration = Duration::from_secs(5);
    const LONGEST: Duration = Duration::from_mins(5);
    /// What was refused is tried again within less; when nothing was refused for so long, nothing is.
    const OVER: Duration = Duration::from_secs(30);

    /// Whether it ends, after a window of which something was `nacked`, or nothing.
    fn ends(&mut self, nacked: bool, now: Instant) -> bool {
        if !nacked {
            if self.last.is_some_and(|last| now.duration_since(last) >= Self::OVER) {
                *self = Self::default();
            }
            return false;
        }
        self.last = Some(now);
        let first = *self.first.get_or_insert(now);
        let ends = now.duration_since(first) >= self.limit;
        if ends {
            self.first = None;
            self.limit = (self.limit * 2).min(Self::LONGEST);
        }
        ends
    }
}

impl Default for Patience {
    fn default() -> Self {
        Self { first: None, last: None, limit: Self::SHORTEST }
    }
}

fn state(link: &Link) -> Result<(), String> {
    match link.condition() {
        Ok(None) => Ok(()),
        Ok(Some(reason)) => Err(format!("the broker blocks publishers: {reason}")),
        Err(ended) => Err(ended.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The seconds at which connections are given up, when a window ends each second and `nacked` says
    /// of which something was refused.
    fn ends(seconds: u64, nacked: impl Fn(u64) -> bool) -> Vec<u64> {
        let (mut patience, begin) = (Patience::default(), Instant::now());
        (0..seconds).filter(|n| patience.ends(nacked(*n), begin + Duration::from_secs(*n))).collect()
    }

    #[test]
    fn a_connection_over_which_events_are_refused_is_given_up_ever_more_seldom() {
        assert_eq!(ends(20, |_| false), Vec::<u64>::new());
        assert_eq!(ends(2_000, |_| true), [5, 16, 37, 78, 159, 320, 621, 922, 1223, 1524, 1825]);
        // Other events pass meanwhile.
        assert_eq!(ends(100, |n| n % 10 == 0), [10, 30, 60]);
        // Then nothing is refused for half a minute.
        assert_eq!(ends(100, |n| !(7..=60).contains(&n)), [5, 66, 77, 98]);
    }
}
