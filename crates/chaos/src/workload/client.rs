//! A client that repeats each request, with the same key or for the same state, until it knows the outcome.

use std::{sync::Arc, time::Duration};

use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use serde_json::Value;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    addresses::Addresses,
    barrier::Barrier,
    history::{AcknowledgedWrite, History},
    model::{Change, Person, Request},
    violation::{Violation, Violations},
};

/// After this time without a response, the client repeats the request.
const TIMEOUT: Duration = Duration::from_secs(4);
/// The pause before a retry: the first one, and the longest.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// For how long a request without a response may still be executed: it may lie in a suspended program, or wait for a
/// connection or a lock, and each of these waits has its timeout.
pub(crate) const MAX_IN_FLIGHT: Duration = Duration::from_secs(30);

/// A cpf that this client alone writes to, and the person that has it.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(crate) cpf: i64,
    pub(crate) person: Option<Person>,
    /// A write whose outcome is unknown, and since when.
    pub(crate) in_doubt: Option<(Change, Instant)>,
    /// When the last `POST` without a response was sent. It must not reach a new person with the same cpf.
    pub(crate) unanswered_post: Option<Instant>,
    /// How many republishings of all persons this model allows for. Each raises the version once.
    pub(crate) baselines: u64,
}

/// One client.
#[derive(Debug)]
pub(crate) struct Client {
    http: reqwest::Client,
    addresses: Arc<Addresses>,
    pub(crate) barrier: Arc<Barrier>,
    violations: Arc<Violations>,
    pub(crate) random: Xoshiro256PlusPlus,
    pub(crate) history: History,
    /// The run is over: no more retries.
    give_up: CancellationToken,
}

/// What makes a request safe to repeat.
#[derive(Clone, Debug)]
enum Precondition {
    /// `Idempotency-Key`.
    IdempotencyKey(String),
    /// `If-Match`.
    IfMatch(String),
    /// Nothing: it is sent once.
    None,
}

/// The outcome of a request.
enum Outcome {
    Committed {
        id: Uuid,
        version: i64,
    },
    /// Nothing was stored, and a retry may succeed.
    Unavailable,
    /// It may have been stored.
    Unknown,
    /// 404, 409 or 412: nothing was stored by this request.
    Refused(u16),
    /// A response that breaks the contract.
    Wrong(String),
}

