//! What is done with a history, in order: first what only looks, then what changes it.

use std::time::Duration;

use anyhow::{Context, ensure};
use sqlx::{Connection, PgConnection};
use tokio_util::sync::CancellationToken;

use super::{
    Length,
    alone::{self, Statement},
    fill::History,
    operation::{
        Operation,
        Reach::{Rate, Still, Time, TimePerPartition},
    },
    run::{Run, prepare},
    writers::Writers,
};
use crate::{broker::BrokerConnection, wait};
use devstack::{say, users};

const fn steady(line: &'static str) -> Operation {
    Operation::steady(line)
}

const fn linear(line: &'static str) -> Operation {
    Operation::linear(line)
}

const fn part(line: &'static str, of: f64) -> Operation {
    Operation::part(line, of)
}

const fn at_most(line: &'static str, buffers: f64) -> Operation {
    Operation::at_most(line, buffers)
}

const fn for_each_row(line: &'static str, buffers: f64) -> Operation {
    Operation::for_each_row(line, buffers)
}

/// The queue that history is replayed to.
const QUEUE: &str = "history";

/// What only looks, and what changes little.
const LOOK: &[Operation] = &[
    steady("person-api migrate"),
    steady("outbox-relay migrate --source person"),
    steady("score-projector migrate"),
    steady("person-api health"),
    steady("score-api health"),
    steady("score-projector health"),
    steady("outbox-relay health"),
    steady("outbox-relay status"),
    steady("outbox-relay status").on_score(),
    // It looks at the last 10,000 events.
    at_most("outbox-relay doctor", 60_000.0),
    at_most("outbox-relay doctor", 60_000.0).on_score(),
    steady("outbox-relay trace {event}"),
    steady("outbox-relay trace person/{ordinary}"),
    steady("outbox-relay trace person/{giant}"),
    // Of two rows an event: the event, by the aggregate's index; and its progress, with three levels of the position's
    // index, the relay's row, and the event once more where vacuum was not. Six, and one more for the relay's other rows.
    for_each_row("outbox-relay trace person/{giant} --limit 10000", 3.5),
    steady("outbox-relay erasures"),
    steady("outbox-relay erasures --finish"),
    steady("outbox-relay forget unused --yes"),
    linear("outbox-relay recover"),
    linear("outbox-relay recover --sequence"),
    steady("outbox-relay pause"),
    steady("outbox-relay resume"),
    linear("outbox-relay digest"),
    linear("outbox-relay digest --consumer score").reach(Time(60.0)),
    part("outbox-relay replay --aggregate person/{ordinary} --dry-run", 0.01).reach(Time(0.1)),
    part("outbox-relay replay --aggregate person/{large} --dry-run", 0.02).reach(Time(1.0)),
    part("outbox-relay replay --aggregate person/{giant} --dry-run", 0.3).reach(Time(10.0)),
    part("outbox-relay replay --since {since} --dry-run", 0.05).reach(Time(2.0)),
    linear("outbox-relay replay --all --dry-run").reach(Time(10.0)),
    steady("outbox-relay replay --from {from} --to {to} --to-queue history --rate 100000").reach(Time(0.5)),
    linear("outbox-relay prune --keep 30d --dry-run").reach(TimePerPartition(5.0)),
    linear("person-api republish --all --dry-run"),
    steady("person-api republish --person {ordinary}"),
    linear("person-api republish --person {giant}"),
    linear("person-api republish --all --rate 100000")
        .reach(Rate(2_000.0))
        .counted("SELECT coalesce(sum(persons), 0)::bigint FROM person.republish")
        .sampled(),
    linear("score-projector digest"),
    linear("score-projector digest --shadow"),
    linear("score-projector verify").reach(Time(60.0)),
    steady("score-projector republish --person {ordinary}"),
    linear("score-projector republish --all --rate 100000")
        .counted("SELECT last_value FROM outbox.position")
        .sampled(),
    steady("score-projector held list"),
    steady("score-projector rejected list"),
];

