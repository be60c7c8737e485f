//! Rows that no message can carry, or that cannot even be read: stored before the schema had its checks, or in a table
//! that lost them. Each is set aside by itself, with a reason that is true, and every command goes on.

use serde_json::json;
use sqlx::{Connection, Executor};

use crate::stack::{EXCHANGE, Relay, Stack, eventually, output, program};

/// Nothing of what keeps such rows away.
pub(crate) const WITHOUT_CHECKS: &str = "
    DO $$ DECLARE c name; BEGIN
        FOR c IN SELECT conname FROM pg_constraint WHERE conrelid = 'outbox.event'::regclass AND contype = 'c' LOOP
            EXECUTE format('ALTER TABLE outbox.event DROP CONSTRAINT %I', c);
        END LOOP;
    END $$;
    ALTER TABLE outbox.event
        ALTER id DROP NOT NULL, ALTER aggregate_type DROP NOT NULL, ALTER aggregate_id DROP NOT NULL,
        ALTER version DROP NOT NULL, ALTER type DROP NOT NULL, ALTER payload DROP NOT NULL,
        ALTER created_at DROP NOT NULL";

/// What an event differs in from one that is as it should be.
const ODD: [(&str, &str); 27] = [
    ("created_at", "'infinity'::timestamptz"),
    ("created_at", "'-infinity'::timestamptz"),
    ("created_at", "'290000-01-01Z'::timestamptz"),
    ("created_at", "NULL::timestamptz"),
    ("created_at", "'0044-03-15Z BC'::timestamptz"),
    ("created_at", "'1969-12-31T23:59:59Z'::timestamptz"),
    ("version", "9223372036854775807"),
    ("version", "9223372036854775806"),
    ("version", "NULL"),
    ("id", "NULL::uuid"),
    ("aggregate_type", "NULL"),
    ("aggregate_type", "repeat('t', 300)"),
    ("aggregate_id", "NULL"),
    ("aggregate_id", "repeat('i', 300)"),
    ("type", "NULL"),
    ("type", "repeat('n', 300)"),
    ("payload", "NULL::json"),
    ("payload", "to_json(repeat('b', 17 << 20))"),
    ("payload", "(repeat('[', 2000) || repeat(']', 2000))::json"),
    ("headers", "('{\"a\":' || repeat('[', 200) || repeat(']', 200) || '}')::jsonb"),
    ("headers", "'{\"a\": [[[[1]]]]}'::jsonb"),
    ("headers", "'[1]'::jsonb"),
    ("headers", "'\"text\"'::jsonb"),
    ("headers", "'{\"a\": 1e131071}'::jsonb"),
    ("headers", "'{\"a\": 1e400}'::jsonb"),
    ("headers", "(SELECT jsonb_object_agg(n, n) FROM generate_series(1, 65) n)"),
    ("headers", "jsonb_build_object(repeat('a', 256), 1)"),
];

/// An event of its own aggregate, `n`, with one odd value.
pub(crate) fn insert(n: usize, column: &str, value: &str) -> String {
    let given = |of, default: &str| if column == of { value.to_owned() } else { default.to_owned() };
    // With a predecessor, any version is taken for the next one.
    let previous_id = if column == "version" { "gen_random_uuid()" } else { "NULL::uuid" };
    format!(
        "INSERT INTO outbox.event (id, aggregate_type, aggregate_id, version, type, payload, headers, created_at, previous_id)
         SELECT {}, {}, {}, {}, {}, {}, {}, {}, {previous_id}",
        given("id", "outbox.uuid7()"),
        given("aggregate_type", "'odd'"),
        given("aggregate_id", &format!("'{n}'")),
        given("version", "1"),
        given("type", "'odd.new'"),
        given("payload", "'{\"n\": -1}'"),
        given("headers", "NULL::jsonb"),
        given("created_at", "now()"),
    )
}

/// Each of the odd rows in turn, and after each an event that is as it should be.
async fn append(stack: &Stack) {
    stack.admin.execute(WITHOUT_CHECKS).await.unwrap();
    for (n, (column, value)) in ODD.into_iter().enumerate() {
        stack.admin.execute(sqlx::AssertSqlSafe(insert(n, column, value))).await.unwrap();
        let n = i64::try_from(n).unwrap();
        stack.append(n..n + 1, 3, &["thing.new"]).await;
    }
}

const COMMANDS: [&str; 9] = [
    "status",
    "status --json",
    "trace odd/0",
    "trace odd/2 --json",
    "replay --all --dry-run",
    "digest",
    "doctor",
    "parked list",
    "parked list --json",
];

/// What the commands end with: none of them fails.
async fn codes(stack: &Stack) -> String {
    let mut codes = Vec::new();
    for command in COMMANDS {
        let mut words = command.split_whitespace();
        let said = output(stack.command(words.next().unwrap()).args(words)).await;
        codes.push(format!("{command}: {}", said.lines().next().unwrap()));
    }
    codes.join("\n")
}

