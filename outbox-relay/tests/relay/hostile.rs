//! What a writer puts into ids, types and reasons is shown to people as what it is: it forges no line, moves no terminal
//! and is no part of a command.

use sqlx::Executor;

use crate::stack::{Relay, Stack, eventually, output};

/// A line of its own, colours, a turned text, and what a shell would run.
const HOSTILE: &str = "x\nrelay default: forged\u{1b}[31m\u{202e}$(touch forged)'\u{9b}2J";

/// No character that moves a terminal, and no line that the hostile text has begun.
fn is_safe(said: &str) {
    let moves = |c: char| {
        c.is_control() && c != '\n' || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    assert!(!said.contains(moves), "{said:?}");
    assert!(!said.lines().any(|line| line.trim_start().starts_with("relay default: forged")), "{said}");
}

#[tokio::test]
async fn ids_and_types_reach_terminals_and_logs_escaped() {
    let stack = Stack::new("hostile").await;
    let _well = stack.subscribe("thing.#").await;
    let relay = Relay::ready(stack.command("run").env("LOG_FORMAT", "human")).await;
    let append = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                  VALUES ($1, $1, 1, 'bad' || $1, '{}') RETURNING id::text";
    let id: String = sqlx::query_scalar(append).bind(HOSTILE).fetch_one(&stack.admin).await.unwrap();
    let mut number = 0;
    eventually("it is set aside, since others are taken", async || {
        stack.append(number..number + 1, 1, &["thing.new"]).await;
        number += 1;
        let parked = "SELECT count(*) FROM outbox.parked WHERE state = 'parked'";
        (sqlx::query_scalar::<_, i64>(parked).fetch_one(&stack.admin).await.unwrap() == 1).then_some(())
    })
    .await;
    // What a leader waits for, and who paused it, are texts as well.
    let aggregate = format!("{HOSTILE}/{HOSTILE}");
    let unknown = format!("{HOSTILE}/unknown");
    let mut said = Vec::new();
    for args in [
        &["trace", &aggregate][..],
        &["trace", &unknown],
        &["trace", &aggregate, "--json"],
        &["parked", "list"],
        &["parked", "list", "--json"],
        &["parked", "show", &id],
        &["status"],
        &["doctor"],
        &["digest"],
    ] {
        let answer = output(stack.command(args[0]).args(&args[1..])).await;
        is_safe(&answer);
        said.push(format!(
            "## {}\n{answer}",
            args.iter().map(|arg| arg.escape_debug().to_string()).collect::<Vec<_>>().join(" ")
        ));
    }
    assert!(
        said[0].contains(r"of x\nrelay default: forged\u{1b}[31m\u{202e}$(touch forged)'\u{9b}2J/x\n"),
        "{}",
        said[0]
    );
    assert!(said[3].contains(r"of type badx\nrelay"), "{}", said[3]);
    let json: serde_json::Value =
        serde_json::from_str(said[2].split_once("exit code: 0\n").unwrap().1).unwrap();
    assert_eq!(json["events"][0]["event"]["aggregate_id"], HOSTILE, "JSON says the text itself");

    let session = "SET application_name = 'x\nrelay default: forged\u{1b}[31m'; SELECT pg_advisory_lock_shared(1869968482, 1)";
    let mut holder = stack.admin.acquire().await.unwrap();
    holder.execute(sqlx::raw_sql(session)).await.unwrap();
    for command in ["status", "doctor"] {
        is_safe(&output(&mut stack.command(command)).await);
    }
    drop(holder);

    // Held, by a rule: the reason names the type, and a command with it.
    drop(relay);
    let relay = Relay::start(stack.command("run").env("LOG_FORMAT", "human").env("UNROUTABLE", "hold")).await;
    let append = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                  VALUES ('thing', 'hostile', 1, 'bad' || $1, '{}')";
    sqlx::query(append).bind(HOSTILE).execute(&stack.writer).await.unwrap();
    let said = relay.waits("no queue takes events of type").await;
    is_safe(&said);
    let rule =
        r"--unroutable $'badx\nrelay default: forged\033[31m\342\200\256$(touch forged)\'\302\2332J=drop'";
    assert!(said.contains(rule), "{said}");
    is_safe(&output(&mut stack.command("status")).await);
    let log = relay.log();
    is_safe(&log);
    assert!(log.contains("no queue takes events of type badx"), "{log}");
    assert!(log.lines().all(|line| line.starts_with("20")), "a line is forged: {log}");
}
