//! What the programs take when there is nothing to do.

use std::collections::BTreeMap;

use anyhow::Context;
use sqlx::{Connection, Executor, PgConnection};

use super::{
    figure::{Figure, Row},
    goal::Goal,
    statistics::{Spread, float, number},
    testbed::Testbed,
    wait,
};
use devstack::{proc, program::Program};

const PERSON: &str = "bench_idle_person";
const SCORE: &str = "bench_idle_score";
const VHOST: &str = "idle";

/// See [`Row`].
#[derive(Debug)]
pub struct Idle {
    programs: [Program; 5],
    conn: PgConnection,
    /// Of each program and of each database, round by round.
    each: BTreeMap<String, Vec<f64>>,
}

impl Figure for Idle {
    const ROWS: &'static [Row] = &[
        Row {
            name: "idle, processor",
            system: "the program that takes most, with nothing to do",
            ceiling: None,
            unit: "% of a core",
            goal: Goal::Below(1.0),
        },
        Row {
            name: "idle, statements",
            system: "the database that is asked most, with nothing to do",
            ceiling: None,
            unit: "statements/s",
            goal: Goal::Below(5.0),
        },
    ];

    async fn prepare(testbed: &Testbed) -> anyhow::Result<Self> {
        for (template, name) in [("person", PERSON), ("score", SCORE)] {
            testbed.database(template, name).await?.close().await?;
        }
        testbed.virtual_host(VHOST).await?;
        let mut programs = testbed.programs(PERSON, SCORE, VHOST)?;
        for program in &mut programs {
            program.start().await?;
        }
        for program in &mut programs {
            program.ready(wait::READY_TIMEOUT).await?;
        }
        // It counts for all databases, from wherever it is asked.
        let mut conn = testbed.connect("postgres").await?;
        conn.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements").await?;
        // Until the polls have slowed down.
        tokio::time::sleep(std::time::Duration::from_secs(3)).await;
        Ok(Self { programs, conn, each: BTreeMap::new() })
    }

    async fn system(&mut self, testbed: &Testbed) -> anyhow::Result<Vec<f64>> {
        let begin = self.counts().await?;
        tokio::time::sleep(testbed.size.idle).await;
        let end = self.counts().await?;
        let mut worst = vec![0.0_f64, 0.0];
        for (name, count) in end {
            let spent = count - begin.get(&name).copied().unwrap_or(0.0);
            let value = spent / testbed.size.idle.as_secs_f64();
            let of = usize::from(name.starts_with("bench_"));
            worst[of] = worst[of].max(value);
            self.each.entry(name).or_default().push(value);
        }
        Ok(worst)
    }

    async fn finish(mut self, testbed: &Testbed) -> anyhow::Result<Vec<String>> {
        for program in &mut self.programs {
            program.kill().await;
        }
        self.conn.close().await?;
        testbed.drop_virtual_host(VHOST).await?;
        testbed.drop_database(PERSON).await?;
        testbed.drop_database(SCORE).await?;
        let median = |(name, values): (&String, &Vec<f64>)| {
            let name =
                name.strip_prefix("bench_idle_").map_or(name.clone(), |name| format!("database {name}"));
            format!("{name} {}", number(Spread::of(values).median))
        };
        let medians: Vec<String> = self.each.iter().map(median).collect();
        Ok(vec![format!("idle, the medians of each: {}", medians.join(", "))])
    }
}

impl Idle {
    /// Hundredths of a second of processor time of each program, and statements to each database.
    async fn counts(&mut self) -> anyhow::Result<BTreeMap<String, f64>> {
        let mut counts = BTreeMap::new();
        for program in &mut self.programs {
            let name = program.name().to_owned();
            counts.insert(name, processor(program)?);
        }
        let statements: Vec<(String, i64)> = sqlx::query_as(
            "SELECT d.datname, coalesce(sum(s.calls), 0)::bigint
             FROM pg_database d LEFT JOIN pg_stat_statements(false) s ON s.dbid = d.oid
             WHERE d.datname = ANY ($1) GROUP BY d.datname",
        )
        .bind([PERSON, SCORE])
        .fetch_all(&mut self.conn)
        .await?;
        counts.extend(statements.into_iter().map(|(name, calls)| (name, float(calls))));
        Ok(counts)
    }
}

/// Processor time that a program has taken, in hundredths of a second.
fn processor(program: &mut Program) -> anyhow::Result<f64> {
    let pid = program.process().context("it runs")?.pid();
    let ticks = i64::try_from(proc::processor(pid))?;
    let hertz = i64::try_from(rustix::param::clock_ticks_per_second())?;
    Ok(float(ticks) * 100.0 / float(hertz))
}
