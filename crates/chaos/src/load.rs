//! Many clients, each with a few persons of its own whom it creates, changes and deletes.

use std::{sync::Arc, time::Duration};

use rand::RngExt;
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    addresses::Addresses,
    client::{Client, GHOST, Slot},
    history::{History, Told},
    model::{Change, Item, Kind, Person},
    verdict::{Charge, Findings},
};

/// Clients that write.
pub(crate) const CLIENTS: u64 = 16;
/// How many persons each client has at most, one at a time for each cpf.
const PERSONS: i64 = 4;
/// How long a client thinks between two writes, in milliseconds: not the most that the machine can do, which
/// would only fill the queues.
const THINKS: std::ops::Range<u64> = 40..240;

/// How much is written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) clients: u64,
    pub(crate) seed: u64,
    /// When it ends.
    pub(crate) end: Instant,
}

impl Load {
    /// Writes until the end, and then until every client knows what became of its writes, or until `give_up`.
    pub(crate) async fn run(
        self,
        addresses: &Arc<Addresses>,
        findings: &Arc<Findings>,
        give_up: &CancellationToken,
    ) -> anyhow::Result<History> {
        let mut clients = JoinSet::new();
        for number in 0..self.clients {
            let seed = self.seed.wrapping_mul(1_000).wrapping_add(number);
            let client = Client::new(Arc::clone(addresses), Arc::clone(findings), seed, give_up.clone())?;
            clients.spawn(self.one(number, client, Arc::clone(findings)));
        }
        let mut history = History::default();
        while let Some(client) = clients.join_next().await {
            let (told, persons) = client?;
            history.told.acknowledged.extend(told.acknowledged);
            history.told.retries += told.retries;
            history.told.in_doubt += told.in_doubt;
            history.told.reads += told.reads;
            history.persons.extend(persons);
        }
        Ok(history)
    }

    async fn one(self, number: u64, mut client: Client, findings: Arc<Findings>) -> (Told, Vec<Person>) {
        let first = i64::try_from(number).unwrap_or(0) * PERSONS + 1;
        let mut slots: Vec<Slot> = (first..first + PERSONS)
            .map(|cpf| Slot { cpf, person: None, doubt: None, ghost: None })
            .collect();
        let mut names = 0;
        while Instant::now() < self.end {
            let n = client.random.random_range(0..slots.len());
            let slot = &mut slots[n];
            match slot.doubt {
                None => {
                    names += 1;
                    let change = choose(slot, &mut client, names);
                    let safe = client.random.random_ratio(2, 3) || self.end < Instant::now() + GHOST;
                    client.write(slot, change, safe).await;
                    if client.random.random_ratio(1, 8) && slot.doubt.is_none() {
                        client.read_score(slot).await;
                    }
                }
                Some((_, since)) if since.elapsed() > GHOST => client.find_out(slot).await,
                Some(_) => {}
            }
            tokio::time::sleep(Duration::from_millis(client.random.random_range(THINKS))).await;
        }
        for slot in &mut slots {
            if let Some((_, since)) = slot.doubt {
                tokio::time::sleep_until(since + GHOST).await;
                client.find_out(slot).await;
            }
            if slot.doubt.is_some() {
                let person = slot.person.as_ref().map(|person| person.id).unwrap_or_default();
                findings.add(Charge::Unfinished, format!("nobody says what became of a write to {person}"));
            }
        }
        (client.told, slots.into_iter().filter_map(|slot| slot.person).collect())
    }
}

/// What to do next with a person.
fn choose(slot: &Slot, client: &mut Client, names: u64) -> Change {
    let random = &mut client.random;
    let name = format!("Maria {names}");
    let address = random.random_bool(0.7).then(|| format!("Rua das Laranjeiras {names}"));
    let Some(person) = &slot.person else { return Change::Create { cpf: slot.cpf, name, address } };
    let kind = Kind::ALL[random.random_range(0..Kind::ALL.len())];
    let add = Change::Add(Item::random(kind, random));
    let any = random.random_range(0..person.items.len().max(1));
    let item = person.items.iter().nth(any).map(|(id, item)| (*id, item.kind));
    match (random.random_range(0..100), item) {
        (0..5, _) if slot.ghost.is_none_or(|ghost| ghost.elapsed() > GHOST * 3 / 2) => Change::Delete,
        (5..17, _) => Change::Patch { name, address, active: random.random_bool(0.7) },
        (17..35, Some((id, kind))) => Change::Replace(id, Item::random(kind, random)),
        (35..47, Some((id, _))) => Change::Remove(id),
        // An inactive person takes none, which the clients try now and then.
        (47..90, _) if !person.active => Change::Patch { name, address, active: true },
        _ => add,
    }
}
