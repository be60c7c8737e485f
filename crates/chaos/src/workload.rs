//! Many clients, each with a few persons of its own that it creates, changes and deletes.

mod client;
pub(crate) mod sql_writers;

use std::{sync::Arc, time::Duration};

use rand::RngExt;
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use self::client::{Client, MAX_IN_FLIGHT, Slot};
use super::{
    addresses::Addresses,
    barrier::Barrier,
    history::History,
    model::{Change, Item, ItemKind},
    violation::{Violation, Violations},
};

/// How many clients write.
pub(crate) const CLIENTS: u64 = 16;
/// How many persons each client has at most: one for each of its cpfs.
const PERSONS: i64 = 4;
/// How long a client pauses between two writes, in milliseconds. Without a pause the writes would only fill the queues.
const PAUSE: std::ops::Range<u64> = 40..240;

/// What the clients do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Workload {
    pub(crate) clients: u64,
    pub(crate) seed: u64,
    /// No write begins later.
    pub(crate) end: Instant,
}

impl Workload {
    /// Writes until the end, and then waits until every client knows the outcome of its writes, or until `give_up`.
    pub(crate) async fn run(
        self,
        (addresses, barrier): (&Arc<Addresses>, &Arc<Barrier>),
        violations: &Arc<Violations>,
        give_up: &CancellationToken,
    ) -> anyhow::Result<History> {
        let mut clients = JoinSet::new();
        for number in 0..self.clients {
            let seed = self.seed.wrapping_mul(1_000).wrapping_add(number);
            let client = Client::new(
                (Arc::clone(addresses), Arc::clone(barrier)),
                Arc::clone(violations),
                seed,
                give_up.clone(),
            )?;
            clients.spawn(self.one(number, client, Arc::clone(violations)));
        }
        let mut history = History::default();
        while let Some(client) = clients.join_next().await {
            history.merge(client?);
        }
        Ok(history)
    }

    async fn one(self, number: u64, mut client: Client, violations: Arc<Violations>) -> History {
        let first = i64::try_from(number).unwrap_or(0) * PERSONS + 1;
        let mut slots: Vec<Slot> = (first..first + PERSONS)
            .map(|cpf| Slot { cpf, person: None, in_doubt: None, unanswered_post: None, baselines: 0 })
            .collect();
        let mut names = 0;
        // A database that is still to be replaced is replaced under writes.
        while Instant::now() < self.end || client.barrier.is_expected() {
            if client.barrier.is_closed() {
                client.rest(&mut slots).await;
            }
            let n = client.random.random_range(0..slots.len());
            let slot = &mut slots[n];
            match slot.in_doubt {
                None => {
                    names += 1;
                    let change = choose(slot, &mut client, names);
                    let safe = client.random.random_ratio(2, 3) || self.end < Instant::now() + MAX_IN_FLIGHT;
                    client.write(slot, change, safe).await;
                    let reads = client.random.random_ratio(1, 8);
                    if reads && slot.in_doubt.is_none() && !client.barrier.is_recovering() {
                        client.read_score(slot).await;
                    }
                }
                Some((_, since)) if since.elapsed() > MAX_IN_FLIGHT => client.find_out(slot).await,
                Some(_) => {}
            }
            tokio::time::sleep(Duration::from_millis(client.random.random_range(PAUSE))).await;
        }
        for slot in &mut slots {
            if let Some((_, since)) = slot.in_doubt {
                tokio::time::sleep_until(since + MAX_IN_FLIGHT).await;
                client.find_out(slot).await;
            }
            if slot.in_doubt.is_some() {
                let person = slot.person.as_ref().map(|person| person.id).unwrap_or_default();
                violations
                    .add(Violation::Unfinished, format!("the outcome of a write to {person} stayed unknown"));
            }
        }
        client.history.persons = slots.into_iter().filter_map(|slot| slot.person).collect();
        client.history
    }
}

/// Chooses the next change of a person.
fn choose(slot: &Slot, client: &mut Client, names: u64) -> Change {
    let random = &mut client.random;
    let name = format!("Maria {names}");
    let address = random.random_bool(0.7).then(|| format!("Rua das Laranjeiras {names}"));
    let Some(person) = &slot.person else { return Change::Create { cpf: slot.cpf, name, address } };
    let kind = ItemKind::ALL[random.random_range(0..ItemKind::ALL.len())];
    let add = Change::Add(Item::random(kind, random));
    let any = random.random_range(0..person.items.len().max(1));
    let item = person.items.iter().nth(any).map(|(id, item)| (*id, item.kind));
    match (random.random_range(0..100), item) {
        (0..5, _)
            if slot
                .unanswered_post
                .is_none_or(|unanswered_post| unanswered_post.elapsed() > MAX_IN_FLIGHT * 3 / 2) =>
        {
            Change::Delete
        }
        (5..17, _) => Change::Patch { name, address, active: random.random_bool(0.7) },
        (17..35, Some((id, kind))) => Change::Replace(id, Item::random(kind, random)),
        (35..47, Some((id, _))) => Change::Remove(id),
        // Most of the time: adding an item to an inactive person is refused.
        (47..90, _) if !person.active => Change::Patch { name, address, active: true },
        _ => add,
    }
}
