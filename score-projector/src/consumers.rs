//! One consumer for each read model: always for the live one, and for a shadow during a rebuild.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use anyhow::anyhow;
use daemon::{
    config::{SettingError, database::Database},
    health::{Health, Part},
};
use inbox::{Consumer, Nodes, Sequencer, Sources};
use outbox::Waker;
use sqlx::{PgPool, postgres::PgPoolOptions};
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use crate::{
    broker::topology,
    model::{self, Model, Role, StoredModel},
    projection::Projection,
};

/// How often the list of models is read. A write to a replaced model makes it sooner.
const LOOK: Duration = Duration::from_secs(2);
/// Connections of a shadow's consumer: two for its queue, two for its dead letters, one for the check of the database.
const SHADOW_POOL_SIZE: u32 = 5;

/// The settings that the consumers share.
#[derive(Debug)]
pub(crate) struct Consumers {
    pub(crate) pool: PgPool,
    /// The options of the pool, for the shadow's own pool.
    pub(crate) options: Database,
    pub(crate) queue: String,
    pub(crate) nodes: Nodes,
    pub(crate) batch: u16,
    pub(crate) max_refused: u32,
    pub(crate) max_held: u32,
    pub(crate) max_rejected: u32,
    pub(crate) max_gaps: u32,
    /// The sources and their broker users.
    pub(crate) sources: Sources,
    /// Notifies readers of the live model's commits.
    pub(crate) waker: Waker,
    /// The program's health: it names the live model's consumer.
    pub(crate) known: Health,
    /// The readiness of the live model's consumer.
    pub(crate) health: [Part; 4],
    /// What an operator should look at in its inbox.
    pub(crate) attention: [Part; 5],
}

/// A running consumer.
struct Running {
    name: String,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Consumers {
    /// Starts and stops consumers as `score.model` requires, until `stop`. Then each drains. Fails when one ends by
    /// itself.
    pub(crate) async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let changed = Arc::new(Notify::new());
        let mut running: [(Role, Option<Running>); 2] = [(Role::Live, None), (Role::Shadow, None)];
        while !stop.is_cancelled() {
            match self.wanted().await {
                Ok(wanted) => {
                    let before =
                        names(running.iter().filter_map(|(_, running)| Some(&running.as_ref()?.name)));
                    let after = names(wanted.iter().flatten().map(|model| &model.consumer));
                    for ((role, consumer), wanted) in running.iter_mut().zip(wanted) {
                        self.follow(*role, consumer, wanted, &changed).await?;
                    }
                    // Its name is never used again.
                    for gone in before.difference(&after) {
                        self.known.is_gone(&[("consumer", gone)]);
                    }
                }
                // The consumers report it themselves, and go on.
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

    async fn wanted(&self) -> sqlx::Result<[Option<StoredModel>; 2]> {
        model::consumed(&mut *self.pool.acquire().await?).await
    }

    /// Runs the wanted consumer of this role. Another one drains first.
    async fn follow(
        &self,
        role: Role,
        running: &mut Option<Running>,
        wanted: Option<StoredModel>,
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

    fn start(&self, role: Role, model: StoredModel, changed: Arc<Notify>) -> Result<Running, SettingError> {
        let name = model.consumer;
        let (pool, waker, queue) = match role {
            // A queue of a live model's own is left over from the time when it was a shadow.
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
            // The program stays ready while a shadow waits, since the live model goes on.
            Role::Shadow => tokio::spawn(async move {
                consumer.run(until).await;
                pool.close().await;
            }),
        };
        Ok(Running { name, stop, task })
    }

    /// Each connection of this pool may write to the shadow and holds the shadow's lock, so the removal of a shadow
    /// waits until these connections are closed.
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
                    model::lock_shadow(conn).await
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

fn names<'a>(names: impl Iterator<Item = &'a String>) -> BTreeSet<String> {
    names.cloned().collect()
}

/// Copies the consumer's status to the program's readiness, until `stop`.
async fn mirror(
    mut status: watch::Receiver<inbox::Status>,
    parts: [Part; 4],
    attention: [Part; 5],
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
        for (part, reason) in
            attention.iter().zip([now.holes, now.forks, now.incarnations, now.queue, now.limits])
        {
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
