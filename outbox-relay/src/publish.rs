//! Publishing a window of events, and knowing what became of each.

mod confirms;
mod spans;

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use futures_util::{
    FutureExt,
    future::BoxFuture,
    stream::{FuturesUnordered, StreamExt},
};
use lapin::{Channel, Confirmation, options::BasicPublishOptions, types::ShortString};

use crate::{
    broker::Link,
    condition::BrokerError,
    event::Event,
    failpoint, frame,
    message::{Origin, message},
};

use confirms::{Confirms, broker_error, mark_returned};
use spans::Spans;

/// How long a window may take to be written and to be confirmed. While the broker blocks the
/// connection, publishing would hang for ever.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A channel on which nothing is answered for so long stands still.
const SILENCE: Duration = Duration::from_secs(2);
/// A connection over which an event cannot be written for so long stands still, too: the broker does not read.
const STUCK: Duration = Duration::from_secs(10);
/// How long the rest of an answer may take: the broker acks several events at once, and their confirms do not all arrive
/// at the same moment.
const SETTLING: Duration = Duration::from_millis(50);

/// As many events without a confirm do not stop a channel. Beyond about thirty the broker reads no more of the connection.
pub const MAX_UNANSWERED: usize = 16;

/// What became of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The broker has it, in at least one queue.
    Confirmed,
    /// The broker took it, but no queue did.
    Unroutable,
    /// The broker could not take it now, for example because a queue is full.
    Nacked,
    /// The broker did not answer, while it answered others: one of the queues has lost its majority, for example.
    Silent,
    /// It is refused for itself.
    Refused {
        /// Why.
        why: String,
        /// What shows that it is this event.
        proof: Proof,
    },
}

/// What shows that an event is refused for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// AMQP cannot carry it: no broker would take it, so it was not sent.
    Certain,
    /// The broker closed the channel over it, and gave the reason.
    Reason,
    /// The broker's process for the channel ended while only this event was under way (code 541). An operator who closes
    /// all channels causes the same, so once is no proof.
    Internal,
}

/// What is asked and called while a window is under way.
pub struct Guards<'a> {
    /// Whether events may still be published.
    pub may_publish: &'a (dyn Fn() -> bool + Sync),
    /// Called at each confirm.
    pub on_confirm: &'a (dyn Fn() + Sync),
    /// What to do once the channel stands still.
    pub on_stall: OnStall<'a>,
}

/// What to do about events without a confirm, once none came for [`SILENCE`].
pub enum OnStall<'a> {
    /// Give up, once this says so; it gets for how long nothing was answered.
    GiveUp(&'a (dyn Fn(Duration) -> bool + Sync)),
    /// Ask, over another connection, what the broker says to some of these, which are numbers in the window. None when
    /// that could not be found out.
    Ask(&'a (dyn Fn(Vec<usize>) -> BoxFuture<'a, Option<Fates>> + Sync)),
}

/// What became of events, by their numbers in a window.
pub type Fates = Vec<(usize, Fate)>;

/// What became of a window.
#[derive(Debug, Default)]
pub struct Published {
    /// Of each event, in order; none where it is not known.
    pub fates: Vec<Option<Fate>>,
    /// Why the channel cannot be used any more.
    pub ended: Option<BrokerError>,
}

impl Published {
    /// Of none of so many events anything is known.
    pub fn nothing(count: usize, why: BrokerError) -> Self {
        Self { fates: vec![None; count], ended: Some(why) }
    }

    /// When the broker closed the channel over one event of the window, and only one has no fate, it is that one.
    pub fn attribute_refusal(&mut self) {
        let Some(BrokerError::Refused { why, internal }) = &self.ended else { return };
        let proof = if *internal { Proof::Internal } else { Proof::Reason };
        let mut unknown = self.fates.iter_mut().filter(|fate| fate.is_none());
        if let (Some(fate), None) = (unknown.next(), unknown.next()) {
            *fate = Some(Fate::Refused { why: why.clone(), proof });
        }
    }
}

/// To where, and as whom, events are published.
#[derive(Clone, Copy, Debug)]
pub struct Sender<'a> {
    /// The connection.
    pub link: &'a Link,
    /// The exchange.
    pub exchange: &'a ShortString,
    /// Who publishes.
    pub origin: &'a Origin,
}

impl Sender<'_> {
    /// Publishes events over a channel of their own. So what becomes of them says nothing of others, and stops none.
    pub async fn over_own_channel(self, window: &[&Event], guards: &Guards<'_>) -> Published {
        match self.link.another_channel().await {
            Ok(channel) => publish(self, &channel, window, guards).await,
            Err(error) => Published::nothing(window.len(), error),
        }
    }

    /// Publishes each event over a channel of its own. Returns what is known, by their numbers.
    pub async fn each_over_own_channel(self, events: Vec<(usize, &Event)>, guards: &Guards<'_>) -> Fates {
        let publishing = events.into_iter().map(async |(n, event)| {
            let mut published = self.over_own_channel(&[event], guards).await;
            // Over a connection that has ended, another event may have been refused.
            if self.link.is_open() {
                published.attribute_refusal();
            }
            Some((n, published.fates.pop().flatten()?))
        });
        let known = publishing.collect::<FuturesUnordered<_>>().filter_map(async |known| known);
        known.collect().await
    }
}

