//! Every message says as whom it was published, in the property that the broker verifies.

use lapin::{Connection, ConnectionProperties};
use outbox_relay::{
    condition::{BrokerError, Said},
    identity::prove,
};
use reqwest::Method;
use serde_json::json;

use crate::stack::{EXCHANGE, Message, Relay, Stack, output};

/// With no right but to write to the exchange: live, replayed to everybody, and to one queue.
#[tokio::test]
async fn every_message_names_the_user_that_published_it() {
    let stack = Stack::new("identity").await;
    let mut all = stack.subscribe("#").await;
    stack.append(0..20, 5, &["thing.new"]).await;
    let relay = Relay::ready(&mut stack.command("run")).await;
    all.complete(20).await;
    stack.settled("default", 20).await;
    let again = async |arguments: &str| {
        let said = output(stack.command("replay").args(arguments.split_whitespace())).await;
        assert!(said.contains("exit code: 0\n20 events replayed"), "{said}");
    };
    again("--all --to-everybody --yes").await;
    all.until(|messages| messages.len() == 40).await;
    // As `rabbitmq.sh USER replay one` has it.
    let rights = include_str!("../../../deploy/permissions/replay").replace("QUEUE", "one");
    let [configure, write, read] = rights.lines().collect::<Vec<_>>()[..] else { panic!("{rights}") };
    let rights = json!({"configure": configure, "write": write, "read": read});
    stack.manage(Method::PUT, &format!("permissions/{0}/{0}", stack.vhost), Some(rights)).await;
    stack.bind("one", "nothing", lapin::types::FieldTable::default()).await;
    again("--all --to-queue one --yes").await;
    let mut one = stack.consume("one").await;
    one.complete(20).await;

    let user = |message: &Message| message.properties.user_id().clone().map(|user| user.to_string());
    for message in all.messages.iter().chain(&one.messages) {
        assert_eq!(user(message).as_ref(), Some(&stack.vhost), "{message:?}");
    }
    relay.is_ready().await;
}

/// The broker's answer to the right name, to a wrong one, and where it cannot be asked; no queue gets anything.
#[tokio::test]
async fn the_name_is_tried_before_anything_is_published() {
    let stack = Stack::new("identity_proof").await;
    let mut all = stack.subscribe("#").await;
    let connection = Connection::connect(&stack.amqp_url, ConnectionProperties::default()).await.unwrap();
    let said = Said::of(&connection);
    let tried = async |user: &str| prove(&connection, &EXCHANGE.into(), &user.into(), said.clone()).await;

    tried(&stack.vhost).await.unwrap();
    for wrong in ["another", "", &stack.vhost.to_uppercase()] {
        let error = tried(wrong).await.unwrap_err();
        assert!(matches!(&error, BrokerError::WrongName(name) if name == wrong), "{wrong:?}: {error:?}");
    }
    tried(&stack.vhost).await.unwrap();
    // Who may write some keys alone cannot ask. The broker's reason may come a moment after the refusal, so many try.
    let topics = json!({"exchange": EXCHANGE, "write": "^thing", "read": "^$"});
    let path = format!("topic-permissions/{0}/{0}", stack.vhost);
    stack.manage(Method::PUT, &path, Some(topics)).await;
    for _ in 0..50 {
        tried("another").await.unwrap();
    }

    stack.append(0..1, 1, &["thing.new"]).await;
    let _relay = Relay::ready(&mut stack.command("run")).await;
    all.until(|messages| !messages.is_empty()).await;
    assert_eq!(all.messages.len(), 1, "nothing but the event: {:?}", all.messages);
}
