//! Does everything with a history, in order, and prepares what the operations are about.

use std::time::Duration;

use anyhow::Context;
use sqlx::{Connection, PgConnection};
use tokio_util::sync::CancellationToken;

use super::{
    Length,
    alone::{self, Statement},
    fill::History,
    operation::Count,
    pace::{self, Counter, QUEUE},
    run::{Run, prepare},
    sequence::{DELETE, LOOK, REBUILD, REQUESTS, RETIRE, SET_ASIDE},
    writers::Writers,
};
use crate::{broker::BrokerConnection, statistics::number, wait};
use devstack::{say, users};

/// What was measured beside the operations.
#[derive(Debug)]
pub(super) struct Beside {
    /// The statements that ran by themselves, with nothing and with much set aside.
    pub(super) alone: [Vec<Statement>; 2],
    /// Events a second that the relay publishes; none where nothing is held against it.
    pub(super) relay_rate: Option<f64>,
}

/// Does everything.
pub(super) async fn all(run: &mut Run<'_>, history: History, length: Length) -> anyhow::Result<Beside> {
    // Until something is old enough to be retired, each look of the relay at its partitions finds that nothing may be.
    for relay in [&mut run.stack.person_relay, &mut run.stack.score_relay] {
        relay.set_env("KEEP", "30d");
    }
    alone::begin(run.stack).await?;
    start(run).await?;
    name(run, history).await?;
    say("watching what the programs do by themselves");
    let alone = alone::watch(run.stack, length.alone).await?;
    for relay in [&mut run.stack.person_relay, &mut run.stack.score_relay] {
        // What the operations are about stays, whatever baselines they publish.
        relay.stop(&CancellationToken::new()).await;
        relay.set_env("KEEP", "36500d");
        relay.start().await?;
        relay.ready(wait::READY_TIMEOUT).await?;
    }
    let broker = BrokerConnection::open(&format!("{}/%2f", run.stack.servers.rabbitmq.url())).await?;
    broker.private_queue(QUEUE).await?;
    let rabbitmq = &run.stack.servers.rabbitmq;
    let replay = (users::REPLAY, rabbitmq.password());
    users::make(&rabbitmq.management_url(), "%2f", replay, users::Rights::Replay(QUEUE)).await?;

    write(run, history)?;
    let mut relay_rate = None;
    for operation in LOOK {
        run.all(std::slice::from_ref(operation)).await?;
        // Right after what is held against it, so that both have the same machine.
        if operation.is_against_relay()
            && run.done.last().is_some_and(|done| done.operation.is_against_relay())
        {
            relay_rate = Some(Box::pin(measure_relay(run, &broker, history)).await?);
        }
    }
    run.all(REQUESTS).await?;
    run.all(REBUILD).await?;
    set_aside(run, history).await?;
    alone::begin(run.stack).await?;
    say("watching what the programs do by themselves, with much set aside");
    let burdened = alone::watch(run.stack, length.alone).await?;
    run.all(SET_ASIDE).await?;
    run.all(DELETE).await?;

    pause(run).await?;
    Box::pin(history.add_baselines(run.stack)).await?;
    start(run).await?;
    write(run, history)?;
    run.all(RETIRE).await?;
    if let Some(writers) = run.writers.take() {
        writers.stop().await;
    }
    broker.close().await?;
    Ok(Beside { alone: [alone, burdened], relay_rate })
}

/// Starts the writers, with persons whom nothing else is about.
fn write(run: &mut Run<'_>, history: History) -> anyhow::Result<()> {
    let persons = (FIRST_CPF, history.scale / 20);
    run.writers = Some(Writers::start(&run.stack.person_api.url(), &run.stack.score_api.url(), persons)?);
    Ok(())
}

/// The cpf of the first person.
const FIRST_CPF: i64 = 10_000_000_000;

/// Starts the programs.
async fn start(run: &mut Run<'_>) -> anyhow::Result<()> {
    for program in run.stack.programs() {
        program.start().await?;
    }
    for program in run.stack.programs() {
        program.ready(wait::READY_TIMEOUT).await?;
    }
    Ok(())
}

/// With more than 10,000 events held, a projector stops.
const MOST_HELD: i64 = 9_900;

/// How many events are replayed to a queue, and published for the relay's own rate: what takes some seconds, where the
/// history is long.
fn replayed(history: History) -> i64 {
    (history.scale / 40).clamp(2_000, 100_000)
}