/// What clients send, to a person with 10 events, with a 2000th of the scale, and with a hundredth of it.
const REQUESTS: &[Operation] = &[
    steady("GET person-api/person/{ordinary.cpf}"),
    // At most 1,000 items of each kind.
    at_most("GET person-api/person/{large.cpf}", 5_000.0),
    at_most("GET person-api/person/{giant.cpf}", 5_000.0),
    steady("GET person-api/person/{giant.cpf}/income?limit=100"),
    steady("GET person-api/person/{giant.cpf}/income?limit=100&after={item}"),
    steady("GET person-api/person/{giant.cpf}/income/{item}"),
    steady(r#"POST person-api/person {"cpf":99999999999,"name":"abc","date_of_birth":"1980-05-17"}"#),
    steady(r#"POST person-api/person/{giant.cpf}/income {"type":"renting","value":1000}"#),
    steady(r#"POST person-api/person/{giant.cpf}/asset {"type":"apartment","value":1000}"#),
    steady(r#"POST person-api/person/{giant.cpf}/debt {"value":1000}"#),
    steady(r#"PATCH person-api/person/{giant.cpf} {"name":"abd"}"#),
    steady(r#"PUT person-api/person/{giant.cpf}/income/{item} {"type":"renting","value":1001}"#),
    steady("DELETE person-api/person/{giant.cpf}/income/{item}"),
    steady("GET score-api/{ordinary.cpf}/score"),
    steady("GET score-api/{giant.cpf}/score"),
    steady("GET score-api/{giant.cpf}/score/entries?limit=100"),
    steady("GET score-api/{giant.cpf}/score/entries?limit=100&after_entry={item}"),
    steady("GET person-api/ready"),
    steady("GET person-api/metrics"),
    steady("GET score-api/ready"),
    steady("GET score-api/metrics"),
    steady("GET person-relay/ready"),
    steady("GET person-relay/metrics"),
    steady("GET score-projector/ready"),
    steady("GET score-projector/metrics"),
];

/// The rebuild of the read model, from when the shadow is as far as the live one.
const REBUILD: &[Operation] = &[
    linear("score-projector rebuild status").reach(Time(2.0)),
    linear("score-projector rebuild swap --dry-run").reach(Still(1.0)),
    linear("score-projector rebuild swap").reach(Still(1.0)),
    linear("score-projector rebuild drop"),
];

/// With much held, as many parked, and some rejected.
const SET_ASIDE: &[Operation] = &[
    // It counts what is set aside.
    linear("outbox-relay status"),
    linear("outbox-relay parked list"),
    steady("outbox-relay parked show {parked}"),
    linear("outbox-relay parked retry --all"),
    linear("outbox-relay parked drop --all --yes"),
    linear("score-projector held list"),
    steady("score-projector held show {held}"),
    steady("score-projector held skip --event {held} --why bench --yes"),
    linear("score-projector held redrive --all --dry-run").sampled(),
    linear("score-projector held redrive --all")
        .reach(Rate(2_000.0))
        .counted("SELECT count(*) FROM inbox.held")
        .sampled(),
    linear("score-projector rejected list"),
    linear("score-projector rejected drop --all --yes"),
];

/// The ends of persons.
const DELETE: &[Operation] = &[
    steady("DELETE person-api/person/{ordinary.cpf}"),
    linear("DELETE person-api/person/{large.cpf}"),
    linear("DELETE person-api/person/{giant.cpf}").reach(Time(1.0)),
];

/// With a baseline of everybody above the history.
const RETIRE: &[Operation] = &[
    linear("outbox-relay prune --keep 30d --dry-run").reach(TimePerPartition(5.0)),
    linear("outbox-relay prune --keep 30d"),
];

/// Commands that are not in any list, and why.
const LEFT_OUT: [(&str, &str); 3] = [
    ("run", "the programs run all the time"),
    ("help", "it reads no database"),
    ("new-incarnation", "it changes what everything else is about"),
];

/// Does everything. Returns the statements that ran by themselves, with nothing and with much set aside.
pub(crate) async fn all(
    run: &mut Run<'_>,
    history: History,
    length: Length,
) -> anyhow::Result<[Vec<Statement>; 2]> {
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
    run.all(LOOK).await?;
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
    Ok([alone, burdened])
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

/// How many events are replayed to a queue.
const REPLAYED: i64 = 5_000;

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
            "SELECT (SELECT min(low_water) FROM outbox.relay) >= (SELECT last_position FROM outbox.overview)",
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
    let some = (history.scale / 2, history.scale / 2 + REPLAYED - 1);
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

/// Fails when a program has a command that is neither measured nor left out for a reason.
pub(crate) fn every_command() -> anyhow::Result<()> {
    for program in ["outbox-relay", "person-api", "score-projector", "score-api"] {
        let help = std::process::Command::new(devstack::binary::find(program)?).arg("--help").output()?;
        let help = String::from_utf8_lossy(&help.stdout).into_owned();
        for command in commands(&help) {
            let start = format!("{program} {command}");
            let lists = [LOOK, REBUILD, SET_ASIDE, RETIRE].into_iter().flatten();
            let known = LEFT_OUT.iter().any(|(left_out, _)| *left_out == command)
                || lists.into_iter().any(|operation| operation.line.starts_with(&start));
            ensure!(known, "`{start}` is not measured: add it to crates/bench/src/history/sequence.rs");
        }
    }
    Ok(())
}

/// The commands that a program's help lists.
fn commands(help: &str) -> impl Iterator<Item = &str> {
    let list = help.split_once("Commands:\n").map_or("", |(_, list)| list);
    let list = list.split_once("\n\n").map_or(list, |(list, _)| list);
    list.lines()
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_help_lists_commands() {
        let help = "About\n\nCommands:\n  run      Relay\n           more words\n  status   Show\n\nOptions:\n  -h  Help\n";
        assert_eq!(super::commands(help).collect::<Vec<_>>(), ["run", "status"]);
    }
}
