//! Where all writers stop while a database is replaced, and from where they go on with what the new one has.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use anyhow::Context;
use tokio::sync::watch;

use crate::{history::History, model::Person};

/// How long the writers may take to stop. Each finishes the request that it repeats, and another fault may be in its way.
const STOP_TIMEOUT: Duration = Duration::from_mins(2);

/// What the writers may do.
#[derive(Clone, Debug)]
enum Phase {
    /// Write.
    Open(Persons),
    /// Finish the present request, and begin no other.
    Closed,
    /// Find out what became of the writes in doubt: none can be executed any more.
    Severed,
}

/// The persons of a database by their cpf.
pub(crate) type Persons = Arc<BTreeMap<i64, Person>>;

/// The barrier.
#[derive(Debug)]
pub(crate) struct Barrier {
    phase: watch::Sender<Phase>,
    /// How many have done what the phase asks for.
    arrived: watch::Sender<usize>,
    writers: AtomicUsize,
    history: Mutex<History>,
    /// How many databases are still to be replaced. The clients write until then.
    expected: AtomicUsize,
    republishings: Republishings,
    /// Scores that are read now may be of the lost time.
    is_recovering: AtomicBool,
}

/// How often the baselines of all persons were begun and finished. Each raises a person's version once, unasked.
#[derive(Debug, Default)]
struct Republishings {
    begun: AtomicU64,
    finished: AtomicU64,
}

impl Default for Barrier {
    fn default() -> Self {
        Self {
            phase: watch::Sender::new(Phase::Open(Persons::default())),
            arrived: watch::Sender::new(0),
            writers: AtomicUsize::default(),
            history: Mutex::default(),
            expected: AtomicUsize::default(),
            republishings: Republishings::default(),
            is_recovering: AtomicBool::default(),
        }
    }
}

impl Barrier {
    /// So many writers stop here, and so many databases will be replaced.
    pub(crate) fn expect(&self, writers: usize, replacements: usize) {
        self.writers.store(writers, SeqCst);
        self.expected.store(replacements, SeqCst);
    }

    /// Whether a database is still to be replaced.
    pub(crate) fn is_expected(&self) -> bool {
        self.expected.load(SeqCst) > 0
    }

    /// Whether the writers have to stop.
    pub(crate) fn is_closed(&self) -> bool {
        !matches!(*self.phase.borrow(), Phase::Open(_))
    }

    /// Whether scores that are read may be of the lost time.
    pub(crate) fn is_recovering(&self) -> bool {
        self.is_recovering.load(SeqCst)
    }

    /// How often baselines were begun, and how often finished.
    pub(crate) fn republishings(&self) -> (u64, u64) {
        (self.republishings.begun.load(SeqCst), self.republishings.finished.load(SeqCst))
    }

    /// Runs `republish`, which gives each person a baseline.
    pub(crate) async fn republishing<T>(&self, republish: impl Future<Output = T>) -> T {
        self.republishings.begun.fetch_add(1, SeqCst);
        let done = republish.await;
        self.republishings.finished.fetch_add(1, SeqCst);
        done
    }

    /// Stops all writers. `sever` makes sure that no request of theirs can be executed any more. Returns what they did.
    pub(crate) async fn stop(
        &self,
        sever: impl Future<Output = anyhow::Result<()>>,
    ) -> anyhow::Result<History> {
        self.is_recovering.store(true, SeqCst);
        self.enter(Phase::Closed).await.context("the writers do not stop")?;
        sever.await?;
        self.enter(Phase::Severed)
            .await
            .context("the writers do not find out what became of their writes")?;
        Ok(std::mem::take(&mut *self.history.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    /// Lets all writers go on with these persons.
    pub(crate) fn go_on(&self, persons: BTreeMap<i64, Person>) {
        self.phase.send_replace(Phase::Open(Arc::new(persons)));
    }

    /// Reads show the present state again.
    pub(crate) fn recovered(&self) {
        self.is_recovering.store(false, SeqCst);
        self.expected.fetch_sub(1, SeqCst);
    }

    async fn enter(&self, phase: Phase) -> anyhow::Result<()> {
        self.arrived.send_replace(0);
        self.phase.send_replace(phase);
        let (mut arrived, writers) = (self.arrived.subscribe(), self.writers.load(SeqCst));
        let all = arrived.wait_for(|arrived| *arrived == writers);
        let Ok(all) = tokio::time::timeout(STOP_TIMEOUT, all).await else {
            let arrived = *self.arrived.borrow();
            anyhow::bail!("{arrived} of {writers} have after {} s", STOP_TIMEOUT.as_secs());
        };
        all?;
        Ok(())
    }

    /// A writer has nothing under way. Returns when no request from before can be executed any more.
    pub(crate) async fn finished(&self) {
        self.arrived.send_modify(|arrived| *arrived += 1);
        let mut phases = self.phase.subscribe();
        let _barrier_is_there = phases.wait_for(|phase| matches!(phase, Phase::Severed)).await;
    }

    /// A writer knows what became of its writes. Returns the persons to go on with.
    pub(crate) async fn resolved(&self, history: History) -> Persons {
        self.history.lock().unwrap_or_else(PoisonError::into_inner).merge(history);
        self.arrived.send_modify(|arrived| *arrived += 1);
        let mut phases = self.phase.subscribe();
        let open = phases.wait_for(|phase| matches!(phase, Phase::Open(_))).await;
        match open.as_deref() {
            Ok(Phase::Open(persons)) => Arc::clone(persons),
            _ => Persons::default(),
        }
    }
}
