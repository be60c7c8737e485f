//! A lane: one connection that publishes one window after the other. Several of them publish in
//! parallel, each for its own aggregates.

use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    broker::{BrokerError, Link, Nodes},
    lease::Lease,
    pause::Pause,
    publish::{Fate, publish},
    queue::Item,
};

/// How often a lane with nothing to do looks whether its channel is still there.
const LOOK: Duration = Duration::from_millis(500);
/// How often it looks whether its lease is valid again.
const LEASE_LOOK: Duration = Duration::from_millis(20);

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
        let mut attempt = 0;
        while !self.stop.is_cancelled() && !self.windows.is_closed() {
            let Some(connected) = self.stop.run_until_cancelled(self.nodes.connect(attempt)).await else {
                break;
            };
            match connected {
                Ok(link) => {
                    let ended = self.serve(&link, &mut pause).await;
                    if let Err(error) = &ended {
                        self.report(Report::State(Err(error.to_string())));
                    }
                    link.close().await;
                    match ended {
                        Ok(()) => break,
                        // The broker is well; which event it was is found by a few more tries.
                        Err(BrokerError::Refused(_)) => pause.reset(),
                        Err(_) => {}
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
    async fn serve(&mut self, link: &Link, pause: &mut Pause) -> Result<(), BrokerError> {
        let mut blocks = link.blocks();
        self.report(Report::State(state(link)));
        loop {
            let window = tokio::select! {
                window = self.windows.recv() => window,
                changed = blocks.changed() => {
                    changed.map_err(|_| BrokerError::Publish("the connection broke".to_owned()))?;
                    self.report(Report::State(state(link)));
                    continue;
                }
                () = tokio::time::sleep(LOOK) => {
                    if link.channel.status().connected() {
                        continue;
                    }
                    return Err(BrokerError::Publish("the channel was closed".to_owned()));
                }
            };
            let Some(window) = window else { return Ok(()) };
            while !self.lease.is_valid() {
                tokio::time::sleep(LEASE_LOOK).await;
            }
            let began = Instant::now();
            let fates = self.publish(link, &mut blocks, &window.items).await;
            let error = fates.as_ref().err().cloned();
            self.report(Report::Done(window, fates, began.elapsed()));
            match error {
                None => pause.reset(),
                Some(error) => return Err(error),
            }
        }
    }

    /// Publishes a window. While the broker blocks the connection, that hangs without a word, so the
    /// reason is told from here.
    async fn publish(
        &self,
        link: &Link,
        blocks: &mut watch::Receiver<Option<String>>,
        window: &[Item],
    ) -> Result<Vec<Fate>, BrokerError> {
        let events: Vec<_> = window.iter().map(|item| &*item.event).collect();
        let allowed = || self.lease.is_valid();
        let publishing = publish(link, &self.nodes.exchange, &self.source, &events, allowed);
        let mut publishing = std::pin::pin!(publishing);
        loop {
            tokio::select! {
                fates = &mut publishing => return fates,
                Ok(()) = blocks.changed() => self.report(Report::State(state(link))),
            }
        }
    }

    fn report(&self, report: Report) {
        // Nobody listens any more when the leadership is over.
        let _ = self.reports.send((self.number, report));
    }
}

fn state(link: &Link) -> Result<(), String> {
    match link.blocked() {
        None => Ok(()),
        Some(reason) => Err(format!("the broker blocks publishers: {reason}")),
    }
}
