//! Publishing a window of events, and knowing what became of each.

use std::{
    collections::{HashSet, VecDeque},
    pin::pin,
    time::{Duration, Instant},
};

use futures_util::{
    FutureExt,
    future::BoxFuture,
    stream::{FuturesUnordered, StreamExt},
};
use lapin::{
    Channel, Confirmation, ErrorKind, PublisherConfirm,
    message::BasicReturnMessage,
    options::BasicPublishOptions,
    protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError},
    types::ShortString,
};

use crate::{
    broker::{BrokerError, Link},
    event::Event,
    failpoint, frame,
    message::message,
};

/// How long a window may take to be written and to be confirmed. While the broker blocks the
/// connection, publishing would hang for ever.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A channel on which nothing is answered for so long stands still.
const SILENCE: Duration = Duration::from_secs(2);
/// A connection over which an event cannot be written for so long stands still, too: the broker does not read.
const STUCK: Duration = Duration::from_secs(10);
/// How often to look whether anything was answered.
const LOOK: Duration = Duration::from_millis(200);
/// By then an answer to several events at once is known as a whole.
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
        /// AMQP cannot carry it: no broker would take it, so it was not sent. Otherwise the broker said so.
        certain: bool,
    },
}

/// What is asked while a window is under way.
pub struct Guards<'a> {
    /// Whether events may still be published.
    pub allowed: &'a (dyn Fn() -> bool + Sync),
    /// Told of each answer.
    pub heard: &'a (dyn Fn() + Sync),
    /// What to do once the channel stands still.
    pub stands_still: StandsStill<'a>,
}

/// What to do about events without an answer, once nothing was answered for [`SILENCE`].
pub enum StandsStill<'a> {
    /// Give up, once this says so; it is told for how long nothing was answered.
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
        let Some(BrokerError::Refused(why)) = &self.ended else { return };
        let mut unknown = self.fates.iter_mut().filter(|fate| fate.is_none());
        if let (Some(fate), None) = (unknown.next(), unknown.next()) {
            *fate = Some(Fate::Refused { why: why.clone(), certain: false });
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
    /// Who publishes, as `app_id` spells it.
    pub source: &'a str,
}

