//! One consumer for each read model that is in use: for the live one always, and for a shadow while
//! there is one.

use std::{sync::Arc, time::Duration};

use anyhow::anyhow;
use daemon::{
    config::{SettingError, database::Database},
    health::{Health, Part},
};
use inbox::{Consumer, Nodes, Sequencer, Sources, Topology};
use outbox::Waker;
use sqlx::{PgPool, postgres::PgPoolOptions};
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use crate::{
    model::{self, Model, Role, Stored},
    projection::Projection,
    rebuild,
};

/// How often is asked which models there are. A write to one that was replaced makes it sooner.
const LOOK: Duration = Duration::from_secs(2);
/// Connections of a shadow's consumer: its queue and its dead letters, each with a second one for an
/// attempt, and the check that the database is there.
const SHADOW_POOL_SIZE: u32 = 5;

/// What the consumers have in common.
#[derive(Debug)]
pub(crate) struct Consumers {
    pub(crate) pool: PgPool,
    /// As the pool's, for a shadow's pool of its own.
    pub(crate) options: Database,
    pub(crate) queue: String,
    pub(crate) nodes: Nodes,
    pub(crate) batch: u16,
    pub(crate) max_refused: u32,
    pub(crate) max_held: u32,
    pub(crate) max_rejected: u32,
    pub(crate) max_gaps: u32,
    /// Whom they believe.
    pub(crate) sources: Sources,
    /// Tells of the live model's commits.
    pub(crate) waker: Waker,
    /// What the program says of itself: which consumer is the live model's.
    pub(crate) known: Health,
    /// What the live model's consumer waits for.
    pub(crate) health: [Part; 4],
    /// What somebody should look at in its inbox.
    pub(crate) attention: [Part; 3],
}

/// A consumer under way.
struct Running {
    name: String,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Consumers {
    /// Starts and stops consumers as `score.model` says, until `stop`. Then each drains. Fails when one
    /// of them ends by itself.
    pub(crate) async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let changed = Arc::new(Notify::new());
        let mut running: [(Role, Option<Running>); 2] = [(Role::Live, None), (Role::Shadow, None)];
        while !stop.is_cancelled() {
            match self.wanted().await {
                Ok(wanted) => {
                    for ((role, consumer), wanted) in running.iter_mut().zip(wanted) {
                        self.follow(*role, consumer, wanted, &changed).await?;
                    }
                }
                // Whoever consumes says so itself, and goes on with what it had.
                Err(error) => tracing::debug!(%error, "which read models there are could not be read"),
            }
            let pause = tokio::time::timeout(LOOK, changed.notified());
            stop.run_until_cancelled(pause).await;
        }
        for (_, consumer) in running {
            if let Some(consumer) = consumer {
                consumer.end().await?;
            }
        }
        Ok(())
    }

    async fn wanted(&self) -> sqlx::Result<[Option<Stored>; 2]> {
        model::consumed(&mut *self.pool.acquire().await?).await
    }

    /// Has the right consumer running. One that has to go drains first.
    async fn follow(
        &self,
        role: Role,
        running: &mut Option<Running>,
        wanted: Option<Stored>,
        changed: &Arc<Notify>,
    ) -> anyhow::Result<()> {
        if let Some(consumer) = running.take_if(|consumer| {
            wanted.as_ref().map(|model| &model.consumer) != Some(&consumer.name)
                || consumer.task.is_finished()
        }) {
            let (name, by_itself) = (consumer.name.clone(), consumer.task.is_finished());
            consumer.end().await?;
            if by_itself {
                return Err(anyhow!("the consumer {name} ended by itself"));
            }
            tracing::info!(
                consumer = name,
                role = role.as_str(),
                "its read model was replaced; it has stopped"
            );
        }
        if let (None, Some(model)) = (&running, wanted) {
            tracing::info!(consumer = model.consumer, role = role.as_str(), "consuming for a read model");
            *running = Some(self.start(role, model, changed.clone())?);
        }
        Ok(())
    }

    fn start(&self, role: Role, model: Stored, changed: Arc<Notify>) -> Result<Running, SettingError> {
        let name = model.consumer;
        let (pool, waker, queue) = match role {
            // A live model's own queue is what is left of the time when it was a shadow.
            Role::Live => (self.pool.clone(), Some(self.waker.clone()), self.queue.clone()),
            Role::Shadow => (self.shadow_pool(), None, model.queue.unwrap_or_default()),
        };
        let config = inbox::Config {
            batch: self.batch,
            max_refused: self.max_refused,
            max_held: self.max_held,
            max_rejected: self.max_rejected,
            max_gaps: self.max_gaps,
            ..inbox::Config::new(topology(&queue)?, self.nodes.clone(), format!("score-projector {name}"))
        };
        let model = Model::new(role, name.clone(), waker).on_replaced(changed);
        let sequencer =
            Sequencer::new(&*name, pool.clone(), Projection::new(model)).following(self.sources.clone());
        let consumer = Consumer::new(config, sequencer);
        let stop = CancellationToken::new();
        let until = stop.clone();
        let task = match role {
            Role::Live => {
                self.known.is_known_as("consumer", &name);
                let shown =
                    mirror(consumer.status(), self.health.clone(), self.attention.clone(), stop.clone());
                tokio::spawn(async move {
                    tokio::join!(consumer.run(until), shown);
                })
            }
            // A shadow that waits is no reason for the program not to be ready: it does its work.
            Role::Shadow => tokio::spawn(async move {
                consumer.run(until).await;
                pool.close().await;
            }),
        };
        Ok(Running { name, stop, task })
    }

    /// Whoever has a connection of this pool may write to the shadow, and says so by its lock: what
    /// removes a shadow waits until they are gone.
    fn shadow_pool(&self) -> PgPool {
        let database = Role::Shadow.options(self.options.clone());
        let options = database.options();
        PgPoolOptions::new()
            .max_connections(SHADOW_POOL_SIZE)
            .acquire_timeout(Duration::from_secs(5))
            .after_connect(move |conn, _| {
                let database = database.clone();
                Box::pin(async move {
                    database.prepare(conn).await?;
                    rebuild::hold_shadow(conn).await
                })
            })
            .connect_lazy_with(options)
    }
}

impl Running {
    async fn end(self) -> anyhow::Result<()> {
        self.stop.cancel();
        Ok(self.task.await?)
    }
}

/// Exchanges and queues of a person's events.
pub(crate) fn topology(queue: &str) -> Result<Topology, SettingError> {
    Topology::new(events::EXCHANGE, events::EXCHANGE_BY_AGGREGATE, queue, &[events::AGGREGATE_PERSON])
        .map_err(|e| SettingError::new("QUEUE", e))
}

/// Shows in the program's readiness what the consumer waits for, until `stop`.
async fn mirror(
    mut status: watch::Receiver<inbox::Status>,
    parts: [Part; 4],
    attention: [Part; 3],
    stop: CancellationToken,
) {
    loop {
        let now = status.borrow_and_update().clone();
        let consuming = now.consuming.and(now.applying);
        for (part, state) in parts.iter().zip([now.database, now.broker, consuming, now.sources]) {
            match state {
                Ok(()) => part.ready(),
                Err(reason) => part.waiting(reason),
            }
        }
        for (part, reason) in attention.iter().zip([now.holes, now.forks, now.limits]) {
            match reason {
                Some(reason) => part.attention(reason),
                None => part.ready(),
            }
        }
        if !matches!(stop.run_until_cancelled(status.changed()).await, Some(Ok(()))) {
            return;
        }
    }
}