/// How fast the relay publishes events of the same bodies to the same queue, beside the same writers. Nothing else follows
/// them.
async fn measure_relay(
    run: &mut Run<'_>,
    broker: &BrokerConnection,
    history: History,
) -> anyhow::Result<f64> {
    say("measuring the relay's own rate");
    broker.bind(QUEUE, "history.noted").await?;
    let rabbitmq = format!("{}/%2f", run.stack.servers.rabbitmq.url());
    let counter = Counter::open(Count::Messages, "", &rabbitmq).await?;
    let stop = CancellationToken::new();
    let pace = tokio::spawn(pace::watch(counter, stop.clone()));
    let (before, count) = (broker.waiting(QUEUE).await?, replayed(history));
    prepare(
        run.stack,
        "person",
        format!(
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
             SELECT 'history', gen_random_uuid(), 1, 'history.noted', payload
             FROM outbox.event WHERE position > {from} AND position <= {from} + {count} ORDER BY position",
            from = history.scale / 2
        ),
    )
    .await?;
    wait::until("the relay has published them", async || {
        Ok((broker.waiting(QUEUE).await? >= before + count).then_some(()))
    })
    .await?;
    stop.cancel();
    let rate = pace.await??.rate();
    say(&format!("the relay publishes {} events/s", number(rate)));
    Ok(rate)
}

/// Ends writers and programs, when everything that was written is applied.
async fn pause(run: &mut Run<'_>) -> anyhow::Result<()> {
    if let Some(writers) = run.writers.take() {
        writers.stop().await;
    }
    let url = run.stack.servers.postgres.url();
    let (mut person, mut score) = tokio::try_join!(
        PgConnection::connect(&format!("{url}/person")),
        PgConnection::connect(&format!("{url}/score"))
    )?;
    wait::until("everything is published and applied", async || {
        let settled: bool = sqlx::query_scalar(
            "SELECT (SELECT low_water FROM outbox.relay WHERE name = 'default')
                    >= (SELECT last_position FROM outbox.overview)",
        )
        .fetch_one(&mut person)
        .await?;
        let (id, version): (String, i64) =
            sqlx::query_as("SELECT aggregate_id, version FROM outbox.event ORDER BY position DESC LIMIT 1")
                .fetch_one(&mut person)
                .await?;
        let applied: Option<i64> = sqlx::query_scalar(
            "SELECT version FROM inbox.aggregate
             WHERE aggregate_id = $1 AND consumer = (SELECT consumer FROM score.model WHERE role = 'live')",
        )
        .bind(id)
        .fetch_optional(&mut score)
        .await?;
        Ok((settled && applied >= Some(version)).then_some(()))
    })
    .await?;
    // Their rows are rewritten, so what is vacuumed before would not stay so.
    for database in [&mut person, &mut score] {
        wait::until("everybody who was deleted is erased", async || {
            let pending = "SELECT count(*) FROM outbox.erasure";
            let pending: i64 = sqlx::query_scalar(pending).fetch_one(&mut *database).await?;
            Ok((pending == 0).then_some(()))
        })
        .await?;
    }
    for program in run.stack.programs() {
        program.stop(&CancellationToken::new()).await;
    }
    Ok(())
}

/// Finds what the names in the lines stand for, and makes what a few of them are about.
async fn name(run: &mut Run<'_>, history: History) -> anyhow::Result<()> {
    prepare(run.stack, "person", "INSERT INTO outbox.relay (name) VALUES ('unused')".to_owned()).await?;
    let url = run.stack.servers.postgres.url();
    let mut conn = PgConnection::connect(&format!("{url}/person")).await?;
    // The last ordinary one, who has nothing to do with the writers.
    let persons = history.scale / 10;
    for (name, cpf_name, cpf) in [
        ("ordinary", "ordinary.cpf", FIRST_CPF + persons - 1),
        ("giant", "giant.cpf", FIRST_CPF + persons),
        ("large", "large.cpf", FIRST_CPF + persons + 50),
    ] {
        let id: String = sqlx::query_scalar("SELECT id::text FROM person.person WHERE cpf = $1")
            .bind(cpf)
            .fetch_one(&mut conn)
            .await
            .with_context(|| format!("the person with the cpf {cpf}"))?;
        run.names.insert(name, id);
        run.names.insert(cpf_name, cpf.to_string());
    }
    let (event, item): (String, String) = sqlx::query_as(
        "SELECT (SELECT id::text FROM outbox.event WHERE position = $1),
                (SELECT i.id::text FROM person.income i JOIN person.person p ON p.id = i.person_id
                 WHERE p.cpf = $2 ORDER BY i.id OFFSET $1 / 1000 LIMIT 1)",
    )
    .bind(history.scale / 2)
    .bind(FIRST_CPF + persons)
    .fetch_one(&mut conn)
    .await?;
    conn.close().await?;
    let since = chrono::Utc::now() - Duration::from_hours(48);
    let some = (history.scale / 2, history.scale / 2 + replayed(history) - 1);
    run.names.extend([
        ("event", event),
        ("item", item),
        ("since", since.format("%Y-%m-%dT%H:%M:%SZ").to_string()),
        ("from", some.0.to_string()),
        ("to", some.1.to_string()),
    ]);
    Ok(())
}

