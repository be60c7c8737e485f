//! How fast the projector applies messages that wait, against a consumer that only acknowledges them.

use sqlx::{Connection, PgConnection};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    bare::{self, Link},
    events::{EACH, Message, Stream},
    figure::{Figure, Row},
    goal::Goal,
    ground::Ground,
    processor::{Sample, Spent},
    statistics::rate,
    wait,
};
use devstack::program::Program;

const DATABASE: &str = "bench_project";
const VHOST: &str = "project";
/// The bare consumer's queue is in another one, so that nothing is published twice.
const BARE: &str = "project_bare";
const QUEUE: &str = "bench";
/// The projector's own.
const SCORE: &str = "score";

/// See [`Row`].
#[derive(Debug)]
pub struct Project {
    conn: PgConnection,
    amqp: String,
    bare: String,
    projector: Program,
    batch: i64,
    spent: [Spent; 2],
}

impl Figure for Project {
    const ROWS: &'static [Row] = &[Row {
        name: "project",
        system: "applies waiting messages to the read model, from its start until the last commit",
        ceiling: Some("a bare consumer, same prefetch and multiple acks, no database"),
        unit: "messages/s",
        goal: Goal::RatioAtLeast(0.6),
    }];

    async fn prepare(ground: &Ground) -> anyhow::Result<Self> {
        let conn = ground.database("score", DATABASE).await?;
        let (amqp, bare) = (ground.virtual_host(VHOST).await?, ground.virtual_host(BARE).await?);
        let [_, _, mut projector, ..] = ground.programs("person", DATABASE, VHOST)?;
        // It declares its queue.
        projector.start().await?;
        projector.ready(wait::READY).await?;
        projector.stop(&CancellationToken::new()).await;
        Ok(Self { conn, amqp, bare, projector, batch: 0, spent: Default::default() })
    }

    async fn system(&mut self, ground: &Ground) -> anyhow::Result<Vec<f64>> {
        let count = ground.size.events;
        let messages = self.messages(count).await?;
        bare::publish(&self.amqp, messages, 2).await?;
        ground.settle().await?;
        let goal = self.batch * count;
        let (sample, begin) = (Sample::take(), Instant::now());
        self.projector.start().await?;
        let link = Link::open(&self.amqp).await?;
        wait::until("the projector has taken the last message", async || {
            Ok((link.waiting(SCORE).await? == 0).then_some(()))
        })
        .await?;
        wait::until("the projector has applied the last event", async || {
            let applied: i64 = sqlx::query_scalar("SELECT sum(version)::bigint FROM inbox.aggregate")
                .fetch_one(&mut self.conn)
                .await?;
            Ok((applied >= goal).then_some(()))
        })
        .await?;
        let took = begin.elapsed();
        self.spent[0].add(&sample, count);
        self.projector.stop(&CancellationToken::new()).await;
        link.close().await?;
        Ok(vec![rate(count, took)])
    }

    async fn ceiling(&mut self, ground: &Ground) -> anyhow::Result<Vec<f64>> {
        let count = ground.size.events;
        let messages = Stream { batch: self.batch, count }.messages(&mut self.conn).await?;
        let link = Link::open(&self.bare).await?;
        link.fresh_queue(QUEUE).await?;
        bare::publish(&self.bare, messages, 2).await?;
        ground.settle().await?;
        let sample = Sample::take();
        let took = bare::consume(&self.bare, QUEUE, count).await?;
        self.spent[1].add(&sample, count);
        link.delete_queue(QUEUE).await?;
        link.close().await?;
        Ok(vec![rate(count, took)])
    }

    async fn finish(mut self, ground: &Ground) -> anyhow::Result<Vec<String>> {
        self.projector.kill().await;
        self.conn.close().await?;
        for vhost in [VHOST, BARE] {
            ground.drop_virtual_host(vhost).await?;
        }
        ground.drop_database(DATABASE).await?;
        let [system, ceiling] = self.spent.each_ref().map(Spent::told);
        Ok(vec![
            format!("project: {EACH} events of each person, none next to each other"),
            format!("project: µs of processor time a message, the system: {system}; its ceiling: {ceiling}"),
        ])
    }
}

impl Project {
    /// The events of persons that were not there yet.
    async fn messages(&mut self, count: i64) -> anyhow::Result<Vec<Message>> {
        let messages = Stream { batch: self.batch, count }.messages(&mut self.conn).await?;
        self.batch += 1;
        Ok(messages)
    }
}
