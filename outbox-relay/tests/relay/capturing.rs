//! Captured tables: how `doctor` finds what was not published, and how `backfill` publishes it.

use std::collections::BTreeMap;

use lapin::types::FieldTable;
use serde_json::{Value, json};
use sqlx::Executor;

use crate::stack::{EXCHANGE, Message, Relay, Stack, output};

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
        insta::assert_snapshot!(said.join("\n\n"));
    });
}

/// A late subscriber gets a copy of the table, beside its writers, and nobody else notices.
#[tokio::test]
async fn a_late_subscriber_is_filled_alone() {
    let stack = Stack::new("capturing_late").await;
    shop(&stack, 2_000).await;
    let mut live = stack.subscribe("#").await;
    let relay = Relay::ready(&mut stack.command("run")).await;
    stack.bind("late", "order.*", FieldTable::default()).await;
    let rights = json!({"configure": r"^outbox-replay\.", "read": r"^outbox-replay\.",
                        "write": format!(r"^(outbox-replay\..*|late|{EXCHANGE})$")});
    let path = format!("permissions/{0}/{0}", stack.vhost);
    stack.manage(reqwest::Method::PUT, &path, Some(rights)).await;
    let writer = tokio::spawn({
        let admin = stack.admin.clone();
        async move {
            for n in 1..=200 {
                for sql in [
                    format!("UPDATE shop.orders SET customer = 'd{n}' WHERE id IN ({n}, {n} * 10, 7)"),
                    format!("DELETE FROM shop.orders WHERE id = 2001 - {n}"),
                    format!("INSERT INTO shop.orders VALUES (3000 + {n}, 'new')"),
                ] {
                    admin.execute(sqlx::AssertSqlSafe(sql)).await.unwrap();
                }
            }
        }
    });
    let said = backfill(&stack, "order --to-queue late --rate 100000").await;
    assert!(said.contains("exit code: 0"), "{said}");
    writer.await.unwrap();
    let events: i64 =
        sqlx::query_scalar("SELECT count(*) FROM outbox.event").fetch_one(&stack.admin).await.unwrap();
    let events = usize::try_from(events).unwrap();
    live.until(|messages| messages.len() == events).await;
    assert!(live.messages.iter().all(|message| message.key != "order.baseline"));
    let rows: Vec<(i64, sqlx::types::Json<Value>)> =
        sqlx::query_as("SELECT id, to_json(o) FROM shop.orders o").fetch_all(&stack.admin).await.unwrap();
    let table: BTreeMap<i64, Value> = rows.into_iter().map(|(id, row)| (id, row.0)).collect();
    let mut late = stack.consume("late").await;
    late.until(|messages| copy(messages) == table).await;
    relay.is_ready().await;
}
