//! How fast the projector applies waiting messages, next to a consumer that only acknowledges them.

use sqlx::{Connection, PgConnection};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    broker::{self, BrokerConnection},
    events::{EVENTS_PER_PERSON, EventBatch, Message},
    figure::{Figure, Row},
    goal::Goal,
    processor_time::{ProcessorTime, Sample},
    statistics::rate,
    testbed::Testbed,
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
    spent: [ProcessorTime; 2],
}

impl Figure for Project {
    const ROWS: &'static [Row] = &[Row {
        name: "project",
        system: "applies waiting messages to the read model, from its start until the last commit",
        ceiling: Some("a bare consumer, same prefetch and multiple acks, no database"),
        unit: "messages/s",
        goal: Goal::RatioAtLeast(0.6),
    }];

    async fn prepare(testbed: &Testbed) -> anyhow::Result<Self> {
        let conn = testbed.database("score", DATABASE).await?;
        let (amqp, bare) = (testbed.virtual_host(VHOST).await?, testbed.virtual_host(BARE).await?);
        let [_, _, mut projector, ..] = testbed.programs("person", DATABASE, VHOST)?;
        // It declares its queue.
        projector.start().await?;
        projector.ready(wait::READY_TIMEOUT).await?;
        projector.stop(&CancellationToken::new()).await;
        Ok(Self { conn, amqp, bare, projector, batch: 0, spent: Default::default() })
    }

    async fn system(&mut self, testbed: &Testbed) -> anyhow::Result<Vec<f64>> {
        let count = testbed.size.events;
        let messages = self.messages(count).await?;
        broker::publish(&self.amqp, messages, 2).await?;
        testbed.settle().await?;
        let goal = self.batch * count;
        let (sample, begin) = (Sample::take(), Instant::now());
        self.projector.start().await?;
        let connection = BrokerConnection::open(&self.amqp).await?;
        wait::until("the projector has taken the last message", async || {
            Ok((connection.waiting(SCORE).await? == 0).then_some(()))
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
        connection.close().await?;
        Ok(vec![rate(count, took)])
    }

    async fn ceiling(&mut self, testbed: &Testbed) -> anyhow::Result<Vec<f64>> {
        let count = testbed.size.events;
        let messages = EventBatch { batch: self.batch, count }.messages(&mut self.conn).await?;
        let connection = BrokerConnection::open(&self.bare).await?;
        connection.fresh_queue(QUEUE).await?;
        broker::publish(&self.bare, messages, 2).await?;
        testbed.settle().await?;
        let sample = Sample::take();
        let took = broker::consume(&self.bare, QUEUE, count).await?;
        self.spent[1].add(&sample, count);
        connection.delete_queue(QUEUE).await?;
        connection.close().await?;
        Ok(vec![rate(count, took)])
    }

    async fn finish(mut self, testbed: &Testbed) -> anyhow::Result<Vec<String>> {
        self.projector.kill().await;
        self.conn.close().await?;
        for vhost in [VHOST, BARE] {
            testbed.drop_virtual_host(vhost).await?;
        }
        testbed.drop_database(DATABASE).await?;
        let [system, ceiling] = self.spent.each_ref().map(ProcessorTime::summary);
        Ok(vec![
            format!("project: {EVENTS_PER_PERSON} events of each person, none next to each other"),
            format!("project: µs of processor time a message, the system: {system}; its ceiling: {ceiling}"),
        ])
    }
}

impl Project {
    /// The events of persons that were not there yet.
    async fn messages(&mut self, count: i64) -> anyhow::Result<Vec<Message>> {
        let messages = EventBatch { batch: self.batch, count }.messages(&mut self.conn).await?;
        self.batch += 1;
        Ok(messages)
    }
}
