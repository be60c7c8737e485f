//! Nobody can forge an event in the running system: its users of the broker are those that the script makes, and
//! the projector believes the relay's alone.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

mod support;

use std::{fs, path::Path};

use devstack::{
    stack::Stack,
    testing::{DEADLINE, client, eventually},
    users::{self, PERSON_RELAY, PROJECTOR, REPLAY},
};
use lapin::{
    BasicProperties, Confirmation, Connection, ConnectionProperties, ErrorKind,
    options::{BasicPublishOptions, ConfirmSelectOptions},
    protocol::{AMQPErrorKind, AMQPSoftError},
    types::{AMQPValue, FieldTable},
};
use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};
use support::{Apis, payload, stack};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Somebody who may write to the exchange, and is no relay of ours.
const STRANGER: &str = "stranger";

async fn permissions(stack: &Stack) -> Value {
    let url = format!("{}/api/permissions", stack.servers.rabbitmq.management_url());
    let mut all: Value = client().get(url).send().await.unwrap().json().await.unwrap();
    all.as_array_mut().unwrap().sort_by_key(|row| row["user"].to_string());
    all
}

/// The script, run against the node as an operator does, gives what the programs run with.
async fn made_by_the_script(stack: &Stack) {
    let before = permissions(stack).await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/permissions/rabbitmq.sh");
    let url = stack.servers.rabbitmq.url();
    let password = url.rsplit_once('@').unwrap().0.rsplit_once(':').unwrap().1;
    let file = stack.folder().part("script").unwrap().join("password");
    fs::write(&file, password).unwrap();
    let management = stack.servers.rabbitmq.management_url();
    for (user, arguments) in [
        (PERSON_RELAY, &["relay"][..]),
        (PROJECTOR, &["subscriber", "score"]),
        (REPLAY, &["replay", "score"]),
        (STRANGER, &["relay"]),
    ] {
        // What an earlier hand has left.
        if user != STRANGER {
            users::make(&management, "%2f", (user, "other"), users::Rights::Subscriber("x")).await.unwrap();
        }
        let arguments = [&["/", user], arguments].concat();
        stack.servers.rabbitmq.script(&script, &arguments, &file).await.unwrap();
    }
    let after = permissions(stack).await;
    let without: Vec<&Value> =
        after.as_array().unwrap().iter().filter(|row| row["user"] != STRANGER).collect();
    assert_eq!(json!(without), before);
    assert_eq!(without.len() + 1, after.as_array().unwrap().len());
}

/// A message of the person `id`, as good as a genuine one.
fn forged(type_: &str, id: &str, version: i64, source: &str, user: Option<&str>) -> BasicProperties {
    let mut headers = FieldTable::default();
    headers.insert("aggregate_type".into(), AMQPValue::LongString("person".into()));
    headers.insert("aggregate_id".into(), AMQPValue::LongString(id.into()));
    headers.insert("aggregate_version".into(), AMQPValue::LongLongInt(version));
    let properties = BasicProperties::default()
        .with_message_id(Uuid::now_v7().to_string().into())
        .with_type(type_.into())
        .with_app_id(source.into())
        .with_headers(headers);
    match user {
        Some(user) => properties.with_user_id(user.into()),
        None => properties,
    }
}

#[tokio::test]
async fn what_a_stranger_publishes_changes_nothing() {
    let mut stack = stack().await;
    let addresses = stack.addresses();
    let apis = Apis::of(&addresses);
    made_by_the_script(&stack).await;
    apis.post("/person", payload("person")).await;
    let asset = apis.post("/person/11111/asset", payload("asset")).await;
    let before = apis.until_score(11111, 5000).await;
    let id = asset.token().split_once('.').unwrap().0.to_owned();

    let url = format!("{}/%2f", stack.servers.rabbitmq.url_of(STRANGER));
    let connection = Connection::connect(&url, ConnectionProperties::default()).await.unwrap();
    let publish = async |type_: &str, properties: BasicProperties| {
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        let body = json!({"id": id, "cpf": 11111, "name": "forged", "address": null,
                          "date_of_birth": "2019-06-15T22:23:55+00:00", "created_at": "2026-01-01T00:00:00Z"});
        let body = body.to_string();
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let (key, exchange) = (type_.into(), "event_dispatcher".into());
        channel.basic_publish(exchange, key, options, body.as_bytes(), properties).await?.await
    };
    // Under the relay's name: the broker refuses it.
    let refused =
        publish("person.deleted", forged("person.deleted", &id, 3, "person", Some(PERSON_RELAY))).await;
    let error = refused.unwrap_err();
    let ErrorKind::ProtocolError(amqp) = error.kind() else { panic!("{error}") };
    assert_eq!(*amqp.kind(), AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED), "{error}");
    // Under its own, and under none; and from a source of its own, more than the breaker lets through.
    for (type_, version, user) in [
        ("person.deleted", 3, Some(STRANGER)),
        ("person.changed", 3, None),
        ("person.baseline", 9, Some(STRANGER)),
    ] {
        let confirmed = publish(type_, forged(type_, &id, version, "person", user)).await.unwrap();
        assert!(matches!(confirmed, Confirmation::Ack(None)), "{confirmed:?}");
    }
    for n in 0..25 {
        let other = Uuid::from_u128(n).to_string();
        publish("asset.new", forged("asset.new", &other, 1, "persons", Some(STRANGER))).await.unwrap();
    }

    eventually("the projector says who forges", async || {
        let said = stack.score_projector.not_ready().await.unwrap_or_else(|| "ready".to_owned());
        let named = said.starts_with("sources: ") && said.contains(STRANGER) && said.contains(PERSON_RELAY);
        if named { Ok(()) } else { Err(said) }
    })
    .await;
    // Work goes on, and everything that was there is as it was.
    apis.post("/person/11111/income", payload("income")).await;
    apis.until_score(11111, 5020).await;
    assert_eq!(before.status, 200);
    let mut conn = PgConnection::connect(&addresses.score_database_url).await.unwrap();
    let rejected = "SELECT reason, count(*) FROM inbox.rejected GROUP BY reason ORDER BY reason";
    let rows: Vec<(String, i64)> = sqlx::query_as(rejected).fetch_all(&mut conn).await.unwrap();
    assert_eq!(rows, [("foreign".to_owned(), 25), ("wrong-user".to_owned(), 3)]);
    let others = "SELECT (SELECT count(*) FROM inbox.aggregate WHERE source <> 'person') + (SELECT count(*) FROM inbox.held)";
    assert_eq!(sqlx::query_scalar::<_, i64>(others).fetch_one(&mut conn).await.unwrap(), 0);

    // As an operator who has found out who it was.
    let database = [("DATABASE_URL", addresses.score_database_url.as_str())];
    let drop = ["rejected", "drop", "--reason", "wrong-user", "--yes"];
    stack.score_projector.command(&drop, &database).await.unwrap();
    stack.score_projector.ready(DEADLINE).await.unwrap();
    stack.stop(&CancellationToken::new()).await;
}
