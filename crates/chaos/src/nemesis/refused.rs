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
use sqlx::Connection;
use uuid::Uuid;

use super::retry::until_done;
use crate::{
    broker::{EXCHANGE, connect},
    event::MISFIT,
    field::{Field, MESSAGE_LIMIT},
};
use devstack::users;

/// A body that the broker does not take.
const TOO_LARGE: usize = MESSAGE_LIMIT + 1_024;

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

/// A command of the person outbox's operator.
async fn operate(field: &Field, args: &[&str]) -> anyhow::Result<()> {
    let database = field.addresses.url("person");
    field.operator.command(args, &[("DATABASE_URL", &database), ("AMQP_URL", &field.addresses.broker)]).await
}
