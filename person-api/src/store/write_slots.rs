//! How many writes may hold a connection, in all and about one person.
//!
//! Each write locks the person's row. So more than two writes about one person at a time gain nothing: one waits for the
//! lock while the other commits. The others wait here, without a connection, for a limited time.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use events::Cpf;
use outbox::database::Failure;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use super::error::StoreError;

/// How many writes about one person may have a connection.
const PER_PERSON: usize = 2;
/// How many writes about one person may have a connection or wait for one. Further ones are refused at once.
const PER_PERSON_WITH_WAITING: usize = 200;
/// How long a write waits for a slot. The wait for the row's lock comes on top.
const WAIT: Duration = Duration::from_secs(4);
/// How many writes in all may have a connection. The pool has some more, so that reads get one while all of these wait
/// for locks.
pub const WRITES: usize = 16;

/// The slots for writes.
#[derive(Clone, Debug)]
pub(super) struct WriteSlots {
    persons: Arc<Mutex<HashMap<Cpf, PersonSlots>>>,
    all: Arc<Semaphore>,
}

impl Default for WriteSlots {
    fn default() -> Self {
        Self { persons: Arc::default(), all: Arc::new(Semaphore::new(WRITES)) }
    }
}

/// The slots for writes about one person.
#[derive(Debug)]
struct PersonSlots {
    /// How many writes have a slot or wait for one. The last of them removes the entry.
    writes: usize,
    slots: Arc<Semaphore>,
}

/// A write's slot, until it is dropped.
#[derive(Debug)]
pub(super) struct WriteSlot {
    _permits: (OwnedSemaphorePermit, OwnedSemaphorePermit),
    _entry: Entry,
}

/// A write that is counted in [`PersonSlots::writes`], until it is dropped.
#[derive(Debug)]
struct Entry {
    slots: WriteSlots,
    cpf: Cpf,
}

impl WriteSlots {
    /// Waits for a slot.
    pub(super) async fn acquire(&self, cpf: Cpf) -> Result<WriteSlot, StoreError> {
        let (entry, slots) = self.enter(cpf).ok_or(StoreError::Busy)?;
        let Ok(Ok(person)) = timeout(WAIT, slots.acquire_owned()).await else { return Err(StoreError::Busy) };
        let Ok(Ok(all)) = timeout(WAIT, Arc::clone(&self.all).acquire_owned()).await else {
            let why = "no connection in time".to_owned();
            return Err(StoreError::Unavailable(Failure::Away, why));
        };
        Ok(WriteSlot { _permits: (person, all), _entry: entry })
    }

    /// None when too many writes have a slot or wait for one.
    fn enter(&self, cpf: Cpf) -> Option<(Entry, Arc<Semaphore>)> {
        let mut persons = self.lock();
        let person = persons
            .entry(cpf)
            .or_insert_with(|| PersonSlots { writes: 0, slots: Arc::new(Semaphore::new(PER_PERSON)) });
        if person.writes >= PER_PERSON_WITH_WAITING {
            return None;
        }
        person.writes += 1;
        Some((Entry { slots: self.clone(), cpf }, Arc::clone(&person.slots)))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Cpf, PersonSlots>> {
        self.persons.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut persons = self.slots.lock();
        if let Some(person) = persons.get_mut(&self.cpf) {
            person.writes -= 1;
            if person.writes == 0 {
                persons.remove(&self.cpf);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpf(number: i64) -> Cpf {
        Cpf::try_from(number).unwrap()
    }

    #[tokio::test]
    async fn writes_about_one_person_have_two_slots_and_do_not_delay_others() {
        let slots = WriteSlots::default();
        let held = [slots.acquire(cpf(1)).await.unwrap(), slots.acquire(cpf(1)).await.unwrap()];
        assert!(matches!(slots.acquire(cpf(1)).await, Err(StoreError::Busy)), "after a while");
        let another = slots.acquire(cpf(2)).await.unwrap();
        drop(held);
        let next = slots.acquire(cpf(1)).await.unwrap();
        drop((another, next));
        assert!(slots.lock().is_empty(), "no entry is left");
    }

    #[tokio::test]
    async fn a_limited_number_of_writes_waits_and_each_gets_a_slot_that_is_freed() {
        let slots = WriteSlots::default();
        let held = slots.acquire(cpf(1)).await.unwrap();
        let second = slots.acquire(cpf(1)).await.unwrap();
        let waiting: Vec<_> = (2..PER_PERSON_WITH_WAITING)
            .map(|_| {
                let slots = slots.clone();
                tokio::spawn(async move { slots.acquire(cpf(1)).await.map(drop) })
            })
            .collect();
        let writes = || slots.lock().get(&cpf(1)).map_or(0, |person| person.writes);
        while writes() < PER_PERSON_WITH_WAITING {
            tokio::task::yield_now().await;
        }
        tokio::select! {
            biased;
            refused = slots.acquire(cpf(1)) => assert!(matches!(refused, Err(StoreError::Busy))),
            () = std::future::ready(()) => panic!("it waits although the limit is reached"),
        }
        drop((held, second));
        for one in waiting {
            one.await.unwrap().unwrap();
        }
        assert!(slots.lock().is_empty());
    }
}
