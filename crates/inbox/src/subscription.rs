use std::{future::Future, time::Duration};

use futures_util::{FutureExt, StreamExt};
use lapin::{
    Channel, Connection,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
        BasicRejectOptions,
    },
    types::{FieldTable, ShortString},
};
use tokio_util::sync::CancellationToken;

use crate::{Envelope, Handler, Interrupted, Sequencer, stall::StallDetector};

/// How long the broker may take for one answer.
const ANSWER: Duration = Duration::from_secs(10);
/// A transaction takes no further message when the bodies of those that it has are as large as this together.
const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// From this many returns on, the third delivery, a message is taken alone: it may be what ends its
/// consumers, and then the others need not come back with it.
const SUSPECT: i64 = 2;

/// Why consuming ended, and who has to be waited for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    Broker(String),
    Database(String),
    /// The handler is broken, as far as one can tell.
    Handler(String),
}

impl Trouble {
    pub(crate) fn reason(&self) -> &str {
        match self {
            Self::Broker(reason) | Self::Database(reason) | Self::Handler(reason) => reason,
        }
    }
}

impl From<lapin::Error> for Trouble {
    fn from(error: lapin::Error) -> Self {
        Self::Broker(amqp::describe(&error))
    }
}

impl From<amqp::Unreachable> for Trouble {
    fn from(unreachable: amqp::Unreachable) -> Self {
        Self::Broker(unreachable.to_string())
    }
}

/// Waits for the broker's answer, but not for ever.
pub(crate) async fn answer<T>(call: impl Future<Output = lapin::Result<T>>) -> Result<T, Trouble> {
    match tokio::time::timeout(ANSWER, call).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(Trouble::Broker(format!("the broker did not answer within {ANSWER:?}"))),
    }
}

/// One queue's messages on a channel of their own, so that a contiguous stretch of delivery tags is
/// acknowledged at once.
pub(crate) struct Subscription {
    channel: Channel,
    deliveries: lapin::Consumer,
    /// How many messages one transaction takes at most.
    batch: usize,
    /// Whether it is the queue of the dead letters.
    dead: bool,
    /// A message that was received, but has to wait for its own transaction.
    suspect: Option<Delivery>,
}

impl Subscription {
    /// Subscribes. The broker sends at most twice the batch ahead, so that the next batch is there when
    /// one is committed; that also bounds the memory.
    pub(crate) async fn open(
        connection: &Connection,
        queue: &ShortString,
        batch: u16,
        dead: bool,
    ) -> Result<Self, Trouble> {
        let channel = answer(connection.create_channel()).await?;
        // Whatever is dead-lettered is suspect: one at a time.
        let (batch, ahead) = if dead { (1, 1) } else { (batch, batch.saturating_mul(2)) };
        answer(channel.basic_qos(ahead, BasicQosOptions::default())).await?;
        let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
        let deliveries = answer(channel.basic_consume(queue.clone(), "".into(), options, arguments)).await?;
        Ok(Self { channel, deliveries, batch: batch.max(1).into(), dead, suspect: None })
    }

    /// Applies what comes, until `stop` or trouble. `progress` is called after each batch.
    pub(crate) async fn run<H: Handler>(
        mut self,
        sequencer: &Sequencer<H>,
        stop: &CancellationToken,
        stall: &StallDetector,
        progress: impl Fn(),
    ) -> Result<(), Trouble> {
        let ended = loop {
            match self.next_batch(stop).await {
                Ok(Some(batch)) => {
                    stall.begin();
                    match self.settle(sequencer, stall, batch).await {
                        Ok(()) => {
                            stall.settled();
                            progress();
                        }
                        Err(trouble) => {
                            stall.interrupted(trouble.reason());
                            break Err(trouble);
                        }
                    }
                }
                Ok(None) => break Ok(()),
                Err(trouble) => break Err(trouble),
            }
        };
        let ended = match ended {
            // A call on a channel that is closed says no more than that; the stream knows why.
            Err(Trouble::Broker(reason)) => Err(Trouble::Broker(self.why().unwrap_or(reason))),
            ended => ended,
        };
        self.close().await;
        ended
    }

