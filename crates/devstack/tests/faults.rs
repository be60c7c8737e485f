//! The promise under fire: whatever is stopped or killed meanwhile, every accepted write is in the score
//! exactly once. Slow, so `make test-faults` runs it.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

mod support;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use devstack::{
    program::Program,
    stack::Stack,
    testing::{DEADLINE, eventually},
};
use serde_json::json;
use sqlx::{PgPool, postgres::PgPoolOptions};
use support::{Apis, payload, stack};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// How many write at the same time.
const WRITERS: u64 = 4;
/// What each pauses after a write: 100 writes a second in all, of which a debug build on two busy cores
/// can still catch up.
const PACE: Duration = Duration::from_millis(35);
/// How often a program is killed.
const KILLS: usize = 5;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: make test-faults"]
async fn every_accepted_write_is_in_the_score_exactly_once() {
    let mut stack = stack().await;
    let apis = Apis::of(&stack.addresses());
    let truth = Truth::of(&stack);

    let enough = CancellationToken::new();
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        writers.spawn(write(apis.clone(), 1 + writer * 1_000_000, enough.clone()));
    }

    truth.grows("before any fault").await;
    stack.servers.rabbitmq.stop(&CancellationToken::new()).await;
    eventually("the relay says that RabbitMQ is away", async || {
        let said = stack.person_relay.not_ready().await.unwrap_or_else(|| "it is ready".to_owned());
        if said.starts_with("broker: ") { Ok(()) } else { Err(said) }
    })
    .await;
    stack.servers.rabbitmq.start().await.unwrap();
    truth.grows("after RabbitMQ was away").await;

    for _ in 0..KILLS {
        kill_and_start(&mut stack.person_relay).await;
        truth.grows("after the relay was killed").await;
    }
    for _ in 0..KILLS {
        kill_and_start(&mut stack.score_projector).await;
        truth.grows("after the projector was killed").await;
    }

    enough.cancel();
    let accepted: Vec<Accepted> = writers.join_all().await.into_iter().flatten().collect();
    let waiting = Instant::now();
    truth.complete().await;
    println!(
        "{} persons with {} items; complete {:.1} s after the last write",
        accepted.len(),
        accepted.iter().map(|person| person.items.len()).sum::<usize>(),
        waiting.elapsed().as_secs_f32()
    );

    truth.holds(&accepted).await;
    for person in accepted.iter().step_by(10) {
        apis.until_score(person.cpf, person.score).await;
    }
    stack.stop(&CancellationToken::new()).await;
}

/// SIGKILL, and at once a successor.
async fn kill_and_start(program: &mut Program) {
    program.kill().await;
    program.start().await.unwrap();
    program.ready(DEADLINE).await.unwrap();
}

/// What the API has answered 201 to.
struct Accepted {
    cpf: u64,
    id: Uuid,
    items: Vec<Uuid>,
    score: i64,
}

/// Writes person after person, each with some items, until there are enough. Nothing that happens to the
/// others is a reason to refuse a write.
async fn write(apis: Apis, first_cpf: u64, enough: CancellationToken) -> Vec<Accepted> {
    let samples = [("income", 20), ("asset", 5000), ("debt", -50)];
    let mut accepted = Vec::new();
    for cpf in first_cpf.. {
        let mut body: serde_json::Value = serde_json::from_str(&payload("person")).unwrap();
        body["cpf"] = json!(cpf);
        let id = created(&apis, "/person", body.to_string()).await;
        let mut person = Accepted { cpf, id, items: Vec::new(), score: 0 };
        for (item, score) in samples.into_iter().cycle().take(8) {
            let id = created(&apis, &format!("/person/{cpf}/{item}"), payload(item)).await;
            person.items.push(id);
            person.score += score;
            // A steady load and not the most that the machine can do, which would only fill the queue.
            tokio::time::sleep(PACE).await;
        }
        accepted.push(person);
        if enough.is_cancelled() {
            break;
        }
    }
    accepted
}

