//! A sender that may write to the projector's queue and publishes what is not its own.

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
use crate::{broker::connect, fault::Member, field::Field};

/// The projector's queue.
const QUEUE: &str = "score";
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
