//! What an operator does by hand about events that wait and messages that were rejected, under the program's
//! own role, beside the program.

use std::process::{Command, Output};

use serde_json::json;
use uuid::Uuid;

use crate::stack::{PROGRAM, Stack, id, item, person, until};

fn told(output: &Output) -> String {
    let (code, out, err) = (output.status, &output.stdout, &output.stderr);
    let err: Vec<_> = std::str::from_utf8(err)
        .unwrap()
        .lines()
        // The log's lines are JSON.
        .filter(|line| !line.starts_with('{') && !devstack::testing::is_progress(line))
        .collect();
    format!("{code}\n{}{}", String::from_utf8_lossy(out), err.join("\n"))
}

impl Stack {
    /// The commands' answers.
    fn said(&self, commands: &[&str]) -> String {
        let said = commands.iter().map(|command| {
            let output = Command::new(PROGRAM)
                // What is quoted holds blanks.
                .args(command.split('\'').enumerate().flat_map(|(n, part)| match n % 2 {
                    0 => part.split_whitespace().collect(),
                    _ => vec![part],
                }))
                .env("DATABASE_URL", &self.database)
                .env("USER", "operator")
                .env("COLUMNS", "100")
                .output()
                .unwrap();
            format!("## {command}\n{}", told(&output).trim_end())
        });
        said.collect::<Vec<_>>().join("\n\n")
    }

    /// The id of the event that is held at this version of a person.
    async fn held(&self, person: Uuid, version: i64) -> Uuid {
        sqlx::query_scalar("SELECT event_id FROM inbox.held WHERE aggregate_id = $1::text AND version = $2")
            .bind(person)
            .bind(version)
            .fetch_one(&self.pool)
            .await
            .unwrap()
    }

    async fn execute(&self, sql: &'static str) {
        sqlx::raw_sql(sql).execute(&self.pool).await.unwrap();
    }

    pub(crate) async fn count(&self, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(&self.pool).await.unwrap()
    }
}