/// Sets a twentieth of the scale aside, as much as a projector goes on beside: events that a handler refused, each of another person; as many that no queue took;
/// and some messages that are no events. The handler takes the former when they come again.
async fn set_aside(run: &mut Run<'_>, history: History) -> anyhow::Result<()> {
    let count = (history.scale / 20).min(MOST_HELD);
    let persons = history.scale / 10;
    prepare(
        run.stack,
        "score",
        format!(
            r#"INSERT INTO inbox.held (consumer, source, aggregate_type, aggregate_id, version, event_id, type, occurred_at,
                                       headers, payload, reason, error, attempts)
               SELECT a.consumer, a.source, a.aggregate_type, a.aggregate_id, a.version + 1, gen_random_uuid(), 'income.new',
                      now(), '{{}}', convert_to(format('{{"id":"%s","person_id":"%s","type":"renting","value":1000,"created_at":"2026-11-01T00:00:00+00:00","person":{{"id":"%s","cpf":%s,"name":"abc","address":null,"date_of_birth":"1980-05-17T00:00:00+00:00","created_at":"2024-11-01T00:00:00+00:00","status":"active"}}}}',
                          gen_random_uuid(), p.id, p.id, p.cpf), 'UTF8'), 'poison', 'the handler of before refused it', 1
               FROM score.person p
               JOIN inbox.aggregate a ON a.consumer = (SELECT consumer FROM score.model WHERE role = 'live')
                    AND a.source = 'person' AND a.aggregate_type = 'person' AND a.aggregate_id = p.id::text
               WHERE p.cpf BETWEEN {from} AND {to};
               INSERT INTO inbox.rejected (consumer, digest, reason, detail, routing_key, properties, body, bytes)
               SELECT (SELECT consumer FROM score.model WHERE role = 'live'), sha256(n::text::bytea), 'malformed',
                      'the message has no message_id', 'person.new', '{{}}', 'x', 1
               FROM generate_series(1, least({count}, 1000)) n;
               ANALYZE inbox.held, inbox.rejected"#,
            from = FIRST_CPF + persons / 2,
            // The last ones belong to other operations.
            to = FIRST_CPF + persons / 2 + count - 10,
        ),
    )
    .await?;
    prepare(
        run.stack,
        "person",
        format!(
            "INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, payload, headers,
                                        created_at, reason, detail, next_attempt_at)
             SELECT 'default', position, id, aggregate_type, aggregate_id, version, type, payload, headers, created_at,
                    'unroutable', 'NO_ROUTE', now() + interval '1 hour'
             FROM outbox.event WHERE position <= {count};
             ANALYZE outbox.parked"
        ),
    )
    .await?;
    let url = run.stack.servers.postgres.url();
    let mut score = PgConnection::connect(&format!("{url}/score")).await?;
    let held: String =
        sqlx::query_scalar("SELECT event_id::text FROM inbox.held ORDER BY aggregate_id OFFSET 10 LIMIT 1")
            .fetch_one(&mut score)
            .await?;
    let mut person = PgConnection::connect(&format!("{url}/person")).await?;
    let parked: String =
        sqlx::query_scalar("SELECT id::text FROM outbox.parked ORDER BY position OFFSET 10 LIMIT 1")
            .fetch_one(&mut person)
            .await?;
    run.names.extend([("held", held), ("parked", parked)]);
    Ok(())
}
