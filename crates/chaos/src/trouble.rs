//! Faults of one queue, one type, one event or one database: what has no part in them must not notice.

use std::time::Duration;

use anyhow::{Context, ensure};
use lapin::{
    BasicProperties,
    options::{
        BasicPublishOptions, ConfirmSelectOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
};
use sqlx::{AssertSqlSafe, Connection, Executor};
use tokio::sync::Mutex;
use uuid::Uuid;

use super::{
    faults::{end_sessions, until_done},
    field::Field,
    schedule::{Database, Member},
    subscriber::{EXCHANGE, connect},
};
use devstack::users;

/// The projector's queue.
const QUEUE: &str = "score";
/// The aggregate type of events that cannot be published. An operator drops them.
pub(crate) const MISFIT: &str = "misfit";
/// A body that the broker of a run does not take.
const TOO_LARGE: usize = MESSAGE_LIMIT + 1_024;
/// The largest body that it takes.
pub(crate) const MESSAGE_LIMIT: usize = 2 * 1024 * 1024;

/// A queue for notes that is full, and refuses all of them. It is filled before it is bound: an event that it took while
/// the subscriber's bindings are away would have a queue, and never reach the subscriber.
pub(crate) async fn queue_full(field: &Field, lasts: Duration, number: usize) -> anyhow::Result<()> {
    let name = format!("narrow-{number}");
    until_done(async || {
        let (connection, channel) = connect(&field.addresses.broker).await?;
        let mut arguments = FieldTable::default();
        for (argument, text) in [("x-queue-type", "quorum"), ("x-overflow", "reject-publish")] {
            arguments.insert(argument.into(), AMQPValue::LongString(text.into()));
        }
        arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(1));
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare(name.as_str().into(), durable, arguments).await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let (options, filler) =
            (BasicPublishOptions::default(), BasicProperties::default().with_delivery_mode(2));
        channel.basic_publish("".into(), name.as_str().into(), options, b"full", filler).await?.await?;
        let (queue, options) = (name.as_str().into(), QueueBindOptions::default());
        channel.queue_bind(queue, EXCHANGE.into(), "note.#".into(), options, FieldTable::default()).await?;
        Ok(connection.close(200, "bye".into()).await?)
    })
    .await?;
    tokio::time::sleep(lasts).await;
    until_done(async || {
        let (connection, channel) = connect(&field.addresses.broker).await?;
        channel.queue_delete(name.as_str().into(), QueueDeleteOptions::default()).await?;
        Ok(connection.close(200, "bye".into()).await?)
    })
    .await
}

/// The relay's user may not publish `note.*`, and then may again. What was set aside meanwhile is tried
/// again by an operator.
pub(crate) async fn type_denied(field: &Field, lasts: Duration) -> anyhow::Result<()> {
    let user = users::PERSON_RELAY;
    until_done(async || {
        let rabbitmq = field.rabbitmq.lock().await;
        let denied = ["set_topic_permissions", "-p", "/", user, EXCHANGE, r"^(?!note\.).*", ".*"];
        rabbitmq.control(&denied).await?;
        // A channel remembers what it was allowed.
        rabbitmq.control(&["close_all_connections", "an operator"]).await
    })
    .await?;
    tokio::time::sleep(lasts).await;
    until_done(async || {
        let rabbitmq = field.rabbitmq.lock().await;
        rabbitmq.control(&["clear_topic_permissions", "-p", "/", user, EXCHANGE]).await
    })
    .await?;
    until_done(async || {
        operate(field, &["parked", "retry", "--type", "note.*"]).await?;
        let left: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM outbox.parked WHERE type LIKE 'note.%' AND reason = 'refused'
                                                  AND aggregate_type <> $1",
        )
        .bind(MISFIT)
        .fetch_one(&mut field.addresses.connect("person").await?)
        .await?;
        ensure!(left == 0, "{left} notes are still refused");
        Ok(())
    })
    .await
}

/// An event with a body that this broker does not take. It has to be set aside for itself; an operator drops
/// it then.
pub(crate) async fn body_too_large(field: &Field, number: usize) -> anyhow::Result<()> {
    let body = serde_json::json!({ "id": number, "text": "x".repeat(TOO_LARGE) }).to_string();
    misfit(field, number, &body, None).await
}