#[tokio::test]
async fn each_is_set_aside_by_itself_and_the_rest_goes_on() {
    let stack = Stack::new("rows_odd").await;
    append(&stack).await;
    stack.admin.execute("INSERT INTO outbox.relay (name) VALUES ('default')").await.unwrap();
    let before = codes(&stack).await;
    let mut subscriber = stack.subscribe("#").await;
    let relay = Relay::ready(&mut stack.command("run")).await;
    let mut good = 0;
    let came = subscriber.until(|messages| {
        good = messages.iter().filter(|message| message.header("aggregate_type") == "thing").count();
        good == ODD.len()
    });
    let mut came: Vec<String> = came
        .await
        .iter()
        .filter(|message| message.header("aggregate_type") == "odd")
        .map(|message| {
            let (column, value) = ODD[message.header("aggregate_id").parse::<usize>().unwrap()];
            let time = message.properties.timestamp().map_or("no timestamp", |_| "a timestamp");
            format!("{column} = {value}, version {}, {time}", message.header("aggregate_version"))
        })
        .collect();
    // Lanes publish side by side.
    came.sort();
    let last = i64::try_from(ODD.len()).unwrap() * 2;
    stack.settled("default", last).await;
    // An odd row stands at every second position, from the first on.
    let aside: Vec<(i64, String, String)> = sqlx::query_as(
        "SELECT position, reason, replace(detail, id::text, 'ID') FROM outbox.parked ORDER BY position",
    )
    .fetch_all(&stack.admin)
    .await
    .unwrap();
    let aside: Vec<String> = aside
        .into_iter()
        .map(|(position, reason, detail)| {
            let (column, value) = ODD[usize::try_from((position - 1) / 2).unwrap()];
            format!("{column} = {value}\n    {reason}: {detail}")
        })
        .collect();
    insta::assert_snapshot!(format!(
        "# Published\n{}\n\n# Set aside\n{}\n\n# Before\n{before}\n\n# After\n{}",
        came.join("\n"),
        aside.join("\n"),
        codes(&stack).await
    ));
    relay.is_ready().await;

    // In vain as long as the copy is not mended; and it is no reason to stop either.
    stack.admin.execute("UPDATE outbox.parked SET next_attempt_at = now()").await.unwrap();
    eventually("they were tried again", async || {
        let tried = "SELECT bool_and(next_attempt_at IS NULL AND attempts > 1) FROM outbox.parked";
        sqlx::query_scalar::<_, bool>(tried).fetch_one(&stack.admin).await.unwrap().then_some(())
    })
    .await;
    stack.append(100..101, 1, &["thing.new"]).await;
    subscriber.until(|messages| messages.iter().any(|m| m.body == "{\"n\" : 100}")).await;

    // The copy is mended as docs/operating/repair.md says, and goes out.
    let mend = "UPDATE outbox.parked SET created_at = parked_at WHERE position = 1";
    stack.admin.execute(mend).await.unwrap();
    let id: uuid::Uuid = sqlx::query_scalar("SELECT id FROM outbox.parked WHERE position = 1")
        .fetch_one(&stack.admin)
        .await
        .unwrap();
    output(stack.command("parked").args(["retry", "--id", &id.to_string()])).await;
    subscriber
        .until(|messages| {
            messages.iter().any(|message| {
                message.properties.message_id().as_ref().is_some_and(|m| m.as_str() == id.to_string())
            })
        })
        .await;
}

/// A replay publishes what it can, says what it cannot, and ends.
#[tokio::test]
async fn a_replay_says_what_it_leaves_out() {
    let stack = Stack::new("rows_replay").await;
    append(&stack).await;
    let _relay = Relay::ready(stack.command("run").env("BEGIN", "end")).await;
    let mut subscriber = stack.subscribe("thing.*").await;
    let rights = json!({"configure": r"^outbox-replay\.", "read": r"^outbox-replay\.",
                        "write": format!(r"^(outbox-replay\..*|thing\.\*|{EXCHANGE})$")});
    let path = format!("permissions/{0}/{0}", stack.vhost);
    stack.manage(reqwest::Method::PUT, &path, Some(rights)).await;
    let said = output(stack.command("replay").args(["--all", "--to-queue", "thing.*", "--yes"])).await;
    // 27 that are as they should be, and the six that a message can carry.
    assert!(
        said.starts_with("exit code: 3\n33 events replayed; 21 more, which cannot be published"),
        "{said}"
    );
    let good = |messages: &[crate::stack::Message]| messages.iter().filter(|m| m.key == "thing.new").count();
    subscriber.until(|messages| good(messages) == ODD.len()).await;
}

/// Bytes that are no UTF-8 could stand in it: the relay says so and ends, instead of stopping at the first.
#[tokio::test]
async fn a_database_in_another_encoding() {
    let admin = std::env::var(devstack::testing::POSTGRES_URL).unwrap();
    let name = format!("rows_ascii_{}", uuid::Uuid::new_v4().simple());
    let mut conn = sqlx::PgConnection::connect(&format!("{admin}/postgres")).await.unwrap();
    let create = format!("CREATE DATABASE {name} ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0");
    conn.execute(sqlx::AssertSqlSafe(create)).await.unwrap();
    let url = format!("{admin}/{name}");
    let mut conn = sqlx::PgConnection::connect(&url).await.unwrap();
    // As it was installed before that was asked.
    outbox::migrator().run(&mut conn).await.unwrap();
    conn.execute("INSERT INTO outbox.source (name) VALUES ('person')").await.unwrap();
    let mut told = Vec::new();
    for arguments in [&["run", "--listen", "127.0.0.1:0"][..], &["migrate", "--source", "person"]] {
        let mut program = program();
        let program =
            program.args(arguments).env("DATABASE_URL", &url).env("AMQP_URL", "amqp://127.0.0.1:1/%2f");
        told.push(output(program).await);
    }
    insta::assert_snapshot!(told.join("\n\n"));
}
