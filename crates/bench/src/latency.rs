//! How soon a write can be read: through the whole system, next to the sum of the unavoidable steps.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context;
use futures_util::StreamExt;
use lapin::options::BasicAckOptions;
use sqlx::{Connection, Executor, PgConnection};
use tokio::{sync::Mutex, task::JoinSet, time::Instant};

use super::{
    broker::BrokerConnection,
    events::EventBatch,
    figure::{Figure, Row},
    goal::Goal,
    http::{self, Client},
    processor_time::{ProcessorTime, Sample},
    statistics::{Spread, number, quantile},
    testbed::Testbed,
    wait, write,
};
use devstack::program::Program;

const PERSON: &str = "bench_latency_person";
const SCORE: &str = "bench_latency_score";
const VHOST: &str = "latency";
const QUEUE: &str = "bench";
/// Whom the writes are about.
const PERSONS: i64 = 1_000;
/// Connections that take turns; with more than this under way, the next write is late, and its delay
/// counts.
const CONNECTIONS: usize = 64;
/// Of each part of the floor.
const SAMPLES: usize = 300;

/// See [`Row`].
#[derive(Debug)]
pub struct Latency {
    programs: [Program; 5],
    amqp: String,
    clients: Vec<Arc<Mutex<Clients>>>,
    /// Commit, confirm and delivery, round by round.
    floors: [Vec<f64>; 3],
    all: Vec<f64>,
    spent: ProcessorTime,
}

/// A client's connections to both services.
#[derive(Debug)]
struct Clients {
    person: Client,
    score: Client,
}

impl Figure for Latency {
    const ROWS: &'static [Row] = &[
        Row {
            name: "latency, median",
            system: "POST sent until the score with that version was read, at 200 writes/s",
            ceiling: Some("floor: a commit + a confirm + a delivery + a commit"),
            unit: "ms",
            goal: Goal::RatioAtMost(2.5),
        },
        Row {
            name: "latency, 99 of 100",
            system: "the same",
            ceiling: Some("the same floor"),
            unit: "ms",
            goal: Goal::RatioAtMost(10.0),
        },
    ];

    async fn prepare(testbed: &Testbed) -> anyhow::Result<Self> {
        for (template, name) in [("person", PERSON), ("score", SCORE)] {
            testbed.database(template, name).await?.close().await?;
        }
        let amqp = testbed.virtual_host(VHOST).await?;
        let mut programs = testbed.programs(PERSON, SCORE, VHOST)?;
        for program in &mut programs {
            program.start().await?;
        }
        for program in &mut programs {
            program.ready(wait::READY_TIMEOUT).await?;
        }
        let [person, _, _, _, score] = &programs;
        let (person, score) = (http::address(&person.url())?, http::address(&score.url())?);
        create(&mut Clients::connect(person, score).await?).await?;
        // Only now: the services close a connection that sends no request for ten seconds.
        let mut clients = Vec::new();
        for _ in 0..CONNECTIONS {
            clients.push(Arc::new(Mutex::new(Clients::connect(person, score).await?)));
        }
        let latency = Self {
            programs,
            amqp,
            clients,
            floors: Default::default(),
            all: Vec::new(),
            spent: ProcessorTime::default(),
        };
        // Warm.
        latency.writes(Duration::from_secs(1), testbed.size.apart).await?;
        Ok(latency)
    }

    async fn system(&mut self, testbed: &Testbed) -> anyhow::Result<Vec<f64>> {
        testbed.settle().await?;
        let sample = Sample::take();
        let times = self.writes(testbed.size.load, testbed.size.apart).await?;
        self.spent.add(&sample, i64::try_from(times.len())?);
        let values = vec![quantile(&times, 500), quantile(&times, 990)];
        self.all.extend(times);
        Ok(values)
    }

    async fn ceiling(&mut self, testbed: &Testbed) -> anyhow::Result<Vec<f64>> {
        let mut conn = testbed.connect(PERSON).await?;
        let commit = commits(&mut conn).await?;
        let (confirm, delivery) = broker(&mut conn, &self.amqp).await?;
        for (all, one) in self.floors.iter_mut().zip([commit, confirm, delivery]) {
            all.push(one);
        }
        let floor = commit + confirm + delivery + commit;
        Ok(vec![floor, floor])
    }

    async fn finish(mut self, testbed: &Testbed) -> anyhow::Result<Vec<String>> {
        for program in &mut self.programs {
            program.kill().await;
        }
        testbed.drop_virtual_host(VHOST).await?;
        testbed.drop_database(PERSON).await?;
        testbed.drop_database(SCORE).await?;
        let median = |values: &Vec<f64>| number(Spread::of(values).median);
        let [commit, confirm, delivery] = self.floors.each_ref().map(median);
        let at = [500, 900, 990, 999, 1000].map(|thousandths| number(quantile(&self.all, thousandths)));
        let [p50, p90, p99, p999, most] = at;
        Ok(vec![
            format!(
                "latency: a commit takes {commit} ms, a confirmed publish {confirm} ms, a delivery {delivery} ms"
            ),
            format!(
                "latency: of {} writes, {p50} ms at the median, {p90} ms at 90 %, {p99} ms at 99 %, {p999} ms at 99.9 %, {most} ms at most",
                self.all.len()
            ),
            format!("latency: µs of processor time a write: {}", self.spent.summary()),
        ])
    }
}