/// A row that no message can carry, as one that is older than the checks of its table.
pub(crate) async fn row_unsendable(field: &Field, number: usize) -> anyhow::Result<()> {
    misfit(field, number, "{}", Some(r#"{"a": [[[[1]]]]}"#)).await
}

/// Stores such an event, and drops it once it is set aside.
async fn misfit(field: &Field, number: usize, body: &str, headers: Option<&str>) -> anyhow::Result<()> {
    let aggregate = number.to_string();
    until_done(async || {
        let mut conn = field.addresses.connect("person").await?;
        // It may be there already, when the answer was lost.
        sqlx::query(
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers)
             SELECT $1, $2, 1, 'note.changed', $3::json, $4::jsonb
             WHERE NOT EXISTS (SELECT FROM outbox.event WHERE aggregate_type = $1 AND aggregate_id = $2)",
        )
        .bind(MISFIT)
        .bind(&aggregate)
        .bind(body)
        .bind(headers)
        .execute(&mut conn)
        .await?;
        Ok(conn.close().await?)
    })
    .await?;
    drop_misfit(field, &aggregate).await
}

/// Waits until the event is set aside as refused, and has an operator drop it.
async fn drop_misfit(field: &Field, aggregate: &str) -> anyhow::Result<()> {
    until_done(async || {
        let id: Option<Uuid> = sqlx::query_scalar(
            "SELECT id FROM outbox.parked
             WHERE aggregate_type = $1 AND aggregate_id = $2 AND reason = 'refused'",
        )
        .bind(MISFIT)
        .bind(aggregate)
        .fetch_optional(&mut field.addresses.connect("person").await?)
        .await?;
        let id = id.with_context(|| format!("{MISFIT}/{aggregate} is not set aside as refused"))?;
        operate(field, &["parked", "drop", "--id", &id.to_string(), "--yes"]).await
    })
    .await
}

/// Whose turn it is to be a stranger.
static STRANGERS: Mutex<()> = Mutex::const_new(());

/// Messages by how many of which source a stranger sends: more than the poison that opens a breaker.
const FORGED: [(&str, usize); 2] = [("person", 1), ("stranger", 25)];

/// Somebody who may write to the projector's queue ends a person in the name of the source `person`, and sends
/// poison in a name of its own. Both have to be rejected; an operator drops them then.
pub(crate) async fn foreign_sender(field: &Field) -> anyhow::Result<()> {
    let projectors = [Member::Projector1, Member::Projector2];
    field.crew.disturb(&projectors);
    // One after the other: the operator drops all that is rejected.
    let _turn = STRANGERS.lock().await;
    let sent = until_done(async || {
        let mut conn = field.addresses.connect("person").await?;
        let victim: Option<(Uuid, i64)> =
            sqlx::query_as("SELECT id, version FROM person.person LIMIT 1").fetch_optional(&mut conn).await?;
        let (id, version) = victim.context("there is no person yet")?;
        conn.close().await?;
        let (connection, channel) = connect(&field.addresses.broker).await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let mut sent = Vec::new();
        for (source, messages) in FORGED {
            for n in 0..messages {
                let name = Uuid::now_v7().to_string();
                let message =
                    forged(source, id, version + 1 + i64::try_from(n)?).with_message_id(name.as_str().into());
                sent.push(name);
                let (options, body) = (BasicPublishOptions::default(), format!("{{\"id\":\"{id}\"}}"));
                channel
                    .basic_publish("".into(), QUEUE.into(), options, body.as_bytes(), message)
                    .await?
                    .await?;
            }
        }
        connection.close(200, "bye".into()).await?;
        Ok(sent)
    })
    .await?;
    // All of it has come before any of it is dropped: else what comes last stays. What an attempt before this one sent,
    // which was cut off, came before.
    until_done(async || {
        let rejected = rejected(field, &sent).await?;
        ensure!(rejected == REJECTED, "of a stranger's messages these are rejected: {rejected:?}");
        Ok(())
    })
    .await?;
    until_done(async || {
        let database = field.addresses.url("score");
        let drop = ["rejected", "drop", "--all", "--yes"];
        field.score_operator.command(&drop, &[("DATABASE_URL", &database)]).await
    })
    .await?;
    field.crew.calm(&projectors);
    Ok(())
}

/// What becomes of them: how many are rejected as from a wrong user, and how many as foreign.
const REJECTED: (i64, i64) = (1, 25);

/// How many of these messages are rejected for each of those reasons.
async fn rejected(field: &Field, sent: &[String]) -> anyhow::Result<(i64, i64)> {
    let mut conn = field.addresses.connect("score").await?;
    let sql =
        "SELECT count(*) FILTER (WHERE reason = 'wrong-user'), count(*) FILTER (WHERE reason = 'foreign')
               FROM inbox.rejected WHERE properties::jsonb ->> 'message_id' = ANY ($1)";
    let rejected = sqlx::query_as(sql).bind(sent).fetch_one(&mut conn).await?;
    conn.close().await?;
    Ok(rejected)
}

/// The end of a person, as only the person outbox's relay may publish it.
fn forged(source: &str, person: Uuid, version: i64) -> BasicProperties {
    let mut headers = FieldTable::default();
    headers.insert("aggregate_type".into(), AMQPValue::LongString("person".into()));
    headers.insert("aggregate_id".into(), AMQPValue::LongString(person.to_string().into()));
    headers.insert("aggregate_version".into(), AMQPValue::LongLongInt(version));
    BasicProperties::default()
        .with_type("person.deleted".into())
        .with_app_id(source.into())
        .with_delivery_mode(2)
        .with_headers(headers)
}

/// A command of the person outbox's operator.
async fn operate(field: &Field, args: &[&str]) -> anyhow::Result<()> {
    let database = field.addresses.url("person");
    field.operator.command(args, &[("DATABASE_URL", &database), ("AMQP_URL", &field.addresses.broker)]).await
}

/// A database that takes no writes, as a standby that somebody leads the programs to.
pub(crate) async fn read_only(field: &Field, database: Database, lasts: Duration) -> anyhow::Result<()> {
    field.crew.disturb(&Member::ALL);
    set_read_only(field, database, "SET default_transaction_read_only = on").await?;
    tokio::time::sleep(lasts).await;
    set_read_only(field, database, "RESET default_transaction_read_only").await?;
    field.crew.calm(&Member::ALL);
    Ok(())
}

async fn set_read_only(field: &Field, database: Database, change: &str) -> anyhow::Result<()> {
    let name = database.name();
    until_done(async || {
        // Not in that database: there it would be read-only itself.
        let mut conn = field.addresses.connect("postgres").await?;
        conn.execute(AssertSqlSafe(format!("ALTER DATABASE {name} {change}"))).await?;
        end_sessions(&mut conn).await?;
        Ok(conn.close().await?)
    })
    .await
}
