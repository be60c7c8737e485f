//! The peak memory of the relay, with many events waiting and with few.

use std::fmt::Display;

use anyhow::Context;
use sqlx::{Connection, PgConnection};

use super::{
    broker::BrokerConnection,
    figure::{Figure, Row},
    goal::Goal,
    growth::{history, settled},
    statistics::float,
    testbed::Testbed,
    wait,
};
use devstack::program::Program;

const DATABASE: &str = "bench_memory";
const VHOST: &str = "memory";
const QUEUE: &str = "bench";
/// What waits when there is little.
const FEW: i64 = 10_000;

/// See [`Row`].
#[derive(Debug)]
pub struct Memory {
    conn: PgConnection,
    amqp: String,
    names: usize,
}

impl Figure for Memory {
    const ROWS: &'static [Row] = &[
        Row {
            name: "memory, how much more",
            system: "the relay's peak while it drains 100,000 of 2,000,000 waiting events",
            ceiling: Some("itself with 10,000 waiting"),
            unit: "MB",
            goal: Goal::DifferenceAtMost(16.0),
        },
        Row {
            name: "memory",
            system: "the relay's peak, the same",
            ceiling: None,
            unit: "MB",
            goal: Goal::Below(64.0),
        },
    ];

    async fn prepare(testbed: &Testbed) -> anyhow::Result<Self> {
        let conn = testbed.database("person", DATABASE).await?;
        let amqp = testbed.virtual_host(VHOST).await?;
        history(testbed, DATABASE, testbed.size.waiting).await?;
        Ok(Self { conn, amqp, names: 0 })
    }

    async fn system(&mut self, testbed: &Testbed) -> anyhow::Result<Vec<f64>> {
        let peak = self.peak(testbed, testbed.size.waiting, testbed.size.events).await?;
        Ok(vec![peak, peak])
    }

    async fn ceiling(&mut self, testbed: &Testbed) -> anyhow::Result<Vec<f64>> {
        Ok(vec![self.peak(testbed, FEW, FEW).await?])
    }

    async fn finish(self, testbed: &Testbed) -> anyhow::Result<Vec<String>> {
        self.conn.close().await?;
        testbed.drop_virtual_host(VHOST).await?;
        testbed.drop_database(DATABASE).await?;
        Ok(Vec::new())
    }
}

impl Memory {
    /// The peak of a relay of a name of its own that has drained `drained` of `waiting` events.
    async fn peak(&mut self, testbed: &Testbed, waiting: i64, drained: i64) -> anyhow::Result<f64> {
        self.names += 1;
        let name = format!("memory{}", self.names);
        settled(&mut self.conn, &name, waiting).await?;
        let connection = BrokerConnection::open(&self.amqp).await?;
        connection.fresh_queue(QUEUE).await?;
        let [_, relay, ..] = testbed.programs(DATABASE, "score", VHOST)?;
        let mut relay = relay.env("RELAY_NAME", &name);
        relay.start().await?;
        wait::until("the relay drains", async || {
            Ok((connection.waiting(QUEUE).await? >= drained).then_some(()))
        })
        .await?;
        let peak = peak(&mut relay)?;
        relay.kill().await;
        connection.delete_queue(QUEUE).await?;
        connection.close().await?;
        Ok(peak)
    }
}

/// Peak resident memory of a program, in megabytes.
fn peak(program: &mut Program) -> anyhow::Result<f64> {
    peak_of(program.process().context("it runs")?.pid()).context("no VmHWM")
}

/// Peak resident memory of a process, in megabytes; none when it has ended.
pub(crate) fn peak_of(pid: impl Display) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    // VmHWM:     12345 kB
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: i64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    Some(float(kib) * 1.024 / 1000.0)
}