impl Latency {
    /// Milliseconds from when each write was due until the score that contains it was read.
    async fn writes(&self, length: Duration, apart: Duration) -> anyhow::Result<Vec<f64>> {
        let begin = Instant::now();
        let mut tasks = JoinSet::new();
        let mut due = begin;
        let mut clients = self.clients.iter().cycle();
        while due.duration_since(begin) < length {
            tokio::time::sleep_until(due).await;
            let client = Arc::clone(clients.next().context("there are clients")?);
            tasks.spawn(async move {
                let cpf = rand::random_range(1..=PERSONS);
                client.lock().await.write(&write::income(cpf, 1_000), cpf).await?;
                anyhow::Ok(due.elapsed().as_secs_f64() * 1_000.0)
            });
            due += apart;
        }
        let mut times = Vec::new();
        while let Some(task) = tasks.join_next().await {
            times.push(task??);
        }
        Ok(times)
    }
}

/// Creates the persons, and waits until the last is known to the score.
async fn create(pair: &mut Clients) -> anyhow::Result<()> {
    for cpf in 1..=PERSONS {
        let body = format!(r#"{{"cpf":{cpf},"name":"Maria da Silva Santos","date_of_birth":"1980-05-17"}}"#);
        pair.write(&http::post("/person", &body), cpf).await?;
    }
    Ok(())
}

impl Clients {
    async fn connect(person: SocketAddr, score: SocketAddr) -> anyhow::Result<Self> {
        Ok(Self { person: Client::connect(person).await?, score: Client::connect(score).await? })
    }

    /// Writes, and reads the score with it.
    async fn write(&mut self, request: &str, cpf: i64) -> anyhow::Result<()> {
        let response = self.person.send(request).await?;
        response.expect(201)?;
        let token = response.header("etag").context("a write without an ETag")?.trim_matches('"');
        let read = http::get(&format!("/{cpf}/score?after={token}&wait=10s"));
        self.score.send(&read).await?.expect(200)
    }
}

/// Milliseconds of the fastest way to commit a row.
async fn commits(conn: &mut PgConnection) -> anyhow::Result<f64> {
    conn.execute("CREATE TABLE IF NOT EXISTS public.floor (n bigint)").await?;
    let mut times = Vec::with_capacity(SAMPLES);
    for n in 0..SAMPLES {
        let begin = Instant::now();
        sqlx::query("INSERT INTO public.floor VALUES ($1)")
            .bind(i64::try_from(n)?)
            .execute(&mut *conn)
            .await?;
        times.push(begin.elapsed().as_secs_f64() * 1_000.0);
    }
    Ok(quantile(&times, 500))
}

/// Milliseconds of a confirmed publish, with one under way at a time; and of a delivery, with one sent at
/// a time: from the ack of the last message to the next one.
async fn broker(conn: &mut PgConnection, url: &str) -> anyhow::Result<(f64, f64)> {
    let count = i64::try_from(SAMPLES)?;
    let messages = EventBatch { batch: 0, count }.messages(conn).await?;
    let connection = BrokerConnection::open(url).await?.confirmed().await?;
    // Beside the exchange that the system uses.
    connection.private_queue(QUEUE).await?;
    let mut confirms = Vec::with_capacity(SAMPLES);
    for message in messages {
        let begin = Instant::now();
        connection.publish_to(QUEUE, message).await?;
        confirms.push(begin.elapsed().as_secs_f64() * 1_000.0);
    }
    let mut deliveries = connection.consume(QUEUE, 1).await?;
    let mut times = Vec::with_capacity(SAMPLES);
    let mut begin = None;
    for _ in 0..SAMPLES {
        let delivery = deliveries.next().await.context("the broker cancelled the consumer")??;
        times.extend(begin.map(|begin: Instant| begin.elapsed().as_secs_f64() * 1_000.0));
        begin = Some(Instant::now());
        connection.channel.basic_ack(delivery.delivery_tag, BasicAckOptions::default()).await?;
    }
    connection.delete_queue(QUEUE).await?;
    connection.close().await?;
    Ok((quantile(&confirms, 500), quantile(&times, 500)))
}
