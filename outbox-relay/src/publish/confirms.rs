//! What the broker answers to a window: confirms, returned messages, and the error that ends the channel.

use std::{
    collections::{HashSet, VecDeque},
    pin::pin,
    time::{Duration, Instant},
};

use futures_util::{FutureExt, future::BoxFuture};
use lapin::{
    Confirmation, ErrorKind, PublisherConfirm,
    message::BasicReturnMessage,
    protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError},
    types::ShortString,
};

use super::{Fate, Fates, Guards, OnStall, SILENCE};
use crate::{broker::Link, condition::BrokerError, event::Event};

/// How often to look whether anything was answered.
const LOOK: Duration = Duration::from_millis(200);

/// Confirms that are awaited, with the numbers of their events in the window.
pub(super) type Outstanding = VecDeque<(usize, PublisherConfirm)>;

/// What the broker has answered of a window.
pub(super) struct Confirms {
    pub(super) fates: Vec<Option<Fate>>,
    pub(super) returned: Vec<BasicReturnMessage>,
    pub(super) ended: Option<BrokerError>,
    /// When the last answer came.
    pub(super) heard: Instant,
}

impl Confirms {
    /// Awaits what is answered. Returns what is not, once the channel stands still.
    pub(super) async fn gather(
        &mut self,
        link: &Link,
        mut outstanding: Outstanding,
        guards: &Guards<'_>,
    ) -> Outstanding {
        self.heard = Instant::now();
        let mut look = pin!(tokio::time::sleep(LOOK));
        let (mut asked, mut asking) = (false, None::<BoxFuture<'_, Option<Fates>>>);
        while let Some((n, confirm)) = outstanding.front_mut() {
            let found_out = async {
                match &mut asking {
                    Some(asking) => asking.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                confirmed = confirm => {
                    self.record(*n, confirmed, guards);
                    outstanding.pop_front();
                }
                found_out = found_out => {
                    asking = None;
                    if let Some(found_out) = found_out {
                        self.sweep(&mut outstanding, guards);
                        for (n, fate) in found_out {
                            self.fates[n].get_or_insert(fate);
                        }
                        break;
                    }
                }
                () = &mut look => {
                    self.sweep(&mut outstanding, guards);
                    let still = self.heard.elapsed();
                    // A broker that is blocked reads nothing, and says so.
                    if still >= SILENCE && matches!(link.condition(), Ok(None)) {
                        match &guards.on_stall {
                            OnStall::GiveUp(may) if may(still) => break,
                            OnStall::Ask(ask) if !asked => {
                                asked = true;
                                asking = Some(ask(outstanding.iter().map(|(n, _)| *n).collect()));
                            }
                            _ => {}
                        }
                    }
                    look.as_mut().reset(tokio::time::Instant::now() + LOOK);
                }
            }
        }
        outstanding
    }

    /// Takes in what was answered behind what was not.
    fn sweep(&mut self, outstanding: &mut Outstanding, guards: &Guards<'_>) {
        for (n, mut confirm) in std::mem::take(outstanding) {
            match (&mut confirm).now_or_never() {
                Some(confirmed) => self.record(n, confirmed, guards),
                None => outstanding.push_back((n, confirm)),
            }
        }
    }

    fn record(&mut self, n: usize, confirmed: lapin::Result<Confirmation>, guards: &Guards<'_>) {
        if matches!(confirmed, Ok(Confirmation::Ack(_) | Confirmation::Nack(_))) {
            self.heard = Instant::now();
            (guards.on_confirm)();
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
                let why = broker_error(&error);
                if self.ended.is_none() || matches!(why, BrokerError::Refused { .. }) {
                    self.ended = Some(why);
                }
            }
        }
    }
}

/// What the broker ended the channel over, or anything else that went wrong.
pub(super) fn broker_error(error: &lapin::Error) -> BrokerError {
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
        let internal = matches!(amqp.kind(), AMQPErrorKind::Hard(INTERNALERROR));
        return BrokerError::Refused { why: amqp::without_users(amqp.get_message().as_str()), internal };
    }
    BrokerError::Publish(amqp::describe(error))
}

pub(super) fn mark_returned(
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
