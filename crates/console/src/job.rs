//! What an operator has begun and what takes its time: with progress, and an end on request.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use chrono::{DateTime, Utc};
use daemon::shutdown::Shutdown;
use outbox_relay::command::parked::{self, ParkedEvent, Selection};
use serde_json::json;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;

use crate::{
    audit::{self, Entry},
    outbox::Outbox,
};

/// How many are remembered. The oldest that have ended give way.
const MOST: usize = 100;
/// How many events one transaction changes at most.
const STEP: usize = 500;
/// The pause between two steps of a limited rate.
const SECOND: Duration = Duration::from_secs(1);

/// What is done with events that were set aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// They are tried again.
    Retry,
    /// They are given up.
    Drop,
}

impl Action {
    /// As forms and the audit have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::Drop => "drop",
        }
    }
}

/// What an operator asks for.
#[derive(Clone, Debug)]
pub struct Order {
    /// What to do.
    pub action: Action,
    /// The relay name.
    pub relay: String,
    /// With which events.
    pub selection: Selection,
    /// So many a second at most.
    pub rate: Option<usize>,
    /// The name of the operator's key.
    pub operator: String,
    /// Why.
    pub why: String,
}

impl Order {
    /// What was chosen, as the audit has it.
    fn detail(&self) -> serde_json::Value {
        let Selection { id, type_, reason, .. } = &self.selection;
        json!({"ids": id, "type": type_, "reason": reason, "rate": self.rate})
    }
}

/// One of them.
#[derive(Debug)]
pub struct Job {
    /// Its id.
    pub id: Uuid,
    /// The outbox.
    pub outbox: String,
    /// What was asked for.
    pub order: Order,
    /// When it began.
    pub began: DateTime<Utc>,
    /// How many events were chosen.
    pub all: usize,
    done: AtomicUsize,
    stop: CancellationToken,
    end: Mutex<Option<(DateTime<Utc>, String)>>,
}

impl Job {
    /// How many events are done.
    pub fn done(&self) -> usize {
        self.done.load(Ordering::Relaxed)
    }

    /// Asks for its end.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// When it ended, and how.
    pub fn end(&self) -> Option<(DateTime<Utc>, String)> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// All of them.
#[derive(Debug)]
pub struct Jobs {
    list: Mutex<VecDeque<Arc<Job>>>,
    running: TaskTracker,
    stop: CancellationToken,
}

/// Why one was not begun.
#[derive(Debug)]
pub enum NotBegun {
    /// Another one works on the same outbox.
    Busy(Arc<Job>),
    /// Too many work.
    TooMany,
}

impl Jobs {
    /// None so far. The process ends when each has ended its step.
    pub fn new(shutdown: &Shutdown) -> Self {
        let (running, stop) = (TaskTracker::new(), shutdown.requested().clone());
        let (ending, until) = (running.clone(), stop.clone());
        shutdown.spawn("actions", async move {
            until.cancelled().await;
            ending.close();
            ending.wait().await;
            Ok(())
        });
        Self { list: Mutex::default(), running, stop }
    }

    /// The one with this id.
    pub fn get(&self, id: Uuid) -> Option<Arc<Job>> {
        self.all().into_iter().find(|job| job.id == id)
    }

