//! Events that cannot be published: because of a queue, of their type, or of themselves. Other events must not be delayed.

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

use super::{bindings::NOTES, retry::until_done};
use crate::{
    broker::{EXCHANGE, connect},
    event::UNPUBLISHABLE,
    testbed::{MESSAGE_LIMIT, Testbed},
};
use devstack::users;

/// A body that the broker does not take.
const TOO_LARGE: usize = MESSAGE_LIMIT + 1_024;

/// Binds a full queue, which refuses every note. It is filled before it is bound, so that it takes none.
pub(crate) async fn queue_full(testbed: &Testbed, lasts: Duration, number: usize) -> anyhow::Result<()> {
    let _one = NOTES.lock().await;
    let name = format!("narrow-{number}");
    until_done(async || {
        let (connection, channel) = connect(&testbed.addresses.broker).await?;
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
        let (connection, channel) = connect(&testbed.addresses.broker).await?;
        channel.queue_delete(name.as_str().into(), QueueDeleteOptions::default()).await?;
        Ok(connection.close(200, "bye".into()).await?)
    })
    .await
}

/// Takes from the relay's user the right to publish `note.*`, and gives it back. Then an operator retries the parked
/// events.
pub(crate) async fn type_denied(testbed: &Testbed, lasts: Duration) -> anyhow::Result<()> {
    let user = users::PERSON_RELAY;
    until_done(async || {
        let rabbitmq = testbed.rabbitmq.lock().await;
        let denied = ["set_topic_permissions", "-p", "/", user, EXCHANGE, r"^(?!note\.).*", ".*"];
        rabbitmq.control(&denied).await?;
        // A channel caches its permissions.
        rabbitmq.control(&["close_all_connections", "an operator"]).await
    })
    .await?;
    tokio::time::sleep(lasts).await;
    until_done(async || {
        let rabbitmq = testbed.rabbitmq.lock().await;
        rabbitmq.control(&["clear_topic_permissions", "-p", "/", user, EXCHANGE]).await
    })
    .await?;
    until_done(async || {
        operate(testbed, &["parked", "retry", "--type", "note.*"]).await?;
        let left: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM outbox.parked WHERE type LIKE 'note.%' AND reason = 'refused'
                                                  AND aggregate_type <> $1",
        )
        .bind(UNPUBLISHABLE)
        .fetch_one(&mut testbed.addresses.connect("person").await?)
        .await?;
        ensure!(left == 0, "{left} notes are still refused");
        Ok(())
    })
    .await
}

/// Stores an event whose body is above the broker's limit. The relay has to park this event alone. Then an operator drops
/// it.
pub(crate) async fn body_too_large(testbed: &Testbed, number: usize) -> anyhow::Result<()> {
    let body = serde_json::json!({ "id": number, "text": "x".repeat(TOO_LARGE) }).to_string();
    store_and_drop(testbed, number, &body, None).await
}

/// Stores a row whose headers no message can carry. The relay has to park it. Then an operator drops it.
pub(crate) async fn row_unsendable(testbed: &Testbed, number: usize) -> anyhow::Result<()> {
    store_and_drop(testbed, number, "{}", Some(r#"{"a": [[[[1]]]]}"#)).await
}

/// Stores such an event, and drops it once it is parked.
async fn store_and_drop(
    testbed: &Testbed,
    number: usize,
    body: &str,
    headers: Option<&str>,
) -> anyhow::Result<()> {
    let aggregate = number.to_string();
    until_done(async || {
        let mut conn = testbed.addresses.connect("person").await?;
        // It may be stored already: a fault may have lost the response.
        sqlx::query(
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers)
             SELECT $1, $2, 1, 'note.changed', $3::json, $4::jsonb
             WHERE NOT EXISTS (SELECT FROM outbox.event WHERE aggregate_type = $1 AND aggregate_id = $2)",
        )
        .bind(UNPUBLISHABLE)
        .bind(&aggregate)
        .bind(body)
        .bind(headers)
        .execute(&mut conn)
        .await?;
        Ok(conn.close().await?)
    })
    .await?;
    drop_parked(testbed, &aggregate).await
}

/// Waits until the event is parked as refused, and has an operator drop it.
async fn drop_parked(testbed: &Testbed, aggregate: &str) -> anyhow::Result<()> {
    until_done(async || {
        let id: Option<Uuid> = sqlx::query_scalar(
            "SELECT id FROM outbox.parked
             WHERE aggregate_type = $1 AND aggregate_id = $2 AND reason = 'refused'",
        )
        .bind(UNPUBLISHABLE)
        .bind(aggregate)
        .fetch_optional(&mut testbed.addresses.connect("person").await?)
        .await?;
        let id = id.with_context(|| format!("{UNPUBLISHABLE}/{aggregate} is not parked as refused"))?;
        operate(testbed, &["parked", "drop", "--id", &id.to_string(), "--yes"]).await
    })
    .await
}

/// Runs a command of outbox-relay, as an operator of the person outbox.
async fn operate(testbed: &Testbed, args: &[&str]) -> anyhow::Result<()> {
    let database = testbed.addresses.url("person");
    testbed
        .operator
        .command(args, &[("DATABASE_URL", &database), ("AMQP_URL", &testbed.addresses.broker)])
        .await
}