macro_rules! assert_told {
    ($name:literal, $said:expr) => {{
        let said = $said;
        insta::with_settings!({filters => vec![
            (r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?( UTC|Z)", "TIME"),
            (r"0198c0de-0000-7000-8000-00000000000(\d)", "PERSON-$1"),
            (r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID"),
            (r"operator@[\w.-]+", "operator@HOST"),
            // Numbers of rejected messages, which depend on how they were batched.
            (r#"(rejected show|--id|\nmessage|"id":|"newest":) \d+"#, "$1 N"),
        ]}, {
            insta::assert_snapshot!($name, said);
        });
    }};
}

/// Row 1 of the read model, by hand: the event that makes this person is refused until it is gone.
const OBSTACLE: &str = "INSERT INTO score.person (id, cpf, created_at, version)
                        VALUES ('0198c0de-0000-7000-8000-000000000001', 99999, now(), 1)";
const FIX: &str = "DELETE FROM score.person WHERE cpf = 99999";

#[tokio::test]
async fn held() {
    let stack = Stack::new("by_hand_held").await;
    let _program = stack.start().await;
    let nothing = stack.said(&["held list", "held list --json", "held redrive --all"]);
    stack.execute(OBSTACLE).await;
    let (p, q, r) = (id(1), id(2), id(3));
    stack.publish("person.new", p, 1, &person(p, 11111)).await;
    stack.publish("income.new", p, 2, &item(id(5), p, 11111, "1000")).await;
    stack.publish("debt.new", p, 3, &item(id(6), p, 11111, "1000")).await;
    stack.publish("person.new", q, 1, &person(q, 22222)).await;
    stack.publish("asset.new", q, 3, &item(id(7), q, 22222, "20")).await;
    // Nobody else waits.
    stack.publish("person.new", r, 1, &person(r, 33333)).await;
    stack.until_version(r, 1).await;
    let (poison, gap) = (stack.held(p, 1).await, stack.held(q, 3).await);
    let looked = stack.said(&[
        "held list",
        "held list --json",
        "held list --events",
        "held list --events --json --limit 1 --reason behind",
        "held list --reason behind",
        &format!("held show {poison}"),
        &format!("held show {poison} --json"),
        &format!("held show {gap} --body"),
        "held show 01890000-0000-7000-8000-000000000009",
    ]);
    assert_told!("held_looked_at", [nothing, looked].join("\n\n"));

    let before = stack.state().await;
    let tried = stack.said(&["held redrive", "held redrive --all --dry-run"]);
    assert_eq!(stack.state().await, before, "a dry run changes nothing");
    let again = stack.said(&["held redrive --reason poison", "held redrive --error 'knows another' --json"]);
    stack.execute(FIX).await;
    let before = stack.state().await;
    let fixed = stack.said(&["held redrive --all --dry-run --json"]);
    assert_eq!(stack.state().await, before, "a dry run changes nothing");
    let done = stack.said(&[
        &format!("held redrive --aggregate person/{p} --batch 2"),
        "held redrive --all",
        "held list",
    ]);
    assert_told!("held_redriven", [tried, again, fixed, done].join("\n\n"));
    // The program goes on where the command has come to.
    stack.publish("asset.new", p, 4, &item(id(8), p, 11111, "100000")).await;
    stack.publish("person.changed", q, 2, &person(q, 22222)).await;
    stack.until_version(p, 4).await;
    stack.until_version(q, 3).await;
    insta::assert_snapshot!("held_state", stack.state().await);
}

/// The version rises, so a reader who holds the token of the skipped write is answered.
#[tokio::test]
async fn a_skipped_event() {
    let stack = Stack::new("by_hand_skip").await;
    let _program = stack.start().await;
    let (p, q) = (id(1), id(2));
    stack.publish("person.new", p, 1, &person(p, 11111)).await;
    stack.publish("asset.new", p, 2, &item(id(5), p, 11111, "-1")).await;
    stack.publish("asset.new", p, 3, &item(id(6), p, 11111, "20")).await;
    stack.publish("asset.new", p, 4, &item(id(7), p, 11111, "-1")).await;
    stack.publish("person.new", q, 1, &person(q, 22222)).await;
    stack.until_version(q, 1).await;
    let (poison, behind) = (stack.held(p, 2).await, stack.held(p, 3).await);
    let before = stack.state().await;
    let not_done = stack.said(&[
        "held skip --why 'a typing error'",
        &format!("held skip --event {poison}"),
        &format!("held skip --event {poison} --why ''"),
        &format!("held skip --event {behind} --why 'a typing error' --yes"),
        &format!("held skip --aggregate person/{p} --version 9 --why 'a typing error'"),
        &format!("held skip --event {poison} --why 'a typing error'"),
    ]);
    assert_eq!(stack.state().await, before);
    assert_eq!(stack.count("SELECT count(*) FROM inbox.skipped").await, 0);
    let done = stack.said(&[
        &format!("held skip --event {poison} --why 'a typing error' --yes"),
        &format!("held skip --aggregate person/{p} --version 4 --by ann --why 'the same' --yes --json"),
        &format!("held show {poison}"),
        "held list",
    ]);
    assert_told!("skipped", [not_done, done].join("\n\n"));
    insta::assert_snapshot!("skipped_state", stack.state().await);
    let rights = sqlx::PgPool::connect(&stack.database).await.unwrap();
    let forgotten = sqlx::query("DELETE FROM inbox.skipped").execute(&rights).await.unwrap_err();
    assert_eq!(forgotten.as_database_error().unwrap().code().as_deref(), Some("42501"), "it is for good");
}

#[tokio::test]
async fn rejected() {
    let stack = Stack::new("by_hand_rejected").await;
    let _program = stack.start().await;
    let nothing = stack.said(&["rejected list", "rejected drop --all"]);
    let p = id(1);
    stack.publish("person.new", p, 1, &person(p, 11111)).await;
    // Not by any exchange: who writes to the queue itself may write anything.
    for body in ["no event", "no event", "another"] {
        stack.publish_to_queue("score", body).await;
    }
    stack.publish("person.new", p, 1, &json!({"id": p, "of": "another history"})).await;
    until("all are rejected", async || {
        stack.count("SELECT coalesce(sum(times), 0)::bigint FROM inbox.rejected").await == 4
    })
    .await;
    let first = stack.count("SELECT id FROM inbox.rejected WHERE body = 'no event'").await;
    let said = stack.said(&[
        "rejected list",
        "rejected list --json",
        &format!("rejected show {first}"),
        &format!("rejected show {first} --json --body"),
        "rejected show 99",
        "rejected drop",
        "rejected drop --reason fork",
        "rejected drop --reason fork --yes",
        &format!("rejected drop --id {first} --id 99 --yes --json"),
        "rejected list",
    ]);
    assert_told!("rejected", [nothing, said].join("\n\n"));
}

/// A backlog with one poison event in it costs nobody but its own person, and what was wrong can be put right.
#[tokio::test]
async fn ten_thousand_waiting_and_one_of_them_poison() {
    let stack = Stack::new("by_hand_backlog").await;
    drop(stack.start().await);
    stack.execute(OBSTACLE).await;
    let persons = 2_500;
    let mut events = Vec::new();
    for n in 0..persons {
        // The one with the obstacle among them.
        let p = id(1 + 10 * n);
        events.push(("person.new", p, 1, person(p, 1 + i64::try_from(n).unwrap())));
        for (k, kind) in [(1, "income.new"), (2, "asset.new"), (3, "debt.new")] {
            let value = if k == 2 { "100000" } else { "1000" };
            let body = item(id(1 + 10 * n + k), p, 1, value);
            events.push((kind, p, 1 + i64::try_from(k).unwrap(), body));
        }
    }
    stack.publish_all(&events).await;

    let begin = std::time::Instant::now();
    let _program = stack.start().await;
    for part in 1..=4 {
        until("a quarter more is right", async || {
            let right = "SELECT count(*) FROM score.person WHERE total = 4970 AND version = 4";
            stack.count(right).await >= part * 2_499 / 4
        })
        .await;
    }
    println!("all others are right {:.1} s after the start", begin.elapsed().as_secs_f32());
    until("the last of them waits", async || stack.count("SELECT count(*) FROM inbox.held").await == 4).await;
    let listed = stack.said(&["held list"]);
    stack.execute(FIX).await;
    let fixed = stack.said(&["held redrive --all", "held list"]);
    assert_told!("backlog", [listed, fixed].join("\n\n"));
    let right = "SELECT count(*) FROM score.person p JOIN outbox.aggregate c ON c.aggregate_id = p.id::text
                 WHERE total = 4970 AND p.version = 4 AND c.version = 3";
    assert_eq!(stack.count(right).await, 2_500);
    assert_eq!(stack.count("SELECT count(*) FROM outbox.event").await, 7_500);
}