impl Client {
    pub(crate) fn new(
        (addresses, barrier): (Arc<Addresses>, Arc<Barrier>),
        violations: Arc<Violations>,
        seed: u64,
        give_up: CancellationToken,
    ) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder().timeout(TIMEOUT).no_proxy().build()?;
        let random = Xoshiro256PlusPlus::seed_from_u64(seed);
        Ok(Self { http, addresses, barrier, violations, random, history: History::default(), give_up })
    }

    /// Writes, and repeats the request until its outcome is known. A request that is not `safe` to repeat stays in doubt
    /// when there is no response.
    pub(crate) async fn write(&mut self, slot: &mut Slot, change: Change, safe: bool) {
        let request = change.request(slot.cpf, slot.person.as_ref());
        let precondition = match (&change, &slot.person) {
            (Change::Create { .. } | Change::Add(_), _) => {
                Precondition::IdempotencyKey(Uuid::from_u128(self.random.random()).to_string())
            }
            (_, Some(person)) if safe => Precondition::IfMatch(person.token()),
            _ => Precondition::None,
        };
        let inactive = slot.person.as_ref().is_some_and(|person| !person.active);
        let must_be_refused = inactive && matches!(change, Change::Add(_));
        let mut unknown = false;
        let mut pause = BACKOFF.0;
        loop {
            match self.send(&request, &precondition).await {
                Outcome::Committed { id, version } if !must_be_refused => {
                    return self.accept(slot, &change, id, version).await;
                }
                Outcome::Refused(409) if must_be_refused => return,
                // An earlier attempt has done it.
                Outcome::Refused(404 | 412)
                    if unknown && !matches!(precondition, Precondition::IdempotencyKey(_)) =>
                {
                    slot.in_doubt = Some((change, Instant::now()));
                    return self.find_out(slot).await;
                }
                // A baseline has raised the version.
                Outcome::Refused(412) if self.is_raised(slot).await => return,
                Outcome::Unavailable => {}
                Outcome::Unknown => {
                    if !unknown {
                        self.history.in_doubt += 1;
                    }
                    unknown = true;
                    if let Precondition::IdempotencyKey(_) = precondition {
                        slot.unanswered_post = Some(Instant::now());
                    }
                }
                Outcome::Committed { .. } => {
                    self.wrong(slot, &change, "an item was added to an inactive person");
                }
                Outcome::Refused(status) => self.wrong(slot, &change, &format!("refused with {status}")),
                Outcome::Wrong(why) => self.wrong(slot, &change, &why),
            }
            if unknown && matches!(precondition, Precondition::None) || self.give_up.is_cancelled() {
                slot.in_doubt = Some((change, Instant::now()));
                return;
            }
            self.history.retries += 1;
            self.give_up.run_until_cancelled(tokio::time::sleep(pause)).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    /// Applies an acknowledged write to the model.
    async fn accept(&mut self, slot: &mut Slot, change: &Change, id: Uuid, version: i64) {
        let before = slot.person.take();
        let expected = before.as_ref().map_or(1, |person| person.version + 1);
        let person = if let Some(person) = &before { person.id } else { id };
        let type_ = change.event(before.as_ref());
        self.history.acknowledged.push(AcknowledgedWrite {
            person,
            version,
            at_most: version,
            type_: type_.clone(),
            record: id,
        });
        slot.person = change.apply(before.as_ref(), id);
        if before.is_none() {
            slot.baselines = self.barrier.republishings().1;
        }
        let raised = u64::try_from(version - expected).ok().filter(|raised| *raised <= self.baselines(slot));
        if let (Some(raised), Some(person)) = (raised, &mut slot.person) {
            slot.baselines += raised;
            person.version = version;
        }
        if raised.is_none() {
            let doubled = version > expected;
            let found = if doubled { Violation::WriteDoubled } else { Violation::WriteLost };
            self.violations.add(
                found,
                format!(
                    "person {person}: {type_} was acknowledged with version {version} instead of {expected}"
                ),
            );
            // The model goes on from what is stored.
            if let Some(found) = self.read(slot.cpf).await {
                slot.person = found;
            }
        }
    }

    /// Reads the person, and so learns whether the write in doubt was done.
    pub(crate) async fn find_out(&mut self, slot: &mut Slot) {
        let Some(found) = self.read(slot.cpf).await else { return };
        let Some((change, _)) = slot.in_doubt.take() else { return };
        let (before, baselines) = (slot.person.as_ref(), self.baselines(slot));
        let mut raised = 0;
        if let Some((record, found_raised)) = change.leads_beside(before, found.as_ref(), baselines) {
            // A deletion hides the baselines before it.
            raised = if found.is_none() { i64::try_from(baselines).unwrap_or(0) } else { found_raised };
            let version = before.map_or(1, |person| person.version + 1);
            self.history.acknowledged.push(AcknowledgedWrite {
                person: found.as_ref().or(before).map(|person| person.id).unwrap_or_default(),
                version,
                at_most: version + raised,
                type_: change.event(before),
                record,
            });
        } else if let (Some(before), Some(found)) = (before, &found)
            && let Some(baselines) = before.baselines_to(found, baselines)
        {
            raised = i64::try_from(baselines).unwrap_or(0);
        } else if found.as_ref() != before {
            let id = before.or(found.as_ref()).map(|person| person.id).unwrap_or_default();
            self.violations.add(
                Violation::WriteWrong,
                format!(
                    "person {id} is neither as before nor as after {} (version {:?} of {:?})",
                    change.event(before),
                    found.as_ref().map(|person| person.version),
                    before.map(|person| person.version),
                ),
            );
        }
        if before.is_none() {
            slot.baselines = self.barrier.republishings().1;
        }
        slot.baselines += u64::try_from(raised).unwrap_or(0);
        slot.person = found;
    }

    /// How many baselines may have raised the person's version since the last write.
    fn baselines(&self, slot: &Slot) -> u64 {
        self.barrier.republishings().0.saturating_sub(slot.baselines)
    }

    /// Whether baselines alone have raised the person's version, which is learned then.
    async fn is_raised(&self, slot: &mut Slot) -> bool {
        if self.baselines(slot) == 0 {
            return false;
        }
        let found = self.read(slot.cpf).await.flatten();
        let at_most = self.baselines(slot);
        let (Some(person), Some(found)) = (&mut slot.person, found) else { return false };
        let Some(raised) = person.baselines_to(&found, at_most).filter(|raised| *raised > 0) else {
            return false;
        };
        slot.baselines += raised;
        *person = found;
        true
    }

    /// Stops while a database is replaced, and goes on with what the new one has.
    pub(crate) async fn rest(&mut self, slots: &mut [Slot]) {
        let barrier = Arc::clone(&self.barrier);
        barrier.finished().await;
        for slot in &mut *slots {
            if slot.in_doubt.is_some() {
                self.find_out(slot).await;
            }
            if slot.in_doubt.is_some() {
                let id = slot.person.as_ref().map(|person| person.id).unwrap_or_default();
                self.violations
                    .add(Violation::Unfinished, format!("the outcome of a write to {id} stayed unknown"));
            }
        }
        let mut history = std::mem::take(&mut self.history);
        history.persons = slots.iter().filter_map(|slot| slot.person.clone()).collect();
        let persons = barrier.resolved(history).await;
        for slot in slots {
            *slot = Slot {
                cpf: slot.cpf,
                person: persons.get(&slot.cpf).cloned(),
                in_doubt: None,
                unanswered_post: None,
                baselines: barrier.republishings().1,
            };
        }
    }

    /// Reads a person, and retries until there is a response. `None`: there was none until the end.
    async fn read(&self, cpf: i64) -> Option<Option<Person>> {
        let url = format!("{}/person/{cpf}", self.addresses.person_api);
        while !self.give_up.is_cancelled() {
            if let Ok(response) = self.http.get(&url).send().await {
                let version = version(&response);
                match response.status().as_u16() {
                    404 => return Some(None),
                    200 => {
                        if let (Some(version), Ok(body)) = (version, response.json::<Value>().await) {
                            match Person::read(&body, version) {
                                Ok(person) => return Some(Some(person)),
                                Err(error) => {
                                    self.violations
                                        .add(Violation::WriteWrong, format!("GET of a person: {error}"));
                                    return None;
                                }
                            }
                        }
                    }
                    _ => {}
                }
            }
            tokio::time::sleep(BACKOFF.0).await;
        }
        None
    }

    /// Reads the score with the token of the last write, if it is there within a second.
    pub(crate) async fn read_score(&mut self, slot: &Slot) {
        let Some(person) = &slot.person else { return };
        let url = format!(
            "{}/{}/score?after=%22{}.{}%22&wait=1s",
            self.addresses.score_api, person.cpf, person.id, person.version
        );
        let Ok(response) = self.http.get(&url).send().await else { return };
        let status = response.status().as_u16();
        let Ok(body) = response.json::<Value>().await else { return };
        let read = match status {
            200 => body["score"].as_number().map(ToString::to_string),
            503 => return,
            other => Some(format!("status {other}")),
        };
        self.history.reads += 1;
        if read.as_deref() != Some(person.score().to_string().as_str()) {
            self.violations.add(
                Violation::ReadWrong,
                format!(
                    "person {} at version {}: {read:?} instead of {}",
                    person.id,
                    person.version,
                    person.score()
                ),
            );
        }
    }

    async fn send(&self, request: &Request, precondition: &Precondition) -> Outcome {
        let url = format!("{}{}", self.addresses.person_api, request.path);
        let mut builder = self.http.request(request.method.clone(), url);
        if let Some(body) = &request.body {
            builder = builder.header("content-type", "application/json").body(body.clone());
        }
        builder = match precondition {
            Precondition::IdempotencyKey(key) => builder.header("idempotency-key", format!("\"{key}\"")),
            Precondition::IfMatch(token) => builder.header("if-match", token),
            Precondition::None => builder,
        };
        let Ok(response) = builder.send().await else { return Outcome::Unknown };
        let (status, version) = (response.status().as_u16(), version(&response));
        let Ok(body) = response.json::<Value>().await else { return Outcome::Unknown };
        let problem = body["type"].as_str().map(|type_| type_.trim_start_matches("/problems/"));
        match (status, problem, version, body["id"].as_str()) {
            (200 | 201, _, Some(version), Some(id)) => match id.parse() {
                Ok(id) => Outcome::Committed { id, version },
                Err(_) => Outcome::Wrong("the id in the response is no UUID".to_owned()),
            },
            // Every other 503 says that nothing was stored.
            (503, Some("outcome-unknown"), ..) => Outcome::Unknown,
            (408 | 503, Some(_), ..) => Outcome::Unavailable,
            (404 | 409 | 412, ..) => Outcome::Refused(status),
            (status, problem, ..) => Outcome::Wrong(format!("responded {status} {}", problem.unwrap_or("?"))),
        }
    }

    fn wrong(&self, slot: &Slot, change: &Change, why: &str) {
        let person = slot.person.as_ref();
        let (id, type_) = (person.map(|person| person.id).unwrap_or_default(), change.event(person));
        self.violations.add(Violation::WriteWrong, format!("person {id}: {type_}: {why}"));
    }
}

/// The version in a response's `ETag`, which is `"<person>.<version>"`.
fn version(response: &reqwest::Response) -> Option<i64> {
    let etag = response.headers().get("etag")?.to_str().ok()?;
    etag.trim_matches('"').rsplit_once('.')?.1.parse().ok()
}
