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

use crate::stack::{EXCHANGE, Message, Relay, Stack, as_of_3_10, at_terminal, eventually, output};

/// To everybody, unless a queue is named, without a question.
async fn replay(stack: &Stack, arguments: &str) -> String {
    let to = if arguments.contains("--to-queue") { "--yes" } else { "--to-everybody --yes" };
    ask(stack, &format!("{arguments} {to}")).await
}

async fn ask(stack: &Stack, arguments: &str) -> String {
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
    assert!(
        forbidden.contains("exit code: 1")
            && forbidden.contains("needs configure, write and read on outbox-replay.*"),
        "{forbidden}"
    );
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
    let mut program = stack.command("replay");
    let program = program
        .args(["--all", "--to-everybody", "--yes", "--rate", "2"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let replay = program.spawn().unwrap();
    live.until(|messages| messages.len() == 253).await;
    let interrupt = Command::new("kill").args(["-INT", &replay.id().unwrap().to_string()]).status().await;
    assert!(interrupt.unwrap().success());
    let ended = replay.wait_with_output().await.unwrap();
    assert_eq!(ended.status.code(), Some(3));
    let said = String::from_utf8(ended.stdout).unwrap();
    let (count, next) = said.trim().split_once(" events replayed; interrupted: go on with --from ").unwrap();
    let (count, next): (i64, i64) = (count.parse().unwrap(), next.parse().unwrap());
    assert!(next == count + 1 && (3..250).contains(&count), "{said}");
    let rest = self::replay(&stack, &format!("--from {next}")).await;
    assert!(rest.contains(&format!("exit code: 0\n{} events replayed", 250 - count)), "{rest}");
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
        "--all --to-queue nowhere --yes",
        "",
        // To whom it goes is said in so many words, and then confirmed.
        "--all",
        "--all --yes",
        "--all --to-queue nowhere --to-everybody",
        "--all --to-queue nowhere",
        "--aggregate thing/a3 --to-everybody",
        "--aggregate thing/a3 --to-everybody --json",
        "--all --since tomorrow",
    ] {
        said.push(ask(&stack, arguments).await);
    }
    said.push(replay(&stack, "--aggregate thing/a3 --from 50 --rate 1000").await);
    let messages = live.until(|messages| messages.len() == 105).await;
    assert!(
        messages[100..].iter().all(|m| m.header("aggregate_id") == "a3" && m.header("replayed") == "true")
    );
    insta::with_settings!({filters => vec![(r"outbox-replay\.[0-9a-f-]+", "outbox-replay.ID"), (r"'replay_part_[^']*'", "VHOST")]}, {
        insta::assert_snapshot!(as_of_3_10(&said.join("\n\n")));
    });
}

/// On a terminal it asks; only a yes publishes.
#[tokio::test]
async fn on_a_terminal_it_asks() {
    let stack = Stack::new("replay_asks").await;
    let mut live = stack.subscribe("#").await;
    stack.append(0..10, 5, &["thing.new"]).await;
    let _relay = Relay::ready(&mut stack.command("run")).await;
    live.complete(10).await;
    stack.settled("default", 10).await;
    let answered =
        async |answer| at_terminal(&stack.command("replay"), "replay --all --to-everybody", answer).await;
    let (code, said) = answered("n\n").await;
    assert!(
        said.contains(
            "Publish 10 events again to every queue that is bound to the exchange event_dispatcher? [y/N]"
        ),
        "{said}"
    );
    assert!(code == Some(3) && said.contains("10 events would be replayed"), "{said}");
    let (code, said) = answered("\n").await;
    assert!(code == Some(3) && said.contains("add --yes to do it"), "{said}");
    let (code, said) = answered("y\n").await;
    assert!(code == Some(0) && said.contains("10 events replayed"), "{said}");
    live.until(|messages| messages.len() == 20).await;
    assert!(live.messages[10..].iter().all(|message| message.header("replayed") == "true"));
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

/// How often each event of a type came.
fn copies(messages: &[Message], key: &str) -> HashMap<i64, usize> {
    let mut copies = HashMap::new();
    for message in messages.iter().filter(|message| message.key == key) {
        *copies.entry(message.number()).or_default() += 1;
    }
    copies
}

/// A replay to everybody, of whom one has a full queue: what that refuses is tried again within the relay's budget, so
/// that the others get few copies, and then the replay ends, with a word on where to go on.
#[tokio::test]
async fn beside_a_full_queue() {
    let stack = Stack::new("replay_beside_full").await;
    let mut well = stack.subscribe("#").await;
    // Pages grow: after some bills comes one with orders of as many aggregates, and between them one aggregate's bills,
    // each of which is taken.
    for n in 0..180_i64 {
        let order = n >= 70 && n % 10 == 0;
        sqlx::query(
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
             SELECT 'thing', $1, count(*) + 1, $2, json_build_object('n', $3) FROM outbox.event WHERE aggregate_id = $1",
        )
        .bind(if order { format!("o{n}") } else { "bill".to_owned() })
        .bind(if order { "order.new" } else { "bill.new" })
        .bind(n)
        .execute(&stack.writer)
        .await
        .unwrap();
    }
    let _relay = Relay::ready(&mut stack.command("run")).await;
    well.count(180).await;
    stack.settled("default", 180).await;
    let mut limits = FieldTable::default();
    limits.insert("x-max-length".into(), AMQPValue::LongInt(1));
    limits.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    stack.bind("full", "order.new", limits).await;

    let began = std::time::Instant::now();
    let said = replay(&stack, "--all").await;
    let seconds = usize::try_from(began.elapsed().as_secs()).unwrap() + 1;
    assert!(said.contains("exit code: 1\n"), "{said}");
    assert!(said.contains("is a queue at its limit?"), "{said}");
    let (_, next) = said.split_once("--from ").unwrap();
    let next: i64 = next.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap();
    assert!((1..=180).contains(&next), "{said}");
    // What came last tells that all has come.
    stack.append(1_000..1_001, 1, &["mark.new"]).await;
    well.until(|messages| messages.iter().any(|message| message.key == "mark.new")).await;
    // Nothing that was not published lies before that: of each, the relay's copy and the replay's came.
    let bills = copies(&well.messages, "bill.new");
    let mut before = (0..next - 1).filter(|n| *n < 70 || n % 10 != 0);
    assert!(before.all(|n| bills.get(&n).is_some_and(|copies| *copies >= 2)), "{bills:?} {said}");
    // The relay's own copy, the first try, and the budget.
    let orders: usize = copies(&well.messages, "order.new").values().sum();
    assert!(orders <= 11 + 11 + 10 + 10 * seconds, "{orders} copies of 11 orders in {seconds} s: {said}");

    // Once the queue is emptied, it goes on where it said.
    let mut full = stack.consume("full").await;
    let said = replay(&stack, &format!("--from {next}")).await;
    assert!(said.contains("exit code: 0\n"), "{said}");
    full.until(|messages| copies(messages, "order.new").len() == 11).await;
}

/// The broker refuses some events for themselves: they are counted, and the others come. When it refuses everything, the
/// replay ends instead of trying all of history.
#[tokio::test]
async fn with_refused_messages() {
    let stack = Stack::new("replay_refused").await;
    let mut all = stack.subscribe("#").await;
    stack.append(0..300, 300, &["order.new", "order.new", "bill.new"]).await;
    let _relay = Relay::ready(&mut stack.command("run")).await;
    all.count(300).await;
    stack.settled("default", 300).await;
    let path = format!("topic-permissions/{0}/{0}", stack.vhost);
    let permit = async |write: &str| {
        let rights = json!({"exchange": EXCHANGE, "write": write, "read": ""});
        stack.manage(reqwest::Method::PUT, &path, Some(rights)).await;
    };
    permit(r"^order\.").await;
    // The bills up to there are 10.
    let said = replay(&stack, "--all --to 30").await;
    assert!(
        said.contains(
            "exit code: 3\n20 events replayed; 10 more, which cannot be published (the log says why)"
        ),
        "{said}"
    );
    all.until(|messages| {
        (0..30).filter(|n| n % 3 < 2).all(|n| copies(&messages[300..], "order.new").contains_key(&n))
    })
    .await;
    permit("^nothing$").await;
    let said = replay(&stack, "--all").await;
    insta::with_settings!({filters => vec![(r"'?replay_refused_[0-9a-f]*'?", "VHOST")]}, {
        insta::assert_snapshot!(as_of_3_10(&said), @"
        ## replay --all --to-everybody --yes
        exit code: 1
        outbox-relay: stopped with 0 events published; go on with --from 1: the broker refused 100 events in a row, from position 1 on, the last of type order.new: ACCESS_REFUSED - access to topic 'order.new' in exchange 'event_dispatcher' in vhost VHOST refused for this user; remove the cause, or leave these events out with --type
        ");
    });
    permit(".*").await;
    let said = replay(&stack, "--from 1").await;
    assert!(said.contains("exit code: 0\n300 events replayed"), "{said}");
    let times = copies(&all.messages, "order.new");
    assert!(times.values().all(|times| *times <= 3), "{times:?}");
}

/// 20,000 events in four partitions, made over 20,000 minutes, of 2,000 aggregates and one that has half of them.
async fn history(stack: &Stack) {
    stack
        .admin
        .execute(
            "ALTER TABLE outbox.event DETACH PARTITION outbox.event_1;
             ALTER TABLE outbox.event ATTACH PARTITION outbox.event_1 FOR VALUES FROM (MINVALUE) TO (5001);
             SELECT outbox.add_partition(5000), outbox.add_partition(5000), outbox.add_partition(5000);
             INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, created_at)
             SELECT 'thing', CASE n % 2 WHEN 0 THEN 'large' ELSE 'a' || n / 2 % 2000 END,
                    CASE n % 2 WHEN 0 THEN n / 2 + 1 ELSE n / 4000 + 1 END,
                    CASE n % 4 WHEN 0 THEN 'thing.new' ELSE 'thing.some.where' END, json_build_object('n', repeat('x', 200)),
                    now() - (20000 - n) * interval '1 minute'
             FROM generate_series(0, 19999) n ORDER BY n;
             INSERT INTO outbox.relay (name, low_water, high) VALUES ('default', 20000, 20000)",
        )
        .await
        .unwrap();
    // Summarizes the index on the time.
    stack.admin.execute("VACUUM ANALYZE outbox.event").await.unwrap();
}

/// Rows that the server has read of events, by an index or without. A session tells when it ends, a moment after its program.
async fn rows_read(stack: &Stack) -> i64 {
    eventually("the program's sessions have ended", async || {
        let sql = "SELECT count(*) = 0 FROM pg_stat_activity
                   WHERE datname = current_database() AND application_name LIKE 'outbox-relay%'";
        sqlx::query_scalar::<_, bool>(sql).fetch_one(&stack.admin).await.unwrap().then_some(())
    })
    .await;
    let sql = "SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::bigint FROM pg_stat_user_tables
               WHERE schemaname = 'outbox' AND relname LIKE 'event%'";
    sqlx::query_scalar(sql).fetch_one(&stack.admin).await.unwrap()
}

/// A dry run counts, and looks at no more rows than the question needs.
#[tokio::test]
async fn a_dry_run_reads_little() {
    let stack = Stack::new("replay_rows").await;
    history(&stack).await;
    for (arguments, events, most) in [
        ("--aggregate thing/a7", 5, 100),
        ("--aggregate thing/a7 --from 12000", 2, 100),
        // Without a look at the rows.
        ("--aggregate thing/large", 10_000, 100),
        ("--aggregate thing/large --to 15100", 7_550, 5_100),
        // By the primary key alone; the first position comes by it, too.
        ("--all", 20_000, 100),
        ("--from 4000 --to 11000", 7_001, 100),
        // The index on the time sums up 128 blocks together, which is half of a partition here: two partitions of four.
        ("--since 2000m", 1_999, 11_000),
        ("--since 2000m --until 1000m --type thing.*", 250, 11_000),
        ("--type thing.#", 20_000, 20_100),
        ("--type thing.*.where --to 400", 300, 500),
    ] {
        let before = rows_read(&stack).await;
        let said = ask(&stack, &format!("{arguments} --dry-run")).await;
        let read = rows_read(&stack).await - before;
        assert!(said.contains(&format!("exit code: 0\n{events} events would be replayed")), "{said}");
        assert!(read <= most, "{arguments}: {read} rows");
    }
}

/// What is published is what a dry run counts, and is read once, in order.
#[tokio::test]
async fn a_replay_reads_what_it_publishes() {
    let stack = Stack::new("replay_reads").await;
    history(&stack).await;
    let mut all = stack.subscribe("#").await;
    let mut expected = 0;
    for (arguments, events, most) in [
        // Its positions, and then the events.
        ("--aggregate thing/a7", 5, 100),
        // The blocks that the index on the time sums up together, and the events. All before them are 18,000.
        ("--since 2000m --until 1900m", 100, 12_000),
        ("--from 10 --to 2500 --type thing.new --rate 5000", 622, 2_700),
    ] {
        let before = rows_read(&stack).await;
        let said = replay(&stack, arguments).await;
        let read = rows_read(&stack).await - before;
        assert!(said.contains(&format!("exit code: 0\n{events} events replayed")), "{said}");
        assert!(read <= most, "{arguments}: {read} rows");
        expected += events;
        all.count(expected).await;
    }
    let mut versions: HashMap<String, i64> = HashMap::new();
    for message in &all.messages[5..105] {
        let version = message.header("aggregate_version").parse().unwrap();
        let last = versions.insert(message.header("aggregate_id"), version);
        assert!(last.is_none_or(|last| last < version));
    }
}
