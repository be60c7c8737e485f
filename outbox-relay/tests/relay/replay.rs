//! History, published again.

use std::{
    collections::{BTreeSet, HashMap},
    process::Stdio,
    time::Duration,
};

use lapin::{
    options::{BasicGetOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use serde_json::json;
use sqlx::Executor;
use tokio::process::Command;

use crate::stack::{EXCHANGE, Message, Relay, Stack, output};

async fn replay(stack: &Stack, arguments: &str) -> String {
    let said = output(stack.command("replay").args(arguments.split_whitespace())).await;
    format!("## replay {arguments}\n{said}")
}

/// A new subscriber gets all of history, as it was, and nobody else notices.
#[tokio::test]
async fn to_one_queue_alone() {
    let stack = Stack::new("replay_queue").await;
    let mut live = stack.subscribe("#").await;
    stack.append(0..500, 10, &["thing.new", "thing.changed"]).await;
    let relay = Relay::ready(&mut stack.command("run")).await;
    live.complete(500).await;
    stack.settled("default", 500).await;
    let options = QueueDeclareOptions { durable: true, ..Default::default() };
    stack.channel().await.queue_declare("late".into(), options, FieldTable::default()).await.unwrap();

    let forbidden = replay(&stack, "--all --to-queue late").await;
    assert!(forbidden.contains("exit code: 1") && forbidden.contains("may configure"), "{forbidden}");
    let rights = json!({"configure": r"^outbox-replay\.", "read": r"^outbox-replay\.",
                        "write": format!(r"^(outbox-replay\..*|late|{EXCHANGE})$")});
    let path = format!("permissions/{0}/{0}", stack.vhost);
    stack.manage(reqwest::Method::PUT, &path, Some(rights)).await;
    let said = replay(&stack, "--all --to-queue late").await;
    assert!(said.contains("exit code: 0\n500 events replayed"), "{said}");

    let mut late = stack.consume("late").await;
    let history = late.complete(500).await;
    let ids = |messages: &[Message]| {
        messages
            .iter()
            .map(|m| m.properties.message_id().clone().unwrap().to_string())
            .collect::<BTreeSet<_>>()
    };
    assert_eq!(ids(&live.messages), ids(history));
    assert!(history.iter().all(|message| message.header("replayed") == "true"));
    assert_eq!(history.iter().filter(|m| m.key == "thing.changed").count(), 250);
    // The others go on as if nothing had been, and nothing of it is left.
    stack.append(500..510, 10, &["thing.new", "thing.changed"]).await;
    live.until(|messages| messages.len() == 510).await;
    assert!(live.messages[500..].iter().all(|message| message.number() >= 500));
    let left: i64 =
        sqlx::query_scalar("SELECT count(*) FROM outbox.replay").fetch_one(&stack.admin).await.unwrap();
    assert_eq!(left, 0);
    let exchanges = stack.manage(reqwest::Method::GET, &format!("exchanges/{}", stack.vhost), None).await;
    assert!(!exchanges.to_string().contains("outbox-replay"), "{exchanges}");
    relay.is_ready().await;
}

/// Ctrl-C ends it where it can be continued.
#[tokio::test]
async fn interrupted() {
    let stack = Stack::new("replay_interrupted").await;
    let mut live = stack.subscribe("#").await;
    stack.append(0..250, 10, &["thing.new"]).await;
    let _relay = Relay::ready(&mut stack.command("run")).await;
    live.complete(250).await;
    stack.settled("default", 250).await;
    // After ten it waits for ten seconds.
    let mut program = stack.command("replay");
    let program = program.args(["--all", "--rate", "1"]).stdout(Stdio::piped()).stderr(Stdio::null());
    let replay = program.spawn().unwrap();
    live.until(|messages| messages.len() == 260).await;
    let interrupt = Command::new("kill").args(["-INT", &replay.id().unwrap().to_string()]).status().await;
    assert!(interrupt.unwrap().success());
    let ended = replay.wait_with_output().await.unwrap();
    assert_eq!(ended.status.code(), Some(3));
    let said = String::from_utf8(ended.stdout).unwrap();
    assert_eq!(said.trim(), "10 events replayed; interrupted: go on with --from 11");
    let rest = self::replay(&stack, "--from 11").await;
    assert!(rest.contains("exit code: 0\n240 events replayed"), "{rest}");
    let messages = live.until(|messages| messages.len() == 500).await;
    let numbers = |messages: &[Message]| messages.iter().map(Message::number).collect::<BTreeSet<_>>();
    assert_eq!(numbers(&messages[250..]), numbers(&messages[..250]));
}

#[tokio::test]
async fn a_part_to_everybody() {
    let stack = Stack::new("replay_part").await;
    let mut live = stack.subscribe("thing.*").await;
    stack.append(0..100, 10, &["thing.new", "thing.changed"]).await;
    let _relay = Relay::ready(&mut stack.command("run")).await;
    live.complete(100).await;
    stack.settled("default", 100).await;
    // What the live relay has not read is its own business.
    stack.admin.execute("UPDATE outbox.relay SET paused_at = now()").await.unwrap();
    let mut said = Vec::new();
    for arguments in [
        "--all --dry-run",
        "--from 11 --to 20 --dry-run",
        "--from 11 --to 1000000 --dry-run",
        "--since 2100-01-01T00:00:00Z --dry-run",
        "--type thing.new --dry-run --json",
        "--aggregate thing/a3 --dry-run",
        "--aggregate thing --dry-run",
        "--all --to-queue nowhere",
        "",
    ] {
        said.push(replay(&stack, arguments).await);
    }
    said.push(replay(&stack, "--aggregate thing/a3 --from 50 --rate 1000").await);
    let messages = live.until(|messages| messages.len() == 105).await;
    assert!(
        messages[100..].iter().all(|m| m.header("aggregate_id") == "a3" && m.header("replayed") == "true")
    );
    insta::with_settings!({filters => vec![(r"outbox-replay\.[0-9a-f-]+", "outbox-replay.ID"), (r"'replay_part_[^']*'", "VHOST")]}, {
        insta::assert_snapshot!(said.join("\n\n"));
    });
}

/// A queue at its limit refuses some of a window and takes others: each aggregate's order holds all the same.
#[tokio::test]
async fn a_full_queue_gets_history_in_order() {
    let stack = Stack::new("replay_full").await;
    let mut live = stack.subscribe("#").await;
    stack.append(0..300, 4, &["thing.changed"]).await;
    let _relay = Relay::ready(&mut stack.command("run")).await;
    live.complete(300).await;
    stack.settled("default", 300).await;
    let mut limits = FieldTable::default();
    limits.insert("x-max-length".into(), AMQPValue::LongInt(7));
    limits.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    let options = QueueDeclareOptions { durable: true, ..Default::default() };
    stack.channel().await.queue_declare("late".into(), options, limits).await.unwrap();
    let rights = json!({"configure": r"^outbox-replay\.", "read": r"^outbox-replay\.",
                        "write": format!(r"^(outbox-replay\..*|late|{EXCHANGE})$")});
    let path = format!("permissions/{0}/{0}", stack.vhost);
    stack.manage(reqwest::Method::PUT, &path, Some(rights)).await;

    // Its reader takes one at a time, so that it is full again and again in the middle of a window.
    let slow_reader = async {
        let channel = stack.channel().await;
        let mut versions: HashMap<String, i64> = HashMap::new();
        while versions.values().sum::<i64>() < 300 {
            let got = channel.basic_get("late".into(), BasicGetOptions { no_ack: true }).await.unwrap();
            let Some(got) = got else {
                tokio::time::sleep(Duration::from_millis(1)).await;
                continue;
            };
            let message = Message::from(got.delivery);
            let last = versions.entry(message.header("aggregate_id")).or_default();
            assert_eq!(message.header("aggregate_version"), (*last + 1).to_string());
            *last += 1;
        }
    };
    let (said, ()) = tokio::join!(replay(&stack, "--all --to-queue late"), slow_reader);
    assert!(said.contains("exit code: 0\n300 events replayed"), "{said}");
}