    /// All, the newest first.
    pub fn all(&self) -> Vec<Arc<Job>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).iter().rev().cloned().collect()
    }

    /// Begins one, on the events that were chosen. One at a time works on an outbox.
    pub fn begin(
        &self,
        outbox: &Arc<Outbox>,
        order: Order,
        events: Vec<ParkedEvent>,
    ) -> Result<Arc<Job>, NotBegun> {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(busy) = list.iter().find(|job| job.outbox == outbox.name && job.end().is_none()) {
            return Err(NotBegun::Busy(Arc::clone(busy)));
        }
        if list.len() >= MOST {
            let ended = list.iter().position(|job| job.end().is_some()).ok_or(NotBegun::TooMany)?;
            list.remove(ended);
        }
        let job = Arc::new(Job {
            id: Uuid::new_v4(),
            outbox: outbox.name.clone(),
            order,
            began: Utc::now(),
            all: events.len(),
            done: AtomicUsize::new(0),
            stop: self.stop.child_token(),
            end: Mutex::default(),
        });
        list.push_back(Arc::clone(&job));
        let (outbox, running) = (Arc::clone(outbox), Arc::clone(&job));
        self.running.spawn(async move {
            let said = match work(&outbox, &running, &events).await {
                Ok(()) if running.stop.is_cancelled() && running.done() < running.all => "stopped".to_owned(),
                Ok(()) => "done".to_owned(),
                Err(error) => format!("failed: {}", escape::line(&format!("{error:#}"))),
            };
            // So that the audit tells how far it came. The action itself is in it already.
            if let Err(error) = note_end(&outbox, &running, &said).await {
                tracing::warn!(%error, outbox = outbox.name, "the end of an action is not in the audit");
            }
            outbox.watch.is_stale();
            *running.end.lock().unwrap_or_else(PoisonError::into_inner) = Some((Utc::now(), said));
        });
        Ok(job)
    }
}

async fn work(outbox: &Outbox, job: &Job, events: &[ParkedEvent]) -> anyhow::Result<()> {
    let Order { action, relay, rate, operator, why, .. } = &job.order;
    let mut conn = outbox.pool.acquire().await?;
    let entry = Entry { operator, action: action.as_str(), target: relay, why };
    let mut detail = job.order.detail();
    detail["events"] = job.all.into();
    audit::add(&mut conn, entry, detail).await?;
    drop(conn);
    let (together, one_by_one) = match action {
        Action::Retry => kinds(events),
        Action::Drop => (Vec::new(), events.to_vec()),
    };
    if !together.is_empty() {
        let mut conn = outbox.pool.acquire().await?;
        parked::make_due(&mut conn, relay, &together).await?;
        drop(conn);
        job.done.fetch_add(job.all - one_by_one.len(), Ordering::Relaxed);
    }
    for step in one_by_one.chunks(rate.unwrap_or(STEP).clamp(1, STEP)) {
        if job.stop.is_cancelled() {
            return Ok(());
        }
        // Given back between steps: pages share the connection.
        let mut conn = outbox.pool.acquire().await?;
        match action {
            Action::Retry => drop(parked::make_due(&mut conn, relay, step).await?),
            Action::Drop => parked::drop_events(&mut conn, relay, step).await?,
        }
        drop(conn);
        let done = job.done.fetch_add(step.len(), Ordering::Relaxed) + step.len();
        if rate.is_some() && done < job.all {
            job.stop.run_until_cancelled(tokio::time::sleep(SECOND)).await;
        }
    }
    Ok(())
}

/// Of the events that no queue takes, one of each kind, which makes all others of its kind due; and the rest.
fn kinds(events: &[ParkedEvent]) -> (Vec<ParkedEvent>, Vec<ParkedEvent>) {
    let is_together = |event: &&ParkedEvent| event.reason == "unroutable" && event.state == "parked";
    let mut seen = BTreeSet::new();
    let first = |event: &&ParkedEvent| seen.insert((event.type_.clone(), event.aggregate_type.clone()));
    let together = events.iter().filter(is_together).filter(first).cloned().collect();
    (together, events.iter().filter(|event| !is_together(event)).cloned().collect())
}

async fn note_end(outbox: &Outbox, job: &Job, said: &str) -> sqlx::Result<()> {
    let Order { action, relay, operator, why, .. } = &job.order;
    let mut conn = outbox.pool.acquire().await?;
    let action = format!("{} ended", action.as_str());
    let detail = json!({"done": job.done(), "events": job.all, "outcome": said});
    audit::add(&mut conn, Entry { operator, action: &action, target: relay, why }, detail).await
}
