//! A client that wants to be sure: it asks again, with the same key or for the same state, until it knows.

use std::{sync::Arc, time::Duration};

use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use serde_json::Value;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    addresses::Addresses,
    history::{Acknowledged, Told},
    model::{Change, Person},
    verdict::{Charge, Findings},
};

/// An answer takes no longer, or the client asks again.
const TIMEOUT: Duration = Duration::from_secs(4);
/// The pause before another try, at first and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// A request whose answer never came may still be carried out for as long: it lies in a stopped program, or
/// waits for a connection or a lock, each of which has its limit.
pub(crate) const GHOST: Duration = Duration::from_secs(30);

/// Somebody's record, which this client alone writes to.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(crate) cpf: i64,
    pub(crate) person: Option<Person>,
    /// A write of which it is not known yet whether it was done, and since when.
    pub(crate) doubt: Option<(Change, Instant)>,
    /// When the last `POST` was sent whose answer never came. It must not meet another life of the cpf.
    pub(crate) ghost: Option<Instant>,
}

/// One client.
#[derive(Debug)]
pub(crate) struct Client {
    http: reqwest::Client,
    addresses: Arc<Addresses>,
    findings: Arc<Findings>,
    pub(crate) random: Xoshiro256PlusPlus,
    pub(crate) told: Told,
    /// Nothing is waited for any more.
    give_up: CancellationToken,
}

/// What makes a request safe to send again.
#[derive(Clone, Debug)]
enum Condition {
    /// `Idempotency-Key`.
    Key(String),
    /// `If-Match`.
    State(String),
    /// Nothing does.
    None,
}

/// What came of sending a request.
enum Answer {
    Done {
        id: Uuid,
        version: i64,
    },
    /// Nothing was stored, and another try may do better.
    NotNow,
    /// Nobody knows.
    Unsure,
    /// 404, 409 or 412: there is nothing to do, or not any more.
    Refused(u16),
    Wrong(String),
}

