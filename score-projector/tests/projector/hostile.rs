//! What a publisher puts into ids, types and routing keys is shown to people as what it is: it forges no line, moves no
//! terminal and is no part of a command.

use std::process::Command;

use crate::stack::{PROGRAM, Stack, id, item, until};

/// A line of its own, colours, a turned text, and what a shell would run.
const HOSTILE: &str = "x\nscore: nothing is held\u{1b}[31m\u{202e}$(touch forged)'\u{9b}2J";

fn said(stack: &Stack, arguments: &[&str]) -> String {
    let mut command = Command::new(PROGRAM);
    let output = command.args(arguments).env("DATABASE_URL", &stack.database).output().unwrap();
    let said = crate::stack::said(output);
    let moves = |c: char| {
        c.is_control() && c != '\n' || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    assert!(!said.contains(moves), "{said:?}");
    assert!(!said.lines().any(|line| line.trim_start().starts_with("score: nothing is held")), "{said}");
    said
}

#[tokio::test]
async fn ids_and_types_reach_terminals_escaped() {
    let stack = Stack::new("hostile").await;
    let program = stack.start().await;
    // Its first version is missing, so it is held; and what is no event is rejected.
    stack.publish("income.new", id(1), 2, &item(id(5), id(1), 11111, "1000")).await;
    stack.publish_to_queue("score", "{}").await;
    until("one is held, and one rejected", async || {
        let sql = "SELECT (SELECT count(*) FROM inbox.held) + (SELECT count(*) FROM inbox.rejected)";
        sqlx::query_scalar::<_, i64>(sql).fetch_one(&stack.pool).await.unwrap() == 2
    })
    .await;
    drop(program);
    for sql in [
        "UPDATE inbox.aggregate SET source = $1, aggregate_type = $1, aggregate_id = $1",
        "UPDATE inbox.held SET source = $1, aggregate_type = $1, aggregate_id = $1, type = $1",
        "UPDATE inbox.rejected SET routing_key = $1, detail = $1, properties = json_build_object('app_id', $1)",
    ] {
        sqlx::query(sql).bind(HOSTILE).execute(&stack.pool).await.unwrap();
    }
    let event: String =
        sqlx::query_scalar("SELECT event_id::text FROM inbox.held").fetch_one(&stack.pool).await.unwrap();
    let message: String =
        sqlx::query_scalar("SELECT id::text FROM inbox.rejected").fetch_one(&stack.pool).await.unwrap();
    let list = said(&stack, &["held", "list"]);
    let replay =
        r"outbox-relay replay --aggregate $'x\nscore: nothing is held\033[31m\342\200\256$(touch forged)\'";
    assert!(list.contains(replay), "{list}");
    let aggregate = format!("{HOSTILE}/{HOSTILE}");
    for arguments in [
        &["held", "list", "--events"][..],
        &["held", "list", "--json"],
        &["held", "list", "--events", "--aggregate", &aggregate],
        &["held", "show", &event],
        &["held", "show", &event, "--body"],
        &["held", "redrive", "--aggregate", &aggregate, "--dry-run"],
        &["held", "skip", "--event", &event, "--why", HOSTILE],
        &["rejected", "list"],
        &["rejected", "list", "--json"],
        &["rejected", "show", &message],
        &["digest"],
    ] {
        said(&stack, arguments);
    }
    // A reason of the handler's.
    let poison = "UPDATE inbox.held SET reason = 'poison', error = $1";
    sqlx::query(poison).bind(HOSTILE).execute(&stack.pool).await.unwrap();
    let list = said(&stack, &["held", "list"]);
    assert!(list.contains(r"held redrive --aggregate $'x\n"), "{list}");
    said(&stack, &["held", "show", &event]);
}
