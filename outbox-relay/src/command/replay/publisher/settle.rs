//! What becomes of the windows that lanes have published: what is settled, what is tried again, and when that is in vain.

use std::time::Instant;

use anyhow::bail;

use super::{Outcome, Patience, Publisher};
use crate::{
    condition::BrokerError,
    event::Event,
    lane::Report,
    publish::{Fate, Proof, Published},
    queue::Window,
};

/// How many times in a row retries may be in vain before the replay ends.
const ATTEMPTS: usize = 8;

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
    pub(super) async fn take_in(
        &mut self,
        lane: usize,
        report: Report,
        outcome: &mut Outcome,
    ) -> anyhow::Result<()> {
        let (window, round) = match report {
            Report::State(state) => {
                self.lanes[lane].trouble = state.err();
                return Ok(());
            }
            // It begins with a connection here.
            Report::Asleep => return Ok(()),
            Report::Published(window, published, _) => {
                self.lanes[lane].under_way -= 1;
                let round = self.settle(&window, published, outcome).await?;
                (window, round)
            }
            Report::Returned(window) => {
                self.lanes[lane].under_way -= 1;
                let why = self.lanes[lane].trouble.clone();
                let round = self.put_back(&window, why).await;
                (window, round)
            }
        };
        self.patience.judge(&round, window.published)
    }

    /// Takes out what is settled of a window.
    async fn settle(
        &mut self,
        window: &Window,
        Published { fates, ended }: Published,
        outcome: &mut Outcome,
    ) -> anyhow::Result<Round> {
        let mut round = Round { tried: false, taken: false, why: None };
        let mut failed = None;
        let mut unknown = Vec::new();
        for (item, fate) in window.items.iter().zip(fates) {
            let event = &*item.event;
            let tried = self.pool.was_tried(event);
            round.tried |= tried;
            match fate {
                Some(Fate::Unroutable) if self.one_queue.is_some() => {
                    self.pool.again(event, &mut self.budget);
                    failed = Some(anyhow::anyhow!("the queue is gone"));
                }
                Some(fate @ (Fate::Confirmed | Fate::Unroutable)) => {
                    round.taken |= tried;
                    if tried {
                        self.budget.succeeded(event.size());
                    }
                    outcome.refused_in_a_row = None;
                    if fate == Fate::Confirmed {
                        outcome.events += 1;
                        self.pool.publish(event);
                    } else {
                        outcome.unroutable += 1;
                    }
                    self.pool.settle(event);
                }
                // It may have been this event, or an operator who closed all channels.
                Some(Fate::Refused { why, proof: Proof::Internal }) => {
                    self.again_alone(event);
                    round.why = Some(format!("the broker closed the channel of event {}: {why}", event.id));
                }
                Some(Fate::Refused { why, proof }) => {
                    // What was not sent has cost the broker nothing, and says nothing of others.
                    if proof != Proof::Certain {
                        self.budget.failed();
                        failed = outcome.refused(event, &why).err().or(failed);
                    }
                    tracing::warn!(event = %event.id, why, "not replayed");
                    outcome.refused += 1;
                    self.pool.settle(event);
                }
                Some(Fate::Nacked) => {
                    self.pool.again(event, &mut self.budget);
                    round.why = Some(format!(
                        "the broker refuses event {} of type {} for now; is a queue at its limit?",
                        event.id, event.type_
                    ));
                }
                Some(Fate::Silent) => {
                    self.pool.again(event, &mut self.budget);
                    round.why = Some(format!(
                        "the broker does not answer for event {} of type {}; has a queue lost the majority of its \
                         nodes?",
                        event.id, event.type_
                    ));
                }
                None => unknown.push(event),
            }
        }
        // Which event it is, is found out one by one: also where one of several may have ended the connection again.
        let suspect = match &ended {
            Some(BrokerError::Refused { .. }) => true,
            None | Some(BrokerError::Silent(_)) => false,
            Some(_) => round.tried,
        };
        for event in &unknown {
            if suspect { self.again_alone(event) } else { self.pool.again(event, &mut self.budget) }
        }
        match ended {
            Some(BrokerError::Refused { why, .. }) if !unknown.is_empty() => {
                round.why = Some(format!("the broker refused: {why}"));
            }
            None | Some(BrokerError::Refused { .. }) => {}
            Some(error @ BrokerError::Silent(_)) => {
                round.why.get_or_insert_with(|| error.to_string());
            }
            Some(error) => {
                round.why = Some(error.to_string());
                self.restore().await;
            }
        }
        failed.map_or(Ok(round), Err)
    }

    fn again_alone(&mut self, event: &Event) {
        self.pool.suspect(event);
        self.pool.again(event, &mut self.budget);
    }

    /// The lane has not begun a window.
    async fn put_back(&mut self, window: &Window, why: Option<String>) -> Round {
        let mut round = Round { tried: false, taken: false, why };
        for item in &window.items {
            round.tried |= self.pool.was_tried(&item.event);
            self.pool.again(&item.event, &mut self.budget);
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
}

impl Patience {
    /// What came of a window that went out after so many pauses. An error when retries were in vain for long.
    fn judge(&mut self, round: &Round, after: u64) -> anyhow::Result<()> {
        if round.taken {
            self.rounds = 0;
            self.pause.reset();
        }
        let Some(why) = &round.why else { return Ok(()) };
        if after < self.pauses {
            return Ok(());
        }
        if round.tried && !round.taken {
            self.rounds += 1;
        }
        if self.rounds > ATTEMPTS {
            bail!("{why}");
        }
        if !round.taken {
            self.pauses += 1;
            self.until = Instant::now() + self.pause.step();
        }
        Ok(())
    }
}
