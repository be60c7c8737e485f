//! Captured tables: how `doctor` finds what was not published, and how `backfill` publishes it.

use std::{collections::BTreeMap, process::Stdio};

use lapin::types::FieldTable;
use serde_json::{Value, json};
use sqlx::Executor;
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use crate::stack::{EXCHANGE, Message, Relay, Stack, as_of_3_10, output};

/// Orders that are older than their capture.
async fn shop(stack: &Stack, orders: i32) {
    for sql in [
        "CREATE SCHEMA shop".to_owned(),
        "CREATE TABLE shop.orders (id bigint PRIMARY KEY, customer text NOT NULL)".to_owned(),
        format!("INSERT INTO shop.orders SELECT n, 'c' || n FROM generate_series(1, {orders}) n"),
        "SELECT outbox.capture('shop.orders', 'order')".to_owned(),
    ] {
        stack.admin.execute(sqlx::AssertSqlSafe(sql)).await.unwrap();
    }
}

async fn backfill(stack: &Stack, arguments: &str) -> String {
    let mut command = stack.command("backfill");
    // An argument in quotes has spaces.
    for (n, part) in arguments.split('"').enumerate() {
        if n % 2 == 1 {
            command.arg(part);
        } else {
            command.args(part.split_whitespace());
        }
    }
    format!("## backfill {arguments}\n{}", output(&mut command).await)
}

async fn doctor(stack: &Stack, arguments: &[&str]) -> String {
    let said = output(stack.command("doctor").args(arguments).env_remove("AMQP_URL")).await;
    let mut lines = said.lines().skip_while(|line| !line.contains(" capture")).collect::<Vec<_>>();
    lines.retain(|line| {
        line.contains(" captur") || line.contains("outbox.capture") || line.contains("backfill")
    });
    lines.join("\n")
}

/// Each body, by aggregate and version, as a subscriber has it in the end that takes what is newer.
fn copy(messages: &[Message]) -> BTreeMap<i64, Value> {
    let mut newest: BTreeMap<String, (i64, &Message)> = BTreeMap::new();
    for message in messages {
        let version: i64 = message.header("aggregate_version").parse().unwrap();
        let last = newest.entry(message.header("aggregate_id")).or_insert((0, message));
        if version > last.0 {
            *last = (version, message);
        }
    }
    let bodies = newest.into_iter().filter(|(_, (_, message))| message.key != "order.deleted");
    bodies
        .map(|(id, (_, message))| (id.parse().unwrap(), serde_json::from_str(&message.body).unwrap()))
        .collect()
}

#[tokio::test]
async fn what_was_never_published_is_found_and_told() {
    let stack = Stack::new("capturing_backfill").await;
    let mut live = stack.subscribe("#").await;
    let _relay = Relay::ready(&mut stack.command("run")).await;
    let mut said = vec![doctor(&stack, &["--deep"]).await];
    shop(&stack, 250).await;
    said.push(doctor(&stack, &["--deep"]).await);
    said.push(backfill(&stack, "order --dry-run --where \"o.id % 2 = 0\"").await);
    let grant = "GRANT USAGE ON SCHEMA shop TO PUBLIC; GRANT SELECT ON shop.orders TO PUBLIC";
    stack.admin.execute(sqlx::raw_sql(grant)).await.unwrap();
    for arguments in [
        "basket",
        "order --dry-run",
        "order --dry-run --json --where \"o.id % 2 = 0\"",
        "order --where \"o.id <= 2\"",
        "order --where \"o.id <= 2 ; DROP\" --dry-run",
        "order --after 240 --rate 100000",
        "order --differing --dry-run",
        "order --differing",
        "order --differing",
        "order --differing --to-queue late",
        "order --to-queue nowhere",
    ] {
        said.push(backfill(&stack, arguments).await);
    }
    live.until(|messages| messages.len() == 250).await;
    assert!(
        live.messages
            .iter()
            .all(|message| message.key == "order.baseline" && message.header("baseline") == "true")
    );
    // What no trigger saw.
    for sql in [
        "ALTER TABLE shop.orders DISABLE TRIGGER USER",
        "UPDATE shop.orders SET customer = 'unseen' WHERE id = 7",
        "DELETE FROM shop.orders WHERE id = 8",
    ] {
        stack.admin.execute(sql).await.unwrap();
    }
    said.push(doctor(&stack, &["--deep"]).await);
    said.push(backfill(&stack, "order --differing").await);
    stack.admin.execute("SELECT outbox.capture('shop.orders', 'order')").await.unwrap();
    said.push(doctor(&stack, &["--deep"]).await);
    let messages = live.until(|messages| messages.len() == 252).await;
    said.push(
        messages[250..]
            .iter()
            .map(|m| format!("{} {}", m.key, m.header("aggregate_version")))
            .collect::<Vec<_>>()
            .join(", "),
    );
    insta::with_settings!({filters => vec![(r"outbox-replay\.[0-9a-f-]+", "outbox-replay.ID"), (r"'capturing_[^']*'", "VHOST")]}, {
        insta::assert_snapshot!(as_of_3_10(&said.join("\n\n")));
    });
}