impl Sender<'_> {
    /// Publishes events over a channel of their own. So what becomes of them says nothing of others, and stops none.
    pub async fn apart(self, window: &[&Event], guards: &Guards<'_>) -> Published {
        match self.link.another_channel().await {
            Ok(channel) => publish(self, &channel, window, guards).await,
            Err(error) => Published::nothing(window.len(), error),
        }
    }

    /// Publishes each event over a channel of its own. Returns what is known, by their numbers.
    pub async fn each_apart(self, events: Vec<(usize, &Event)>, guards: &Guards<'_>) -> Fates {
        let publishing = events.into_iter().map(async |(n, event)| {
            let mut published = self.apart(&[event], guards).await;
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

/// Publishes a window of events, at most one of each aggregate, and awaits every confirm, for as long as
/// it is `allowed`. Publish again, over another channel, what has no fate.
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
    let work = window_of(sender, channel, window, guards);
    match tokio::time::timeout(TIMEOUT, work).await {
        Ok(published) => published,
        Err(_) => Published::nothing(window.len(), timeout()),
    }
}

async fn window_of(
    Sender { link, exchange, source }: Sender<'_>,
    channel: &Channel,
    window: &[&Event],
    guards: &Guards<'_>,
) -> Published {
    let mut fates = vec![None; window.len()];
    let mut confirms = VecDeque::with_capacity(window.len());
    let (mut ended, mut stuck) = (None, false);
    for (n, (event, fate)) in window.iter().zip(&mut fates).enumerate() {
        let carried = message(event, source).and_then(|(key, properties)| {
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
                *fate = Some(Fate::Refused { why: format!("AMQP cannot carry it: {why}"), certain: true });
                continue;
            }
        };
        if !(guards.allowed)() {
            ended = Some(BrokerError::NoLease);
            break;
        }
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let body = event.payload.as_bytes();
        let publishing = channel.basic_publish(exchange.clone(), key, options, body, properties);
        match tokio::time::timeout(STUCK, publishing).await {
            Ok(Ok(confirm)) => confirms.push_back((n, confirm)),
            Ok(Err(error)) => {
                ended = Some(failed(&error));
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
    let mut answers = Answers { fates, returned: Vec::new(), ended, heard: Instant::now() };
    let mut unanswered = answers.gather(link, confirms, guards).await;
    if !unanswered.is_empty() && answers.ended.is_none() {
        // What the broker acks together is not known at once: a return of the one may hang on another, whose answer is
        // only just coming.
        tokio::time::sleep(SETTLING).await;
        for (_, confirm) in &mut unanswered {
            if let Some(Ok(Confirmation::Ack(message) | Confirmation::Nack(message))) = confirm.now_or_never()
            {
                answers.returned.extend(message);
            }
        }
        // A few are silent themselves; more stop the connection, and with it those that are not. Elsewhere it was found
        // out which.
        if matches!(guards.stands_still, StandsStill::GiveUp(_)) && unanswered.len() <= MAX_UNANSWERED {
            for (n, _) in &unanswered {
                answers.fates[*n] = Some(Fate::Silent);
            }
        }
        answers.ended = Some(BrokerError::Silent(unanswered.len()));
    }
    if stuck {
        answers
            .ended
            .get_or_insert(BrokerError::Silent(answers.fates.iter().filter(|fate| fate.is_none()).count()));
    }
    let Answers { mut fates, mut returned, mut ended, .. } = answers;
    // A return can hang on the wrong confirm when the broker acks several at once; what it says by its message id is
    // certain. It always comes before the ack of its own message. After the channel has ended nothing more comes.
    if ended.is_none() {
        match channel.wait_for_confirms().await {
            Ok(messages) => returned.extend(messages),
            Err(error) => ended = Some(failed(&error)),
        }
    }
    match mark_returned(&mut fates, window, &returned) {
        Ok(()) => Published { fates, ended },
        Err(why) => Published::nothing(window.len(), why),
    }
}

/// Confirms that are awaited, with the numbers of their events in the window.
type Confirms = VecDeque<(usize, PublisherConfirm)>;

/// What the broker has answered of a window.
struct Answers {
    fates: Vec<Option<Fate>>,
    returned: Vec<BasicReturnMessage>,
    ended: Option<BrokerError>,
    /// When the last answer came.
    heard: Instant,
}

impl Answers {
    /// Awaits what is answered. Returns what is not, once the channel stands still.
    async fn gather(&mut self, link: &Link, mut confirms: Confirms, guards: &Guards<'_>) -> Confirms {
        self.heard = Instant::now();
        let mut look = pin!(tokio::time::sleep(LOOK));
        let (mut asked, mut asking) = (false, None::<BoxFuture<'_, Option<Fates>>>);
        while let Some((n, confirm)) = confirms.front_mut() {
            let told = async {
                match &mut asking {
                    Some(asking) => asking.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                confirmed = confirm => {
                    self.record(*n, confirmed, guards);
                    confirms.pop_front();
                }
                told = told => {
                    asking = None;
                    if let Some(told) = told {
                        self.sweep(&mut confirms, guards);
                        for (n, fate) in told {
                            self.fates[n].get_or_insert(fate);
                        }
                        break;
                    }
                }
                () = &mut look => {
                    self.sweep(&mut confirms, guards);
                    let still = self.heard.elapsed();
                    // A broker that is blocked reads nothing, and says so.
                    if still >= SILENCE && matches!(link.condition(), Ok(None)) {
                        match &guards.stands_still {
                            StandsStill::GiveUp(may) if may(still) => break,
                            StandsStill::Ask(ask) if !asked => {
                                asked = true;
                                asking = Some(ask(confirms.iter().map(|(n, _)| *n).collect()));
                            }
                            _ => {}
                        }
                    }
                    look.as_mut().reset(tokio::time::Instant::now() + LOOK);
                }
            }
        }
        confirms
    }

    /// Takes in what was answered behind what was not.
    fn sweep(&mut self, confirms: &mut Confirms, guards: &Guards<'_>) {
        for (n, mut confirm) in std::mem::take(confirms) {
            match (&mut confirm).now_or_never() {
                Some(confirmed) => self.record(n, confirmed, guards),
                None => confirms.push_back((n, confirm)),
            }
        }
    }

    fn record(&mut self, n: usize, confirmed: lapin::Result<Confirmation>, guards: &Guards<'_>) {
        if matches!(confirmed, Ok(Confirmation::Ack(_) | Confirmation::Nack(_))) {
            self.heard = Instant::now();
            (guards.heard)();
        }
        match confirmed {
            Ok(Confirmation::Ack(message)) => {
                self.returned.extend(message);
                self.fates[n] = Some(Fate::Confirmed);
            }
            Ok(Confirmation::Nack(message)) => {
                self.returned.extend(message);
                self.fates[n] = Some(Fate::Nacked);
            }
            Ok(Confirmation::NotRequested) => {
                self.ended = Some(BrokerError::Publish("the channel is not in confirm mode".to_owned()));
            }
            Err(error) => {
                // What was written after the broker had closed the channel knows only that it is closed. A confirm
                // knows why.
                let why = failed(&error);
                if self.ended.is_none() || matches!(why, BrokerError::Refused(_)) {
                    self.ended = Some(why);
                }
            }
        }
    }
}

/// What the broker ended the channel over, or anything else that went wrong.
fn failed(error: &lapin::Error) -> BrokerError {
    use AMQPHardError::{
        FRAMEERROR, INTERNALERROR, NOTALLOWED, NOTIMPLEMENTED, SYNTAXERROR, UNEXPECTEDFRAME,
    };
    use AMQPSoftError::{ACCESSREFUSED, CONTENTTOOLARGE, PRECONDITIONFAILED};
    if let ErrorKind::ProtocolError(amqp) = error.kind()
        && let AMQPErrorKind::Soft(PRECONDITIONFAILED | ACCESSREFUSED | CONTENTTOOLARGE)
        | AMQPErrorKind::Hard(
            FRAMEERROR | INTERNALERROR | NOTALLOWED | NOTIMPLEMENTED | SYNTAXERROR | UNEXPECTEDFRAME,
        ) = amqp.kind()
    {
        return BrokerError::Refused(amqp::without_users(amqp.get_message().as_str()));
    }
    BrokerError::Publish(amqp::describe(error))
}

fn mark_returned(
    fates: &mut [Option<Fate>],
    window: &[&Event],
    returned: &[BasicReturnMessage],
) -> Result<(), BrokerError> {
    let mut ids: HashSet<&str> = HashSet::with_capacity(returned.len());
    for message in returned {
        let id = message.delivery.properties.message_id().as_ref().map(ShortString::as_str);
        ids.insert(id.ok_or_else(|| BrokerError::Publish("a message came back without its id".to_owned()))?);
    }
    if ids.is_empty() {
        return Ok(());
    }
    for (fate, event) in fates.iter_mut().zip(window) {
        if ids.remove(event.id.to_string().as_str()) && *fate == Some(Fate::Confirmed) {
            *fate = Some(Fate::Unroutable);
        }
    }
    if ids.is_empty() {
        Ok(())
    } else {
        Err(BrokerError::Publish("a message came back that is not in the window".to_owned()))
    }
}
