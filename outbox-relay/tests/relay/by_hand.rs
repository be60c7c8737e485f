//! What an operator does by hand: pausing, tracing, looking after what was set aside, and beginning anew.

use lapin::types::{AMQPValue, FieldTable};
use sqlx::Executor;

use crate::stack::{Message, Relay, Stack, eventually, output};

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
            (r"\b\d{13}\b", "INCARNATION"),
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

/// A leader sets an event aside and is killed before it stores that. The next one reads the event again, which an
/// operator has dropped meanwhile.
#[tokio::test]
async fn what_was_dropped_does_not_come_back() {
    let stack = Stack::new("hand_dropped").await;
    let mut subscriber = stack.subscribe("thing.*").await;
    // As before the schema knew of such headers.
    stack.admin.execute("ALTER TABLE outbox.event DROP CONSTRAINT event_rules").await.unwrap();
    let append =
        "INSERT INTO outbox.event (id, aggregate_type, aggregate_id, version, type, payload, headers) VALUES
             ('01890000-0000-7000-8000-000000000001', 'thing', 'a', 1, 'thing.new', '{\"n\": 0}', '{\"CC\": \"queue\"}')";
    let killed = Relay::start(stack.command("run").env("FAILPOINTS", "park=return")).await;
    stack.writer.execute(append).await.unwrap();
    eventually("it is killed", async || killed.get("live").await.is_none().then_some(())).await;
    assert!(said(&stack, &["parked drop --all --yes"]).await.contains("1 event dropped"));
    let relay = Relay::ready(&mut stack.command("run")).await;
    stack.append(0..1, 1, &["thing.new"]).await;
    subscriber.complete(1).await;
    stack.settled("default", 2).await;
    relay.counts(1, 0).await;
    let later = said(&stack, &["parked list", "trace --scan 01890000-0000-7000-8000-000000000001"]).await;
    assert!(later.contains("nothing is set aside") && later.contains("given up by hand"), "{later}");
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
    // As before the schema knew of such headers.
    stack.admin.execute("ALTER TABLE outbox.event DROP CONSTRAINT event_rules").await.unwrap();
    stack.writer.execute(append).await.unwrap();
    // What somebody takes tells that somebody listens.
    let mut n = 0;
    eventually("all three are aside", async || {
        stack.append(n..n + 1, 1, &["thing.new"]).await;
        n += 1;
        let aside = "SELECT count(*) = 3 FROM outbox.parked WHERE state = 'parked'";
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

#[tokio::test]
async fn trace() {
    let stack = Stack::new("hand_trace").await;
    let relays = "INSERT INTO outbox.relay (name, low_water, high, open) VALUES
                      ('audit', 0, 0, '{}'), ('default', 2, 5, '{[3,4)}')";
    stack.admin.execute(relays).await.unwrap();
    stack.append(0..6, 1, &["thing.new", "thing.changed"]).await;
    let parked = "INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, payload,
                                             created_at, reason, detail)
                  SELECT 'default', position, id, aggregate_type, aggregate_id, version, type, payload,
                         created_at, 'refused', 'too large' FROM outbox.event WHERE position = 5";
    stack.admin.execute(parked).await.unwrap();
    let id: uuid::Uuid = sqlx::query_scalar("SELECT id FROM outbox.event WHERE position = 3")
        .fetch_one(&stack.admin)
        .await
        .unwrap();
    let by_id = said(&stack, &[&format!("trace {id}")]).await;
    let rest = [
        "trace thing/a0 --limit 3",
        "trace thing/a0 --limit 1 --json",
        "trace thing/nobody",
        "trace 01890000-0000-7000-8000-000000000001",
        "trace 01890000-0000-7000-8000-000000000001 --scan",
        "trace 01890000-0000-4000-8000-000000000001",
        "trace thing",
    ];
    assert_told!([by_id, said(&stack, &rest).await].join("\n\n"));
}

/// A leader that runs goes on under the new source, without a restart.
#[tokio::test]
async fn a_new_incarnation() {
    let stack = Stack::new("hand_incarnation").await;
    let mut subscriber = stack.subscribe("#").await;
    let relay = Relay::ready(&mut stack.command("run")).await;
    stack.append(0..10, 1, &["thing.new"]).await;
    subscriber.complete(10).await;
    let forbidden = said(&stack, &["new-incarnation", "new-incarnation --yes"]).await;
    let admin = std::env::var(devstack::testing::POSTGRES_URL).unwrap();
    let (_, database) = stack.database_url.rsplit_once('/').unwrap();
    let mut program = stack.command("new-incarnation");
    let program = program.arg("--yes").env("DATABASE_URL", format!("{admin}/{database}"));
    // What the leader has, it publishes under the old name until it is told; what it says here is true at once.
    let done = output(program).await;
    let new: i64 =
        sqlx::query_scalar("SELECT incarnation FROM outbox.source").fetch_one(&stack.admin).await.unwrap();
    stack.append(10..20, 1, &["thing.new"]).await;
    let start = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                 VALUES ('thing', 'later', 1, 'thing.new', '{\"n\": 20}')";
    stack.writer.execute(start).await.unwrap();
    let messages = subscriber.complete(21).await;
    let sources: Vec<_> =
        messages.iter().map(|m| m.properties.app_id().clone().unwrap().to_string()).collect();
    assert!(sources[..10].iter().all(|source| source == "person"), "{sources:?}");
    assert!(sources[10..].iter().all(|source| *source == format!("person~{new}")), "{sources:?}");
    let header =
        |m: &Message, name: &str| m.properties.headers().as_ref().unwrap().inner().get(name).cloned();
    for (message, source) in messages.iter().zip(&sources) {
        let n = message.number();
        let parent = (source != "person").then_some(AMQPValue::LongLongInt(1));
        assert_eq!(header(message, "source_parent"), parent, "{n}");
        // The other chain began before the incarnation did, also where it comes again from version 1 on.
        let starts = (n == 20).then_some(AMQPValue::Boolean(true));
        assert_eq!(header(message, "chain_start"), starts, "{n}");
    }
    // Used by now: the next one follows it.
    let again = output(program).await;
    relay.is_ready().await;
    assert_told!([forbidden, done, again].join("\n\n"));
}

/// On the worst day, other connections leave a command one place.
#[tokio::test]
async fn a_command_needs_one_connection() {
    let stack = Stack::new("relay_one_place").await;
    let limit = "DO $$ BEGIN
        EXECUTE format('ALTER ROLE %I CONNECTION LIMIT 1', current_database() || '_relay');
    END $$";
    sqlx::query(limit).execute(&stack.admin).await.unwrap();
    let said = output(&mut stack.command("status")).await;
    assert!(said.starts_with("exit code: 3") && said.contains("no relay has run"), "{said}");
}
