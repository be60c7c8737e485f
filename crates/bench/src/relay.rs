//! How fast the relay drains waiting events, next to a bare publisher that has them in memory.

use anyhow::ensure;
use sqlx::{Connection, Executor, PgConnection};
use tokio::time::Instant;

use super::{
    broker::{self, BrokerConnection},
    events::{self, EventBatch, Message, Traced},
    figure::{Figure, Row},
    goal::Goal,
    processor_time::{ProcessorTime, Sample},
    statistics::{Spread, number, rate},
    testbed::Testbed,
    wait,
};
use devstack::program::Program;

const DATABASE: &str = "bench_relay";
const VHOST: &str = "relay";
const QUEUE: &str = "bench";
/// Connections of the bare publisher; the best counts.
const LANES: [usize; 3] = [1, 2, 4];

/// See [`Row`].
#[derive(Debug)]
pub struct Relay {
    drain: Drain,
    /// What the bare publisher came to, by lanes.
    bare: [Vec<f64>; LANES.len()],
    spent_bare: ProcessorTime,
    mean_body: f64,
}

impl Figure for Relay {
    const ROWS: &'static [Row] = &[Row {
        name: "relay",
        system: "drains waiting events into one quorum queue, until low_water has passed them",
        ceiling: Some("a bare publisher of the same messages, best of 1, 2 and 4 connections"),
        unit: "events/s",
        goal: Goal::RatioAtLeast(0.95),
    }];

    async fn prepare(testbed: &Testbed) -> anyhow::Result<Self> {
        let drain = Drain::prepare(testbed, DATABASE, VHOST).await?;
        Ok(Self { drain, bare: Default::default(), spent_bare: ProcessorTime::default(), mean_body: 0.0 })
    }

    async fn system(&mut self, testbed: &Testbed) -> anyhow::Result<Vec<f64>> {
        Ok(vec![self.drain.round(testbed, testbed.size.events).await?])
    }

    async fn ceiling(&mut self, testbed: &Testbed) -> anyhow::Result<Vec<f64>> {
        let messages = self.drain.messages(testbed.size.events).await?;
        self.mean_body = events::mean_body(&messages);
        let connection = BrokerConnection::open(&self.drain.amqp).await?;
        let mut best: f64 = 0.0;
        for (lanes, rates) in LANES.into_iter().zip(&mut self.bare) {
            connection.fresh_queue(QUEUE).await?;
            testbed.settle().await?;
            let messages = messages.clone();
            let begin = Sample::take();
            let rate = rate(testbed.size.events, broker::publish(&self.drain.amqp, messages, lanes).await?);
            self.spent_bare.add(&begin, testbed.size.events);
            rates.push(rate);
            best = best.max(rate);
        }
        connection.delete_queue(QUEUE).await?;
        connection.close().await?;
        Ok(vec![best])
    }

    async fn finish(self, testbed: &Testbed) -> anyhow::Result<Vec<String>> {
        let by_lanes = LANES.iter().zip(&self.bare);
        let by_lanes = by_lanes.map(|(n, rates)| format!("{} with {n}", number(Spread::of(rates).median)));
        let notes = vec![
            format!(
                "relay: the bare publisher's medians are {} connections; a body has {} bytes on average",
                by_lanes.collect::<Vec<_>>().join(", "),
                number(self.mean_body),
            ),
            format!(
                "relay: µs of processor time an event, the system: {}; its ceiling: {}",
                self.drain.spent.summary(),
                self.spent_bare.summary()
            ),
        ];
        self.drain.end(testbed, VHOST).await?;
        Ok(notes)
    }
}

/// A relay that runs and has nothing to do, until a batch of events is committed at once.
#[derive(Debug)]
pub(crate) struct Drain {
    database: &'static str,
    pub(crate) conn: PgConnection,
    pub(crate) amqp: String,
    pub(crate) relay: Program,
    batch: i64,
    traced: Traced,
    spent: ProcessorTime,
}

impl Drain {
    /// On a database and a virtual host of its own.
    pub(crate) async fn prepare(
        testbed: &Testbed,
        database: &'static str,
        vhost: &str,
    ) -> anyhow::Result<Self> {
        let conn = testbed.database("person", database).await?;
        let amqp = testbed.virtual_host(vhost).await?;
        let [_, relay, ..] = testbed.programs(database, "score", vhost)?;
        let (traced, spent) = (Traced::default(), ProcessorTime::default());
        Ok(Self { database, conn, amqp, relay, batch: 0, traced, spent })
    }

    /// Whether its events have traces.
    #[must_use]
    pub(crate) fn traced(self, traced: Traced) -> Self {
        Self { traced, ..self }
    }

    /// The processor time of an event.
    pub(crate) fn spent(&self) -> String {
        self.spent.summary()
    }

    /// Goes on with persons that no batch was about so far.
    pub(crate) fn begin_with(&mut self, batch: i64) {
        self.batch = batch;
    }

    /// Events a second, from the commit that makes `count` of them visible until `low_water` has passed
    /// the last.
    pub(crate) async fn round(&mut self, testbed: &Testbed, count: i64) -> anyhow::Result<f64> {
        if self.relay.process().is_none() {
            self.relay.start().await?;
            self.relay.ready(wait::READY_TIMEOUT).await?;
        }
        let connection = BrokerConnection::open(&self.amqp).await?;
        connection.fresh_queue(QUEUE).await?;
        let mut tx = self.conn.begin().await?;
        EventBatch { batch: self.batch, count }.append(self.traced, &mut tx).await?;
        self.batch += 1;
        let last: i64 =
            sqlx::query_scalar("SELECT last_value FROM outbox.position").fetch_one(&mut *tx).await?;
        // What was inserted is on disk, so the commit is only a commit.
        testbed.settle().await?;
        let (sample, begin) = (Sample::take(), Instant::now());
        tx.commit().await?;
        self.conn.execute("SELECT pg_notify('outbox_event', '')").await?;
        until_settled(&mut self.conn, last).await?;
        let took = begin.elapsed();
        self.spent.add(&sample, count);
        let arrived = connection.waiting(QUEUE).await?;
        ensure!(arrived >= count, "{arrived} of {count} events are in the queue");
        connection.delete_queue(QUEUE).await?;
        connection.close().await?;
        Ok(rate(count, took))
    }

    /// The messages of the last `count` events; of new ones when there are none yet.
    async fn messages(&mut self, count: i64) -> anyhow::Result<Vec<Message>> {
        let last: i64 = sqlx::query_scalar("SELECT coalesce(max(position), 0) FROM outbox.event")
            .fetch_one(&mut self.conn)
            .await?;
        if last < count {
            return EventBatch { batch: self.batch, count }.messages(&mut self.conn).await;
        }
        events::above(&mut self.conn, last - count).await
    }

    /// Ends the relay and removes everything.
    pub(crate) async fn end(mut self, testbed: &Testbed, vhost: &str) -> anyhow::Result<()> {
        self.relay.kill().await;
        self.conn.close().await?;
        testbed.drop_virtual_host(vhost).await?;
        testbed.drop_database(self.database).await
    }
}

/// Waits until the relay `default` has settled everything up to `position`.
pub(crate) async fn until_settled(conn: &mut PgConnection, position: i64) -> anyhow::Result<()> {
    wait::until("the relay settles the last event", async || {
        let low_water: i64 = sqlx::query_scalar("SELECT low_water FROM outbox.relay WHERE name = 'default'")
            .fetch_one(&mut *conn)
            .await?;
        Ok((low_water >= position).then_some(()))
    })
    .await
}
