//! How many writes per second person-api serves, next to the same statement by pgbench.

use std::net::SocketAddr;

use sqlx::{Connection, PgConnection};

use super::{
    figure::{Figure, Row},
    goal::Goal,
    http, pgbench,
    processor_time::{ProcessorTime, Sample},
    testbed::Testbed,
    wait,
};
use devstack::program::Program;

const DATABASE: &str = "bench_write";
/// Clients, each with one request under way.
pub(crate) const CLIENTS: u32 = 16;

/// What person-api sends with the statement, without an `Idempotency-Key` and without an `If-Match`.
const PARAMETERS: [&str; 12] = [
    ":cpf",
    ":value::numeric",
    "NULL::text",
    "NULL::text",
    "NULL::text",
    "NULL::bytea",
    "'/person/11111/income/{id}'::text",
    "'created'::text",
    "NULL::uuid[]",
    "NULL::bigint[]",
    "NULL::jsonb",
    "'renting'::text",
];

/// See [`Row`].
#[derive(Debug)]
pub struct Write {
    conn: PgConnection,
    api: Program,
    address: SocketAddr,
    persons: i64,
    script: String,
    spent: [ProcessorTime; 2],
}

impl Figure for Write {
    const ROWS: &'static [Row] = &[Row {
        name: "write",
        system: "POST /person/{cpf}/income, 16 keep-alive clients",
        ceiling: Some("pgbench with the same statement, prepared, 16 clients"),
        unit: "writes/s",
        goal: Goal::RatioAtLeast(0.6),
    }];

    async fn prepare(testbed: &Testbed) -> anyhow::Result<Self> {
        let mut conn = testbed.database("person", DATABASE).await?;
        let persons = testbed.size.persons;
        sqlx::query(
            "WITH person AS (
                 INSERT INTO person.person (id, cpf, name, address, date_of_birth)
                 SELECT outbox.uuid7(), n, 'Maria da Silva Santos', 'Rua das Laranjeiras 100, Rio de Janeiro',
                        '1980-05-17'
                 FROM generate_series(1, $1::bigint) n
                 RETURNING id
             )
             INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
             SELECT 'person', id, 1, 'person.new', '{}' FROM person",
        )
        .bind(persons)
        .execute(&mut conn)
        .await?;
        sqlx::query("ANALYZE").execute(&mut conn).await?;
        let [mut api, ..] = testbed.programs(DATABASE, "score", "%2f")?;
        api.start().await?;
        api.ready(wait::READY_TIMEOUT).await?;
        let address = http::address(&api.url())?;
        let mut write =
            Self { conn, api, address, persons, script: String::new(), spent: Default::default() };
        // Warm, and with the statement to be seen.
        write.load(std::time::Duration::from_secs(1)).await?;
        let statement =
            pgbench::statement(&mut write.conn, "person-api", "INSERT INTO person.income").await?;
        let statement = pgbench::named(&statement, &PARAMETERS)?;
        write.script =
            format!("\\set cpf random(1, {persons})\n\\set value random(1, 10000)\n{statement};\n");
        Ok(write)
    }

    async fn system(&mut self, testbed: &Testbed) -> anyhow::Result<Vec<f64>> {
        testbed.settle().await?;
        let sample = Sample::take();
        let rate = self.load(testbed.size.load).await?;
        self.spent[0].add_rate(&sample, rate, testbed.size.load);
        Ok(vec![rate])
    }

    async fn ceiling(&mut self, testbed: &Testbed) -> anyhow::Result<Vec<f64>> {
        testbed.settle().await?;
        let account = ["person_api", DATABASE];
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
        Ok(vec![format!("write: µs of processor time each, the system: {system}; its ceiling: {ceiling}")])
    }
}

impl Write {
    async fn load(&self, length: std::time::Duration) -> anyhow::Result<f64> {
        let persons = self.persons;
        let request = move || {
            let (cpf, value) = (rand::random_range(1..=persons), rand::random_range(1..=10_000));
            income(cpf, value)
        };
        http::load(self.address, CLIENTS as usize, length, 201, request).await
    }
}

/// A request for an income of a person.
pub(crate) fn income(cpf: i64, value: u32) -> String {
    http::post(&format!("/person/{cpf}/income"), &format!(r#"{{"type":"renting","value":{value}}}"#))
}