/// Publishes a window of events in its order, and awaits every confirm. Publishes no more once
/// [`Guards::may_publish`] says no. Publish again, over another channel, what has no fate.
pub async fn publish(
    sender: Sender<'_>,
    channel: &Channel,
    window: &[&Event],
    guards: &Guards<'_>,
) -> Published {
    let link = sender.link;
    let timeout = || match link.condition() {
        Ok(Some(reason)) => BrokerError::Publish(format!("the broker blocks publishers: {reason}")),
        _ => BrokerError::Publish(format!("no confirm within {TIMEOUT:?}")),
    };
    let spans = Spans::begin(window);
    let work = publish_window(sender, channel, window, guards);
    let published = match tokio::time::timeout(TIMEOUT, work).await {
        Ok(published) => published,
        Err(_) => Published::nothing(window.len(), timeout()),
    };
    if let Some(spans) = spans {
        spans.end(sender.exchange.as_str(), window, &published.fates);
    }
    published
}

async fn publish_window(
    Sender { link, exchange, origin }: Sender<'_>,
    channel: &Channel,
    window: &[&Event],
    guards: &Guards<'_>,
) -> Published {
    let mut fates = vec![None; window.len()];
    let mut outstanding = VecDeque::with_capacity(window.len());
    let (mut ended, mut stuck) = (None, false);
    for (n, (event, fate)) in window.iter().zip(&mut fates).enumerate() {
        let carried = message(event, origin).and_then(|(key, properties)| {
            let message = (key, properties.with_user_id(link.user.clone()));
            match frame::headers(&message.1) {
            size if size > link.frame_max() => Err(format!(
                "its headers take a frame of {size} bytes, and this connection's frame_max is {}; raise that at the \
                 broker and in AMQP_URL, then run: outbox-relay parked retry",
                link.frame_max()
            )),
            _ => Ok(message),
            }
        });
        let (key, properties) = match carried {
            Ok(message) => message,
            Err(why) => {
                *fate = Some(Fate::Refused {
                    why: format!("AMQP cannot carry it: {why}"),
                    proof: Proof::Certain,
                });
                continue;
            }
        };
        if !(guards.may_publish)() {
            ended = Some(BrokerError::NoLease);
            break;
        }
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let body = event.payload.as_bytes();
        let publishing = channel.basic_publish(exchange.clone(), key, options, body, properties);
        match tokio::time::timeout(STUCK, publishing).await {
            Ok(Ok(confirm)) => outstanding.push_back((n, confirm)),
            Ok(Err(error)) => {
                ended = Some(broker_error(&error));
                break;
            }
            // While the broker blocks the connection, that is the reason.
            Err(_) if !matches!(link.condition(), Ok(None)) => std::future::pending().await,
            Err(_) => {
                stuck = true;
                break;
            }
        }
    }
    failpoint::hit("publish");
    let mut confirms = Confirms { fates, returned: Vec::new(), ended, heard: Instant::now() };
    let mut unanswered = confirms.gather(link, outstanding, guards).await;
    if !unanswered.is_empty() && confirms.ended.is_none() {
        // What the broker acks together is not known at once: a return of the one may hang on another, whose answer is
        // only just coming.
        tokio::time::sleep(SETTLING).await;
        for (_, confirm) in &mut unanswered {
            if let Some(Ok(Confirmation::Ack(message) | Confirmation::Nack(message))) = confirm.now_or_never()
            {
                confirms.returned.extend(message);
            }
        }
        // A few are silent themselves; more stop the connection, and with it those that are not. Elsewhere it was found
        // out which.
        if matches!(guards.on_stall, OnStall::GiveUp(_)) && unanswered.len() <= MAX_UNANSWERED {
            for (n, _) in &unanswered {
                confirms.fates[*n] = Some(Fate::Silent);
            }
        }
        confirms.ended = Some(BrokerError::Silent(unanswered.len()));
    }
    if stuck {
        confirms
            .ended
            .get_or_insert(BrokerError::Silent(confirms.fates.iter().filter(|fate| fate.is_none()).count()));
    }
    let Confirms { mut fates, mut returned, mut ended, .. } = confirms;
    // A return can hang on the wrong confirm when the broker acks several at once; what it says by its message id is
    // certain. It always comes before the ack of its own message. After the channel has ended nothing more comes.
    if ended.is_none() {
        match channel.wait_for_confirms().await {
            Ok(messages) => returned.extend(messages),
            Err(error) => ended = Some(broker_error(&error)),
        }
    }
    match mark_returned(&mut fates, window, &returned) {
        Ok(()) => Published { fates, ended },
        Err(why) => Published::nothing(window.len(), why),
    }
}
