//! A look at the broker: is each expected queue there, consumed from, and bound?

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use amqp::{Bindings, Coverage, Management, ManagementError, QueueState};
use daemon::command::many;

use super::{Expectation, Subscribers, passive::Passive};

/// No longer is thought about bindings in one look; a few patterns take milliseconds.
const LONGEST: Duration = Duration::from_secs(5);
/// The exchange of subscribers that follow versions.
const BY_AGGREGATE: &str = ".by_aggregate";

/// What is wrong with a queue, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What was found.
    pub finding: String,
    /// What to do about it.
    pub advice: String,
}

/// What was found of an expected queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its name.
    pub queue: String,
    /// How many consume from it, if that is known.
    pub consumers: Option<u64>,
    /// How many messages it has, if that is known.
    pub messages: Option<u64>,
    /// What is wrong.
    pub faults: Vec<Fault>,
    /// What is as it should be, or cannot be known, for people.
    pub known: String,
}

/// What a look has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Looked {
    /// Each expected queue, in the order of the setting.
    pub found: Vec<Found>,
    /// Why the management API could not be asked, if it should have been.
    pub management: Option<Fault>,
}

/// What is known of a queue.
pub(super) enum State {
    Exists(QueueState),
    Missing,
    /// Exists, for one connection alone.
    Exclusive,
    /// Nothing, for this reason.
    Unknown(Fault),
}

impl Subscribers {
    /// Looks. An error says why the broker cannot be asked at all.
    pub async fn look(&self, passive: &mut Passive) -> Result<Looked, String> {
        let refused = match &self.management {
            Some(management) => match self.ask(management).await {
                Ok(found) => {
                    // Asking is all that it takes.
                    passive.close().await;
                    return Ok(Looked { found, management: None });
                }
                Err(error) => Some((management, error)),
            },
            None => None,
        };
        let states = passive.states(self).await?;
        let unknown = match &refused {
            Some(_) => "whether it is bound is not known: the management API cannot be asked",
            None => "whether it is bound is not known: MANAGEMENT_URL (or MANAGEMENT_URL_FILE) is not set",
        };
        let of = self.expectations.iter().zip(states);
        let found = of.map(|(expectation, state)| self.found(expectation, state, None, unknown)).collect();
        let management = refused.map(|(management, error)| Fault {
            finding: format!(
                "RabbitMQ's management API at {} cannot be asked, so it is not known whether the expected queues are \
                 bound: {error}",
                management.address()
            ),
            advice: "mend MANAGEMENT_URL, or see whether the plugin rabbitmq_management is enabled there".to_owned(),
        });
        Ok(Looked { found, management })
    }

    /// By the management API.
    async fn ask(&self, management: &Management) -> Result<Vec<Found>, ManagementError> {
        let vhost = self.virtual_host();
        // Without the exchange nothing is bound.
        let bindings = management.bindings(vhost, self.exchange.as_str()).await?;
        let expectations = self.expectations.clone();
        // Others bind what they like, and this thread has events to publish.
        let coverage = tokio::task::spawn_blocking(move || coverage(bindings.as_ref(), &expectations)).await;
        let coverage = coverage.map_err(|error| ManagementError::Response(error.to_string()))?;
        let mut found = Vec::new();
        for (expectation, coverage) in self.expectations.iter().zip(&coverage) {
            let state = match management.queue(vhost, &expectation.queue).await? {
                Some(queue) => State::Exists(queue),
                None => State::Missing,
            };
            found.push(self.found(expectation, state, Some((management, coverage)), ""));
        }
        Ok(found)
    }

