//! How many reads per second score-api serves, next to the same select by pgbench.

use std::{net::SocketAddr, time::Duration};

use sqlx::{Connection, PgConnection};

use super::{
    figure::{Figure, Row},
    goal::Goal,
    http, pgbench,
    processor_time::{ProcessorTime, Sample},
    testbed::Testbed,
    wait,
    write::CLIENTS,
};
use devstack::program::Program;

const DATABASE: &str = "bench_read";

/// The row of one person, as score-api has it of as many as ask at the same time.
const SELECT: &str = "SELECT id, version, total, updated_at FROM score.person
WHERE cpf = :cpf ORDER BY created_at DESC, id DESC LIMIT 1";

/// See [`Row`].
#[derive(Debug)]
pub struct Read {
    conn: PgConnection,
    api: Program,
    address: SocketAddr,
    persons: i64,
    script: String,
    spent: [ProcessorTime; 2],
}

impl Figure for Read {
    const ROWS: &'static [Row] = &[Row {
        name: "read",
        system: "GET /{cpf}/score, 16 keep-alive clients",
        ceiling: Some("pgbench with the select of one score, prepared, 16 clients"),
        unit: "reads/s",
        goal: Goal::RatioAtLeast(0.5),
    }];

    async fn prepare(testbed: &Testbed) -> anyhow::Result<Self> {
        let mut conn = testbed.database("score", DATABASE).await?;
        let persons = testbed.size.persons;
        sqlx::query(
            "INSERT INTO score.person (id, cpf, created_at, version, total)
             SELECT gen_random_uuid(), n, now(), 4, 4970 FROM generate_series(1, $1::bigint) n",
        )
        .bind(persons)
        .execute(&mut conn)
        .await?;
        sqlx::query("VACUUM ANALYZE score.person").execute(&mut conn).await?;
        let [_, _, _, _, mut api] = testbed.programs("person", DATABASE, "%2f")?;
        api.start().await?;
        api.ready(wait::READY_TIMEOUT).await?;
        let address = http::address(&api.url())?;
        let script = format!("\\set cpf random(1, {persons})\n{};\n", SELECT.replace('\n', " "));
        let read = Self { conn, api, address, persons, script, spent: Default::default() };
        // Warm.
        read.load(Duration::from_secs(1)).await?;
        Ok(read)
    }

    async fn system(&mut self, testbed: &Testbed) -> anyhow::Result<Vec<f64>> {
        let sample = Sample::take();
        let rate = self.load(testbed.size.load).await?;
        self.spent[0].add_rate(&sample, rate, testbed.size.load);
        Ok(vec![rate])
    }

    async fn ceiling(&mut self, testbed: &Testbed) -> anyhow::Result<Vec<f64>> {
        let account = ["score_api", DATABASE];
        let sample = Sample::take();
        let rate = pgbench::run(testbed, account, &self.script, CLIENTS, testbed.size.load).await?;
        self.spent[1].add_rate(&sample, rate, testbed.size.load);
        Ok(vec![rate])
    }

    async fn finish(mut self, testbed: &Testbed) -> anyhow::Result<Vec<String>> {
        self.api.kill().await;
        self.conn.close().await?;
        testbed.drop_database(DATABASE).await?;
        let [system, ceiling] = self.spent.each_ref().map(ProcessorTime::summary);
        Ok(vec![format!("read: µs of processor time each, the system: {system}; its ceiling: {ceiling}")])
    }
}

impl Read {
    async fn load(&self, length: Duration) -> anyhow::Result<f64> {
        let persons = self.persons;
        let request = move || http::get(&format!("/{}/score", rand::random_range(1..=persons)));
        http::load(self.address, CLIENTS as usize, length, 200, request).await
    }
}
