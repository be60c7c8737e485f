//! What an operator does by hand: pausing, and looking after what was set aside.

use lapin::types::FieldTable;
use sqlx::Executor;

use crate::stack::{Relay, Stack, eventually, output};

/// The command's answers, with what differs from run to run taken out.
async fn said(stack: &Stack, commands: &[&str]) -> String {
    let mut said = Vec::new();
    for command in commands {
        let mut words = command.split_whitespace();
        let mut program = stack.command(words.next().unwrap());
        let answer = output(program.args(words).env("USER", "operator")).await;
        said.push(format!("## {command}\n{answer}"));
    }
    said.join("\n\n")
}

macro_rules! assert_told {
    ($said:expr) => {{
        let said = $said;
        insta::with_settings!({filters => vec![
            (r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?( UTC|Z)", "TIME"),
            (r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID"),
            (r"operator@\S+", "operator@HOST"),
            (r"tried \d+ times?", "tried N times"),
            (r#""attempts": \d+"#, r#""attempts": N"#),
        ]}, {
            insta::assert_snapshot!(said);
        });
    }};
}

#[tokio::test]
async fn pause_and_resume() {
    let stack = Stack::new("hand_pause").await;
    let mut subscriber = stack.subscribe("#").await;
    let unknown = said(&stack, &["pause"]).await;
    let relay = Relay::ready(&mut stack.command("run")).await;
    let paused = said(&stack, &["pause --reason upgrade", "pause", "pause --json"]).await;
    relay.waits("paused by operator@").await;
    stack.append(0..10, 1, &["thing.new"]).await;
    let resumed = said(&stack, &["resume", "resume"]).await;
    subscriber.complete(10).await;
    relay.is_ready().await;
    assert_told!([unknown, paused, resumed].join("\n\n"));
}

#[tokio::test]
async fn parked() {
    let stack = Stack::new("hand_parked").await;
    let mut subscriber = stack.subscribe("thing.*").await;
    let relay = Relay::ready(&mut stack.command("run")).await;
    let nothing = said(&stack, &["parked list"]).await;
    let append =
        "INSERT INTO outbox.event (id, aggregate_type, aggregate_id, version, type, payload, headers) VALUES
             ('01890000-0000-7000-8000-000000000001', 'thing', 'a', 1, 'thing.new', '{\"n\": 0}', '{\"CC\": \"queue\"}'),
             ('01890000-0000-7000-8000-000000000002', 'thing', 'b', 1, 'score.new', '{\"n\": 1}', NULL),
             ('01890000-0000-7000-8000-000000000003', 'thing', 'c', 1, 'score.new', '{\"n\": 2}', NULL)";
    stack.writer.execute(append).await.unwrap();
    // What somebody takes tells that somebody listens.
    let mut n = 0;
    eventually("all three are aside", async || {
        stack.append(n..n + 1, 1, &["thing.new"]).await;
        n += 1;
        let aside = "SELECT count(*) = 3 FROM outbox.parked";
        sqlx::query_scalar::<_, bool>(aside).fetch_one(&stack.admin).await.unwrap().then_some(())
    })
    .await;
    // From now on nothing is tried by itself.
    stack
        .admin
        .execute(
            "UPDATE outbox.parked SET next_attempt_at = now() + interval '1 hour'
                         WHERE reason = 'unroutable'",
        )
        .await
        .unwrap();
    let aside = said(
        &stack,
        &[
            "parked list",
            "parked list --json",
            "parked show 01890000-0000-7000-8000-000000000001",
            "parked show 01890000-0000-7000-8000-000000000009",
            "parked retry",
            "parked drop --all",
            "parked drop --type audit.# --yes",
            "parked drop --reason refused --yes",
        ],
    )
    .await;
    stack.bind("scores", "score.*", FieldTable::default()).await;
    let retried = said(&stack, &["parked retry --id 01890000-0000-7000-8000-000000000003"]).await;
    let mut scores = stack.consume("scores").await;
    scores.until(|messages| messages.len() == 2).await;
    scores.assert_rising();
    eventually("nothing is aside", async || {
        said(&stack, &["parked list"]).await.contains("nothing is set aside").then_some(())
    })
    .await;
    subscriber.until(|messages| messages.len() == usize::try_from(n).unwrap()).await;
    relay.is_ready().await;
    assert_told!([nothing, aside, retried].join("\n\n"));
}