impl Client {
    pub(crate) fn new(
        addresses: Arc<Addresses>,
        findings: Arc<Findings>,
        seed: u64,
        give_up: CancellationToken,
    ) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder().timeout(TIMEOUT).no_proxy().build()?;
        let random = Xoshiro256PlusPlus::seed_from_u64(seed);
        Ok(Self { http, addresses, findings, random, told: Told::default(), give_up })
    }

    /// Writes, and asks again until it knows what became of it; unless the request is not `safe` to send
    /// again, which stays in doubt then.
    pub(crate) async fn write(&mut self, slot: &mut Slot, change: Change, safe: bool) {
        let request = change.request(slot.cpf, slot.person.as_ref());
        let condition = match (&change, &slot.person) {
            (Change::Create { .. } | Change::Add(_), _) => {
                Condition::Key(Uuid::from_u128(self.random.random()).to_string())
            }
            (_, Some(person)) if safe => Condition::State(person.token()),
            _ => Condition::None,
        };
        let inactive = slot.person.as_ref().is_some_and(|person| !person.active);
        let refused_at_all = inactive && matches!(change, Change::Add(_));
        let mut unsure = false;
        let mut pause = BACKOFF.0;
        loop {
            match self.send(&request, &condition).await {
                Answer::Done { id, version } if !refused_at_all => {
                    return self.accept(slot, &change, id, version).await;
                }
                Answer::Refused(409) if refused_at_all => return,
                // An earlier try has done it.
                Answer::Refused(404 | 412) if unsure && !matches!(condition, Condition::Key(_)) => {
                    slot.doubt = Some((change, Instant::now()));
                    return self.find_out(slot).await;
                }
                Answer::NotNow => {}
                Answer::Unsure => {
                    if !unsure {
                        self.told.in_doubt += 1;
                    }
                    unsure = true;
                    if let Condition::Key(_) = condition {
                        slot.ghost = Some(Instant::now());
                    }
                }
                Answer::Done { .. } => self.wrong(slot, &change, "an item was given to an inactive person"),
                Answer::Refused(status) => self.wrong(slot, &change, &format!("refused with {status}")),
                Answer::Wrong(why) => self.wrong(slot, &change, &why),
            }
            if unsure && matches!(condition, Condition::None) || self.give_up.is_cancelled() {
                slot.doubt = Some((change, Instant::now()));
                return;
            }
            self.told.retries += 1;
            self.give_up.run_until_cancelled(tokio::time::sleep(pause)).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    /// Takes in what was acknowledged.
    async fn accept(&mut self, slot: &mut Slot, change: &Change, id: Uuid, version: i64) {
        let before = slot.person.take();
        let expected = before.as_ref().map_or(1, |person| person.version + 1);
        let person = if let Some(person) = &before { person.id } else { id };
        let type_ = change.event(before.as_ref());
        self.told.acknowledged.push(Acknowledged { person, version, type_: type_.clone(), record: id });
        slot.person = change.apply(before.as_ref(), id);
        if version != expected {
            let doubled = version > expected;
            let found = if doubled { Charge::WriteDoubled } else { Charge::WriteLost };
            self.findings.add(
                found,
                format!("person {person}: {type_} was answered with version {version} instead of {expected}"),
            );
            // From here on with what is there.
            if let Some(found) = self.read(slot.cpf).await {
                slot.person = found;
            }
        }
    }

    /// Reads what there is, and so learns whether the write in doubt was done.
    pub(crate) async fn find_out(&mut self, slot: &mut Slot) {
        let Some(found) = self.read(slot.cpf).await else { return };
        let Some((change, _)) = slot.doubt.take() else { return };
        let before = slot.person.as_ref();
        if let Some(record) = change.leads(before, found.as_ref()) {
            let version = found.as_ref().or(before).map_or(0, |person| person.version);
            self.told.acknowledged.push(Acknowledged {
                person: found.as_ref().or(before).map(|person| person.id).unwrap_or_default(),
                // Of a person who is gone, the last state was one before.
                version: version + i64::from(found.is_none()),
                type_: change.event(before),
                record,
            });
        } else if found.as_ref() != before {
            let id = before.or(found.as_ref()).map(|person| person.id).unwrap_or_default();
            self.findings.add(
                Charge::WriteWrong,
                format!(
                    "person {id} is neither as before nor as after {} (version {:?} of {:?})",
                    change.event(before),
                    found.as_ref().map(|person| person.version),
                    before.map(|person| person.version),
                ),
            );
        }
        slot.person = found;
    }

    /// Reads a person, until there is an answer. `None`: there was none until the end.
    async fn read(&self, cpf: i64) -> Option<Option<Person>> {
        let url = format!("{}/person/{cpf}", self.addresses.person_api);
        while !self.give_up.is_cancelled() {
            if let Ok(answer) = self.http.get(&url).send().await {
                let version = version(&answer);
                match answer.status().as_u16() {
                    404 => return Some(None),
                    200 => {
                        if let (Some(version), Ok(body)) = (version, answer.json::<Value>().await) {
                            match Person::read(&body, version) {
                                Ok(person) => return Some(Some(person)),
                                Err(error) => {
                                    self.findings
                                        .add(Charge::WriteWrong, format!("GET of a person: {error}"));
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

    /// Reads the score that contains the last write, if it is there within a second.
    pub(crate) async fn read_score(&mut self, slot: &Slot) {
        let Some(person) = &slot.person else { return };
        let url = format!(
            "{}/{}/score?after=%22{}.{}%22&wait=1s",
            self.addresses.score_api, person.cpf, person.id, person.version
        );
        let Ok(answer) = self.http.get(&url).send().await else { return };
        let status = answer.status().as_u16();
        let Ok(body) = answer.json::<Value>().await else { return };
        let read = match status {
            200 => body["score"].as_number().map(ToString::to_string),
            503 => return,
            other => Some(format!("status {other}")),
        };
        self.told.reads += 1;
        if read.as_deref() != Some(person.score().to_string().as_str()) {
            self.findings.add(
                Charge::ReadWrong,
                format!(
                    "person {} at version {}: {read:?} instead of {}",
                    person.id,
                    person.version,
                    person.score()
                ),
            );
        }
    }

    async fn send(&self, request: &super::model::Request, condition: &Condition) -> Answer {
        let url = format!("{}{}", self.addresses.person_api, request.path);
        let mut builder = self.http.request(request.method.clone(), url);
        if let Some(body) = &request.body {
            builder = builder.header("content-type", "application/json").body(body.clone());
        }
        builder = match condition {
            Condition::Key(key) => builder.header("idempotency-key", format!("\"{key}\"")),
            Condition::State(token) => builder.header("if-match", token),
            Condition::None => builder,
        };
        let Ok(answer) = builder.send().await else { return Answer::Unsure };
        let (status, version) = (answer.status().as_u16(), version(&answer));
        let Ok(body) = answer.json::<Value>().await else { return Answer::Unsure };
        let problem = body["type"].as_str().map(|type_| type_.trim_start_matches("/problems/"));
        match (status, problem, version, body["id"].as_str()) {
            (200 | 201, _, Some(version), Some(id)) => match id.parse() {
                Ok(id) => Answer::Done { id, version },
                Err(_) => Answer::Wrong("answered with an id that is none".to_owned()),
            },
            // But for this one, nothing was stored.
            (503, Some("outcome-unknown"), ..) => Answer::Unsure,
            (408 | 503, Some(_), ..) => Answer::NotNow,
            (404 | 409 | 412, ..) => Answer::Refused(status),
            (status, problem, ..) => {
                Answer::Wrong(format!("answered with {status} {}", problem.unwrap_or("?")))
            }
        }
    }

    fn wrong(&self, slot: &Slot, change: &Change, why: &str) {
        let person = slot.person.as_ref();
        let (id, type_) = (person.map(|person| person.id).unwrap_or_default(), change.event(person));
        self.findings.add(Charge::WriteWrong, format!("person {id}: {type_}: {why}"));
    }
}

/// The version in an answer's `ETag`, which is `"<person>.<version>"`.
fn version(answer: &reqwest::Response) -> Option<i64> {
    let etag = answer.headers().get("etag")?.to_str().ok()?;
    etag.trim_matches('"').rsplit_once('.')?.1.parse().ok()
}
