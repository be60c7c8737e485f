//! Turns of those who write about the same person. Each write locks the person's row, so more than two of them at a
//! time gain nothing: one waits for the lock while the other commits. The rest wait here, where they hold no
//! connection, and not for long.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use events::Cpf;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use super::{Failure, StoreError};

/// How many writes about one person may have a connection.
const AT_A_TIME: usize = 2;
/// How many may have one or wait for it; what comes beyond is told at once.
const MOST: usize = 200;
/// How long a write waits for its turn; the time for which it waits for the row's lock comes on top.
const WAIT: Duration = Duration::from_secs(4);
/// How many writes, about whomever, may have a connection. The pool has some more, so that reads get one while all of
/// these wait for locks.
pub const WRITES: usize = 16;

/// Who writes about whom.
#[derive(Clone, Debug)]
pub(super) struct Turns {
    persons: Arc<Mutex<HashMap<Cpf, Person>>>,
    writes: Arc<Semaphore>,
}

impl Default for Turns {
    fn default() -> Self {
        Self { persons: Arc::default(), writes: Arc::new(Semaphore::new(WRITES)) }
    }
}

/// Those who write about one person.
#[derive(Debug)]
struct Person {
    /// How many they are, waiting ones included. The last one takes the entry away.
    writers: usize,
    places: Arc<Semaphore>,
}

/// A write's turn, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    _places: (OwnedSemaphorePermit, OwnedSemaphorePermit),
    _among: Among,
}

/// One of those who write about a person.
#[derive(Debug)]
struct Among {
    turns: Turns,
    cpf: Cpf,
}

impl Turns {
    /// Waits for a turn.
    pub(super) async fn take(&self, cpf: Cpf) -> Result<Turn, StoreError> {
        let (among, places) = self.join(cpf).ok_or(StoreError::Busy)?;
        let Ok(Ok(place)) = timeout(WAIT, places.acquire_owned()).await else { return Err(StoreError::Busy) };
        let Ok(Ok(write)) = timeout(WAIT, Arc::clone(&self.writes).acquire_owned()).await else {
            let why = "no connection in time".to_owned();
            return Err(StoreError::Unavailable(Failure::Away, why));
        };
        Ok(Turn { _places: (place, write), _among: among })
    }

    /// None when too many are there already.
    fn join(&self, cpf: Cpf) -> Option<(Among, Arc<Semaphore>)> {
        let mut persons = self.lock();
        let person = persons
            .entry(cpf)
            .or_insert_with(|| Person { writers: 0, places: Arc::new(Semaphore::new(AT_A_TIME)) });
        if person.writers >= MOST {
            return None;
        }
        person.writers += 1;
        Some((Among { turns: self.clone(), cpf }, Arc::clone(&person.places)))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Cpf, Person>> {
        self.persons.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Among {
    fn drop(&mut self) {
        let mut persons = self.turns.lock();
        if let Some(person) = persons.get_mut(&self.cpf) {
            person.writers -= 1;
            if person.writers == 0 {
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
    async fn one_persons_writers_have_two_turns_and_others_are_not_held_up() {
        let turns = Turns::default();
        let held = [turns.take(cpf(1)).await.unwrap(), turns.take(cpf(1)).await.unwrap()];
        assert!(matches!(turns.take(cpf(1)).await, Err(StoreError::Busy)), "after a while");
        let another = turns.take(cpf(2)).await.unwrap();
        drop(held);
        let next = turns.take(cpf(1)).await.unwrap();
        drop((another, next));
        assert!(turns.lock().is_empty(), "nobody is remembered");
    }

    #[tokio::test]
    async fn so_many_may_wait_and_a_turn_that_ends_is_somebodys() {
        let turns = Turns::default();
        let held = turns.take(cpf(1)).await.unwrap();
        let second = turns.take(cpf(1)).await.unwrap();
        let waiting: Vec<_> = (2..MOST)
            .map(|_| {
                let turns = turns.clone();
                tokio::spawn(async move { turns.take(cpf(1)).await.map(drop) })
            })
            .collect();
        let writers = || turns.lock().get(&cpf(1)).map_or(0, |person| person.writers);
        while writers() < MOST {
            tokio::task::yield_now().await;
        }
        tokio::select! {
            biased;
            refused = turns.take(cpf(1)) => assert!(matches!(refused, Err(StoreError::Busy))),
            () = std::future::ready(()) => panic!("it waits where too many wait already"),
        }
        drop((held, second));
        for one in waiting {
            one.await.unwrap().unwrap();
        }
        assert!(turns.lock().is_empty());
    }
}