    /// What follows from the queue's state, and from its bindings where they are known.
    fn found(
        &self,
        expectation: &Expectation,
        state: State,
        bound: Option<(&Management, &BTreeMap<String, Coverage>)>,
        unknown: &str,
    ) -> Found {
        let queue = &expectation.queue;
        let vhost = escape::shell_word(self.virtual_host()).into_owned();
        let mut faults = Vec::new();
        let mut known = Vec::new();
        let (mut consumers, mut messages) = (None, None);
        let mut bindings = bound;
        match state {
            State::Missing => {
                bindings = None;
                faults.push(Fault {
                    finding: format!("the queue {queue} does not exist in the virtual host {vhost}"),
                    advice: format!(
                        "start its subscriber, which declares and binds it; or declare it (durable), and bind it to {} \
                         with {}",
                        self.exchange,
                        expectation.types.join(", ")
                    ),
                });
            }
            State::Exclusive => {
                known.push(
                    "it belongs to one connection alone, so its consumers cannot be counted".to_owned(),
                );
            }
            // A look that sees nothing would be taken for good news.
            State::Unknown(fault) => faults.push(fault),
            State::Exists(state) => {
                (consumers, messages) = (state.consumers, state.messages);
                let waiting = messages.map(|messages| many(messages, "message"));
                let waiting = waiting.as_deref().unwrap_or("an unknown number of messages");
                if consumers == Some(0) {
                    faults.push(Fault {
                        finding: format!("nothing consumes from the queue {queue}, which has {waiting}"),
                        advice: format!(
                            "start its subscriber, or see why it does not consume: rabbitmqctl list_consumers -p \
                             {vhost}"
                        ),
                    });
                } else {
                    let consumers = consumers.map(|consumers| many(consumers, "consumer"));
                    let consumers = consumers.as_deref().unwrap_or("an unknown number of consumers");
                    known.push(format!("{consumers}, {waiting}"));
                }
            }
        }
        match bindings {
            Some((management, coverage)) => self.judge(management, queue, coverage, &mut faults, &mut known),
            None if !unknown.is_empty() => known.push(unknown.to_owned()),
            None => {}
        }
        Found { queue: queue.clone(), consumers, messages, faults, known: known.join("; ") }
    }

    /// Whether it gets what it should.
    fn judge(
        &self,
        management: &Management,
        queue: &str,
        coverage: &BTreeMap<String, Coverage>,
        faults: &mut Vec<Fault>,
        known: &mut Vec<String>,
    ) {
        let exchange = &self.exchange;
        let mut missing = Vec::new();
        for (type_, coverage) in coverage {
            match coverage {
                Coverage::All => known.push(format!("it gets {type_}")),
                Coverage::Perhaps => known.push(format!(
                    "it gets {type_} as far as is known (by headers, or by an exchange that chooses)"
                )),
                Coverage::TooMany => {
                    known.push(format!("whether it gets {type_} is not known: too many bindings"));
                }
                Coverage::Misses(key) => missing.push((type_, key)),
            }
        }
        let Some((first, _)) = missing.first() else { return };
        let named = |(type_, key): &(&String, &String)| {
            if type_ == key { (*type_).clone() } else { format!("{type_} (such as {key})") }
        };
        let types: Vec<String> = missing.iter().map(named).collect();
        let url = management.binding_url(self.virtual_host(), exchange.as_str(), queue);
        let body = serde_json::json!({"routing_key": first}).to_string();
        let more = if missing.len() > 1 { ", and the same for each other type" } else { "" };
        faults.push(Fault {
            finding: format!(
                "the queue {queue} is not bound to get {} from the exchange {exchange}, so it misses these events",
                types.join(", ")
            ),
            advice: format!(
                "start its subscriber, if it binds its queue itself (to {exchange} by type, or to \
                 {exchange}{BY_AGGREGATE} by aggregate_type); or bind it: curl -u USER -H content-type:application/json \
                 -d {} {}{more}. What it has missed is published to it by: outbox-relay replay --to-queue {}",
                escape::shell_word(&body),
                escape::shell_word(&url),
                escape::shell_word(queue)
            ),
        });
    }
}

/// What each queue gets of its types.
fn coverage(bindings: Option<&Bindings>, expectations: &[Expectation]) -> Vec<BTreeMap<String, Coverage>> {
    let begin = Instant::now();
    let of_type = |queue: &str, type_: &String| {
        let coverage = match bindings {
            Some(_) if begin.elapsed() > LONGEST => Coverage::TooMany,
            Some(bindings) => bindings.cover(type_, queue),
            None => Coverage::Misses(type_.clone()),
        };
        (type_.clone(), coverage)
    };
    let of_queue = |Expectation { queue, types }: &Expectation| {
        types.iter().map(|type_| of_type(queue, type_)).collect()
    };
    expectations.iter().map(of_queue).collect()
}

impl Fault {
    /// For people, in a line.
    pub fn text(&self) -> String {
        format!("{}; {}", self.finding, self.advice)
    }
}

impl Looked {
    /// All that is wrong.
    pub fn faults(&self) -> impl Iterator<Item = &Fault> {
        self.management.iter().chain(self.found.iter().flat_map(|found| &found.faults))
    }
}