/// A late subscriber gets a copy of a table of 20,000 rows, beside its writers, and no other queue gets anything of it. An
/// interrupted backfill says where to go on.
#[tokio::test]
async fn a_late_subscriber_is_filled_alone() {
    let stack = Stack::new("capturing_late").await;
    shop(&stack, 20_000).await;
    let mut live = stack.subscribe("#").await;
    let relay = Relay::ready(&mut stack.command("run")).await;
    stack.bind("late", "order.*", FieldTable::default()).await;
    let rights = json!({"configure": r"^outbox-replay\.", "read": r"^outbox-replay\.",
                        "write": format!(r"^(outbox-replay\..*|late|{EXCHANGE})$")});
    let path = format!("permissions/{0}/{0}", stack.vhost);
    stack.manage(reqwest::Method::PUT, &path, Some(rights)).await;
    let filled = CancellationToken::new();
    let writer = tokio::spawn({
        let (admin, filled) = (stack.admin.clone(), filled.clone());
        async move {
            let mut n = 0;
            while n < 500 && !(filled.is_cancelled() && n >= 200) {
                n += 1;
                for sql in [
                    format!("UPDATE shop.orders SET customer = 'd{n}' WHERE id IN ({n}, {n} * 39, 7)"),
                    format!("DELETE FROM shop.orders WHERE id = 20001 - {n}"),
                    format!("INSERT INTO shop.orders VALUES (200000 + {n}, 'new')"),
                ] {
                    admin.execute(sqlx::AssertSqlSafe(sql)).await.unwrap();
                }
            }
        }
    });
    let mut late = stack.consume("late").await;
    let mut program = stack.command("backfill");
    // Slow enough to be interrupted in the middle.
    program.args(["order", "--to-queue", "late", "--rate", "4000"]).stdout(Stdio::piped());
    let interrupted = program.stderr(Stdio::null()).spawn().unwrap();
    late.until(|messages| messages.iter().filter(|m| m.key == "order.baseline").count() >= 1_000).await;
    let interrupt =
        Command::new("kill").args(["-INT", &interrupted.id().unwrap().to_string()]).status().await;
    assert!(interrupt.unwrap().success());
    let ended = interrupted.wait_with_output().await.unwrap();
    let said = String::from_utf8(ended.stdout).unwrap();
    assert_eq!(ended.status.code(), Some(3), "{said}");
    let (first, after) = said
        .trim()
        .split_once(" events published; interrupted: go on with --after '")
        .unwrap_or_else(|| panic!("{said}"));
    let (first, after): (usize, i64) =
        (first.replace(',', "").parse().unwrap(), after.trim_end_matches('\'').parse().unwrap());
    assert!((1_000..20_000).contains(&first), "{said}");
    let said =
        backfill(&stack, &format!("order --to-queue late --rate 1000000 --after {after} --json")).await;
    assert!(said.contains("exit code: 0"), "{said}");
    let answer: Value = serde_json::from_str(&said[said.find('{').unwrap()..]).unwrap();
    let rest = usize::try_from(answer["events"].as_u64().unwrap()).unwrap();
    filled.cancel();
    writer.await.unwrap();
    let events: i64 =
        sqlx::query_scalar("SELECT count(*) FROM outbox.event").fetch_one(&stack.admin).await.unwrap();
    let events = usize::try_from(events).unwrap();
    live.until(|messages| messages.len() >= events).await;
    assert!(live.messages.iter().all(|message| message.key != "order.baseline"));
    let rows: Vec<(i64, sqlx::types::Json<Value>)> =
        sqlx::query_as("SELECT id, to_json(o) FROM shop.orders o").fetch_all(&stack.admin).await.unwrap();
    let table: BTreeMap<i64, Value> = rows.into_iter().map(|(id, row)| (id, row.0)).collect();
    let copied = copy(late.count(events + first + rest).await);
    let differing: Vec<_> = table.iter().filter(|(id, row)| copied.get(id) != Some(row)).take(5).collect();
    assert!(
        differing.is_empty() && copied.len() == table.len(),
        "{} of {}: {differing:?}",
        copied.len(),
        table.len()
    );
    relay.is_ready().await;
}
