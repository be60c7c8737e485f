//! A sender that may write to the projector's queue, and publishes in the name of a source.

use anyhow::{Context, ensure};
use lapin::{
    BasicProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions},
    types::{AMQPValue, FieldTable},
};
use sqlx::Connection;
use tokio::sync::Mutex;
use uuid::Uuid;

use super::retry::until_done;
use crate::{broker::connect, fault::Instance, testbed::Testbed};

/// The projector's queue.
const QUEUE: &str = "score";
/// One sender at a time: the operator drops every rejected message at once.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// How many messages the sender publishes in the name of which source. 25 in a row would open the breaker if foreign
/// messages counted.
const FORGED: [(&str, usize); 2] = [("person", 1), ("stranger", 25)];

/// Deletes a person in the name of the source `person`, and sends messages of an unknown source. The projector has to
/// reject all of them. Then an operator drops them.
pub(crate) async fn foreign_sender(testbed: &Testbed) -> anyhow::Result<()> {
    let projectors = [Instance::Projector1, Instance::Projector2];
    testbed.supervisor.fault_begins(&projectors);
    let _one = ONE_AT_A_TIME.lock().await;
    let sent = until_done(async || {
        let mut conn = testbed.addresses.connect("person").await?;
        let victim: Option<(Uuid, i64)> =
            sqlx::query_as("SELECT id, version FROM person.person LIMIT 1").fetch_optional(&mut conn).await?;
        let (id, version) = victim.context("there is no person yet")?;
        conn.close().await?;
        let (connection, channel) = connect(&testbed.addresses.broker).await?;
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
    // All messages have to be rejected before they are dropped; otherwise the last ones would stay. Those of an earlier
    // attempt that a fault interrupted are in the queue before these.
    until_done(async || {
        let rejected = rejected(testbed, &sent).await?;
        ensure!(rejected == REJECTED, "of the foreign messages these are rejected: {rejected:?}");
        Ok(())
    })
    .await?;
    until_done(async || {
        let database = testbed.addresses.url("score");
        let drop = ["rejected", "drop", "--all", "--yes"];
        testbed.score_operator.command(&drop, &[("DATABASE_URL", &database)]).await
    })
    .await?;
    testbed.supervisor.fault_ends(&projectors);
    Ok(())
}

/// How many have to be rejected for a wrong user, and how many as foreign.
const REJECTED: (i64, i64) = (1, 25);

/// How many of these messages are rejected for each of these reasons.
async fn rejected(testbed: &Testbed, sent: &[String]) -> anyhow::Result<(i64, i64)> {
    let mut conn = testbed.addresses.connect("score").await?;
    let sql =
        "SELECT count(*) FILTER (WHERE reason = 'wrong-user'), count(*) FILTER (WHERE reason = 'foreign')
               FROM inbox.rejected WHERE properties::jsonb ->> 'message_id' = ANY ($1)";
    let rejected = sqlx::query_as(sql).bind(sent).fetch_one(&mut conn).await?;
    conn.close().await?;
    Ok(rejected)
}

/// A `person.deleted`, which only the relay of the person outbox may publish.
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
