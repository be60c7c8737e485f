//! The lane for what may end its channel, or have no answer: each of its windows has a channel of its own, and it has a
//! connection only while there is something to publish.

use std::time::{Duration, Instant};

use amqp::Reconnect;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::mpsc;

use super::{End, IDLE, LOOK, Lane, Report, state};
use crate::{
    broker::Link,
    condition::BrokerError,
    lease,
    publish::{Guards, OnStall, Published},
    queue::Window,
};

impl Lane {
    /// One connection's life, for windows that have a channel each: many at once, because those without an answer take
    /// seconds. Ends well, too, when there was nothing to do for long.
    pub(super) async fn serve_quarantine(
        &self,
        link: &Link,
        windows: &mut mpsc::Receiver<Window>,
        first: Option<Window>,
        reconnect: &mut Reconnect,
    ) -> Result<End, BrokerError> {
        let mut changes = link.changes();
        self.report(Report::State(state(link)));
        let mut under_way = FuturesUnordered::new();
        under_way.extend(first.map(|window| self.publish_window_in_quarantine(link, window)));
        let mut worked = Instant::now();
        let mut end = None;
        loop {
            tokio::select! {
                biased;
                Some((window, published, took)) = under_way.next() => {
                    match &published.ended {
                        None => reconnect.works(),
                        Some(BrokerError::Refused { .. } | BrokerError::Silent(_)) if link.condition().is_ok() => {}
                        Some(error) => end = end.or_else(|| Some(Err(error.clone()))),
                    }
                    self.report(Report::Published(window, published, took));
                    worked = Instant::now();
                }
                window = windows.recv(), if end.is_none() => match window {
                    Some(window) => under_way.push(self.publish_window_in_quarantine(link, window)),
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

    async fn publish_window_in_quarantine(
        &self,
        link: &Link,
        window: Window,
    ) -> (Window, Published, Duration) {
        self.wait_for_lease().await;
        let began = Instant::now();
        let mut published = self.over_own_channel(link, &window).await;
        published.attribute_refusal();
        (window, published, began.elapsed())
    }

    /// Publishes a window over a channel of its own. It is known to be strange, so nobody else is asked.
    pub(super) async fn over_own_channel(&self, link: &Link, window: &Window) -> Published {
        let events: Vec<_> = window.items.iter().map(|item| &*item.event).collect();
        let sent = lease::now();
        let guards = Guards {
            may_publish: &|| self.lease.is_valid(),
            on_confirm: &|| self.note_confirm(sent),
            on_stall: OnStall::GiveUp(&|_| true),
        };
        let mut published = self.sender(link).over_own_channel(&events, &guards).await;
        if let Some(error @ BrokerError::Publish(_)) = published.ended {
            published.ended = Some(link.reason(error).await);
        }
        published
    }
}