async fn created(apis: &Apis, path: &str, body: String) -> Uuid {
    let answer = apis.post(path, body).await;
    assert_eq!(answer.status, 201, "{path}: {}", answer.shown());
    serde_json::from_value(answer.json()["id"].clone()).unwrap()
}

/// What the two databases hold.
struct Truth {
    person: PgPool,
    score: PgPool,
}

impl Truth {
    fn of(stack: &Stack) -> Self {
        let pool = |url: &str| PgPoolOptions::new().max_connections(1).connect_lazy(url).unwrap();
        let addresses = stack.addresses();
        Self { person: pool(&addresses.person_database_url), score: pool(&addresses.score_database_url) }
    }

    async fn number(pool: &PgPool, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
    }

    /// Waits until an event that was written after this call arrives.
    async fn grows(&self, when: &str) {
        let begin = Instant::now();
        let last = Self::number(&self.person, "SELECT coalesce(max(position), 0) FROM outbox.event").await;
        let (aggregate, version): (String, i64) = eventually("somebody writes", async || {
            let sql = "SELECT aggregate_id, version FROM outbox.event WHERE position > $1 LIMIT 1";
            let next = sqlx::query_as(sql).bind(last).fetch_optional(&self.person).await.unwrap();
            next.ok_or_else(|| format!("position {last}"))
        })
        .await;
        eventually(&format!("an event written {when} arrives"), async || {
            let sql = "SELECT version FROM inbox.aggregate WHERE aggregate_id = $1";
            let applied: Option<i64> =
                sqlx::query_scalar(sql).bind(&aggregate).fetch_optional(&self.score).await.unwrap();
            if applied >= Some(version) { Ok(()) } else { Err(format!("{applied:?} of {version}")) }
        })
        .await;
        println!("{:4.1} s until an event written {when} arrives", begin.elapsed().as_secs_f32());
    }

    /// Waits until as many events are applied as were written.
    async fn complete(&self) {
        let written = Self::number(&self.person, "SELECT count(*) FROM outbox.event").await;
        eventually(&format!("{written} events are applied"), async || {
            let sql = "SELECT coalesce(sum(version), 0)::bigint FROM inbox.aggregate";
            let applied = Self::number(&self.score, sql).await;
            if applied == written { Ok(()) } else { Err(format!("{applied} applied")) }
        })
        .await;
    }

    /// Checks the read model against what was accepted: the same persons, the same items, the same sums,
    /// nothing set aside, and one event of its own for each item.
    async fn holds(&self, accepted: &[Accepted]) {
        let rows: Vec<(Uuid, i64, Vec<Uuid>)> = sqlx::query_as(
            "SELECT p.id, p.total::bigint, array_agg(e.id ORDER BY e.id)
             FROM score.person p JOIN score.entry e ON e.person_id = p.id GROUP BY p.id",
        )
        .fetch_all(&self.score)
        .await
        .unwrap();
        let stored: BTreeMap<_, _> =
            rows.into_iter().map(|(id, total, items)| (id, (total, items))).collect();
        let expected: BTreeMap<_, _> = accepted
            .iter()
            .map(|person| {
                let mut items = person.items.clone();
                items.sort();
                (person.id, (person.score, items))
            })
            .collect();
        assert_eq!(stored.len(), expected.len(), "persons");
        for (id, person) in &expected {
            assert_eq!(stored.get(id), Some(person), "person {id}");
        }
        for (what, sql) in [
            ("held events", "SELECT count(*) FROM inbox.held"),
            ("rejected messages", "SELECT count(*) FROM inbox.rejected"),
            (
                "items without exactly one score event",
                "SELECT count(*) FROM score.entry e FULL JOIN (
                     SELECT payload->>'id' AS id, count(*) AS times FROM outbox.event GROUP BY 1
                 ) o ON o.id = e.id::text WHERE o.times IS DISTINCT FROM 1 OR e.id IS NULL",
            ),
        ] {
            assert_eq!(Self::number(&self.score, sql).await, 0, "{what}");
        }
    }
}