    /// The error that ended the stream, behind what was received before.
    fn why(&mut self) -> Option<String> {
        while let Some(Some(next)) = self.deliveries.next().now_or_never() {
            if let Err(error) = next {
                return Some(amqp::describe(&error));
            }
        }
        None
    }

    /// Waits for a message and takes those that are there already. None when asked to stop.
    async fn next_batch(&mut self, stop: &CancellationToken) -> Result<Option<Vec<Delivery>>, Trouble> {
        if let Some(suspect) = self.suspect.take() {
            return Ok(Some(vec![suspect]));
        }
        let Some(first) = stop.run_until_cancelled(self.deliveries.next()).await else { return Ok(None) };
        let first = delivered(first)?;
        let mut all = vec![first];
        while all.len() < self.batch && bytes(&all) < BATCH_BYTES && !is_suspect(&all[0]) {
            let Some(next) = self.deliveries.next().now_or_never() else { break };
            // Trouble now is trouble for those received, too: without the channel nothing can be
            // acknowledged, and they come again.
            let next = delivered(next)?;
            if is_suspect(&next) {
                self.suspect = Some(next);
                break;
            }
            all.push(next);
        }
        Ok(Some(all))
    }

    /// Commits, then acknowledges what was committed, all at once.
    async fn settle<H: Handler>(
        &self,
        sequencer: &Sequencer<H>,
        stall: &StallDetector,
        batch: Vec<Delivery>,
    ) -> Result<(), Trouble> {
        let tags: Vec<u64> = batch.iter().map(|delivery| delivery.delivery_tag).collect();
        let suspect = self.dead || batch.first().is_some_and(is_suspect);
        let messages: Vec<Envelope> = batch.into_iter().map(Envelope::from).collect();
        let applied = match messages.as_slice() {
            [message] if suspect => sequencer.attempt(message).await,
            messages => sequencer.apply(messages).await,
        };
        let settled = applied.as_ref().map_or_else(|interrupted| interrupted.settled, |_| tags.len());
        if let Some(last) = settled.checked_sub(1).and_then(|last| tags.get(last)) {
            stall.settled();
            answer(self.channel.basic_ack(*last, BasicAckOptions { multiple: true })).await?;
        }
        if let Some(reason) = sequencer.broken() {
            return Err(Trouble::Handler(reason));
        }
        let Err(Interrupted { reason, refused, .. }) = applied else { return Ok(()) };
        if let Some(culprit) = tags.get(settled).filter(|_| refused) {
            // A reject counts as a failed delivery where a nack does not (RabbitMQ 4), so a message that
            // the database will not have ends among the dead letters.
            answer(self.channel.basic_reject(*culprit, BasicRejectOptions { requeue: true })).await?;
        }
        Err(Trouble::Database(reason))
    }

    /// Takes nothing more and gives back what was not settled. Best effort: the broker does the same
    /// when the channel is gone.
    async fn close(self) {
        let end = async {
            self.channel.basic_cancel(self.deliveries.tag(), BasicCancelOptions::default()).await?;
            // Tag 0 stands for everything outstanding.
            self.channel.basic_nack(0, BasicNackOptions { multiple: true, requeue: true }).await?;
            self.channel.close(200, "bye".into()).await
        };
        if let Err(trouble) = answer(end).await {
            tracing::debug!(?trouble, "a subscription was not closed in order");
        }
    }
}

/// The end of the stream is a `basic.cancel` from the broker; the channel is still open then.
fn delivered(next: Option<lapin::Result<Delivery>>) -> Result<Delivery, Trouble> {
    match next {
        Some(delivery) => Ok(delivery?),
        None => Err(Trouble::Broker(
            "the broker cancelled the subscription: the queue was deleted, or a message was not acknowledged \
             within the broker's consumer_timeout"
                .into(),
        )),
    }
}

/// How large the bodies are together.
fn bytes(batch: &[Delivery]) -> usize {
    batch.iter().map(|delivery| delivery.data.len()).sum()
}

fn is_suspect(delivery: &Delivery) -> bool {
    crate::message::returned(&delivery.properties) >= SUSPECT
}
