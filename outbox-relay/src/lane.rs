//! A lane: one connection that publishes one window after the other. Several of them publish in
//! parallel, each for its own aggregates.

use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    broker::{BrokerError, Condition, Link, Nodes},
    lease::Lease,
    pause::Pause,
    publish::{Fate, publish},
    queue::Item,
};

/// How often a lane with nothing to do looks whether its channel is still there.
const LOOK: Duration = Duration::from_millis(500);
/// How often it looks whether its lease is valid again.
const LEASE_LOOK: Duration = Duration::from_millis(20);
/// Confirms that take longer are a reason to be not ready.
const SLOW: Duration = Duration::from_secs(5);

/// Events that are published together.
#[derive(Debug)]
pub struct Window {
    /// At most one of each aggregate.
    pub items: Vec<Item>,
    /// How many events the broker had confirmed when this was handed out.
    pub confirmed: u64,
}

/// What a lane tells the relay.
#[derive(Debug)]
pub enum Report {
    /// Whether it can publish, and why it cannot.
    State(Result<(), String>),
    /// What became of a window, and how long it took. An error leaves that unknown.
    Done(Window, Result<Vec<Fate>, BrokerError>, Duration),
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
    /// What to publish; the lane ends when this is closed.
    pub windows: mpsc::Receiver<Window>,
    /// Where it tells what happened, with its number.
    pub reports: mpsc::UnboundedSender<(usize, Report)>,
    /// Ends its waiting.
    pub stop: CancellationToken,
}

impl Lane {
    /// Publishes until there are no more windows.
    pub async fn run(mut self) {
        let mut pause = Pause::default();
        let mut patience = Patience::default();
        let mut attempt = 0;
        while !self.stop.is_cancelled() && !self.windows.is_closed() {
            let Some(connected) = self.stop.run_until_cancelled(self.nodes.connect(attempt)).await else {
                break;
            };
            match connected {
                Ok(link) => {
                    let ended = self.serve(&link, &mut pause, &mut patience).await;
                    if let Err(error) = &ended {
                        self.report(Report::State(Err(error.to_string())));
                    }
                    link.close().await;
                    match ended {
                        Ok(()) => break,
                        // The broker is well; which event it was is found by a few more tries.
                        Err(BrokerError::Refused(_)) => pause.reset(),
                        Err(_) => attempt += 1,
                    }
                }
                Err(error) => {
                    attempt += 1;
                    self.report(Report::State(Err(error.to_string())));
                }
            }
            while let Ok(window) = self.windows.try_recv() {
                self.report(Report::Back(window));
            }
            pause.wait(&self.stop).await;
        }
        self.windows.close();
        while let Some(window) = self.windows.recv().await {
            self.report(Report::Back(window));
        }
    }

    /// One connection's life. Ends well when there are no more windows.
    async fn serve(
        &mut self,
        link: &Link,
        pause: &mut Pause,
        patience: &mut Patience,
    ) -> Result<(), BrokerError> {
        let mut changes = link.changes();
        self.report(Report::State(state(link)));
        loop {
            let window = tokio::select! {
                window = self.windows.recv() => window,
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
            let Some(window) = window else { return Ok(()) };
            while !self.lease.is_valid() {
                tokio::time::sleep(LEASE_LOOK).await;
            }
            let began = Instant::now();
            let fates = self.publish(link, &mut changes, &window.items).await;
            let nacked = fates.as_ref().is_ok_and(|fates| fates.contains(&Fate::Nacked));
            let error = fates.as_ref().err().cloned();
            self.report(Report::Done(window, fates, began.elapsed()));
            match error {
                None => pause.reset(),
                Some(error) => return Err(error),
            }
            if patience.ends(nacked, Instant::now()) {
                return Err(BrokerError::Refusing);
            }
        }
    }

    /// Publishes a window. While the broker blocks the connection, that hangs without a word, so the
    /// reason is told from here.
    async fn publish(
        &self,
        link: &Link,
        changes: &mut watch::Receiver<Condition>,
        window: &[Item],
    ) -> Result<Vec<Fate>, BrokerError> {
        let events: Vec<_> = window.iter().map(|item| &*item.event).collect();
        let allowed = || self.lease.is_valid();
        let publishing = publish(link, &self.nodes.exchange, &self.source, &events, allowed);
        let mut publishing = std::pin::pin!(publishing);
        let mut slow = std::pin::pin!(tokio::time::sleep(SLOW));
        let mut told = false;
        loop {
            tokio::select! {
                fates = &mut publishing => {
                    if told && fates.is_ok() {
                        self.report(Report::State(state(link)));
                    }
                    return match fates {
                        Err(error @ BrokerError::Publish(_)) => Err(link.reason(error).await),
                        fates => fates,
                    };
                }
                Ok(()) = changes.changed() => self.report(Report::State(state(link))),
                () = &mut slow, if !told => {
                    told = true;
                    let slow = format!("the broker has not confirmed what was published {SLOW:?} ago");
                    self.report(Report::State(state(link).and(Err(slow))));
                }
            }
        }
    }

    fn report(&self, report: Report) {
        // Nobody listens any more when the leadership is over.
        let _ = self.reports.send((self.number, report));
    }
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
