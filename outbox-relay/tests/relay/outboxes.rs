//! One relay for several outboxes: none disturbs the others.

use std::{fmt::Write as _, fs, path::PathBuf};

use devstack::testing::Place;
use sqlx::{Executor, PgPool};
use uuid::Uuid;

use crate::stack::{Relay, Stack, Subscriber, eventually, output, program};

/// Outboxes whose settings are in one file.
struct Outboxes {
    folder: PathBuf,
    stacks: Vec<(&'static str, Stack)>,
}

impl Outboxes {
    async fn new(names: &[&'static str]) -> Self {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("outboxes-{}", Uuid::new_v4()));
        fs::create_dir(&folder).unwrap();
        let mut stacks = Vec::new();
        for name in names {
            let stack = Stack::new(&format!("outboxes_{name}")).await;
            let source = sqlx::query("UPDATE outbox.source SET name = $1").bind(*name);
            source.execute(&stack.admin).await.unwrap();
            fs::write(folder.join(format!("{name}-database")), &stack.database_url).unwrap();
            fs::write(folder.join(format!("{name}-broker")), &stack.amqp_url).unwrap();
            stacks.push((*name, stack));
        }
        Self { folder, stacks }
    }

    fn stack(&self, name: &str) -> &Stack {
        &self.stacks.iter().find(|(known, _)| *known == name).unwrap().1
    }

    /// Writes the file with the tables of these, each with `more`.
    fn write(&self, names: &[&str], more: &str) {
        let mut file = "lease = \"10s\"\n".to_owned();
        for name in names {
            let path = self.folder.join(name);
            let path = path.display();
            let _ = writeln!(
                file,
                "[outbox.{name}]\ndatabase-url-file = \"{path}-database\"\namqp-url-file = \"{path}-broker\"\n{more}"
            );
        }
        fs::write(self.folder.join("relay.toml"), file).unwrap();
    }

    fn command(&self, command: &str) -> tokio::process::Command {
        let mut program = program();
        program.args(command.split(' ')).env("CONFIG_FILE", self.folder.join("relay.toml"));
        program
    }
}

impl Drop for Outboxes {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

async fn arrive(stack: &Stack, subscriber: &mut Subscriber, numbers: std::ops::Range<i64>) {
    let all = usize::try_from(numbers.end).unwrap();
    stack.append(numbers, 5, &["thing.new"]).await;
    subscriber.complete(all).await;
}

/// One database is away, one is full of events that no queue takes, and one has a row that cannot be read.
#[tokio::test]
async fn one_outbox_in_trouble_disturbs_no_other() {
    let names = ["away", "unroutable", "unreadable", "well", "fine"];
    let outboxes = Outboxes::new(&names).await;
    outboxes.write(&names, "");
    let mut subscribers = Vec::new();
    for name in ["away", "unreadable", "well", "fine"] {
        subscribers.push((name, outboxes.stack(name).subscribe("thing.#").await));
    }
    let relay = Relay::start(&mut outboxes.command("run")).await;
    relay.is_ready().await;
    let healthy = output(outboxes.command("health").env("LISTEN", relay.address())).await;
    assert!(healthy.starts_with("exit code: 0"), "{healthy}");

    let away = outboxes.stack("away");
    let database: String =
        sqlx::query_scalar("SELECT current_database()").fetch_one(&away.admin).await.unwrap();
    let server = PgPool::connect(&Place::around().postgres).await.unwrap();
    let shut = |allowed: bool| format!("ALTER DATABASE {database} ALLOW_CONNECTIONS {allowed}");
    away.append(0..3, 1, &["thing.new"]).await;
    server.execute(sqlx::AssertSqlSafe(shut(false))).await.unwrap();
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1";
    sqlx::query(end).bind(&database).execute(&server).await.unwrap();
    outboxes.stack("unroutable").append(0..3_000, 50, &["nobody.wants"]).await;
    let unreadable = crate::rows::insert(1, "created_at", "'infinity'::timestamptz");
    for sql in [crate::rows::WITHOUT_CHECKS, &unreadable] {
        outboxes.stack("unreadable").admin.execute(sqlx::AssertSqlSafe(sql)).await.unwrap();
    }

    for (name, subscriber) in subscribers.iter_mut().filter(|(name, _)| *name != "away") {
        arrive(outboxes.stack(name), subscriber, 0..200).await;
    }
    let (_, body) = relay.get("ready").await.unwrap();
    let said: serde_json::Value = serde_json::from_str(&body).unwrap();
    let waiting: Vec<&str> =
        said["waiting"].as_array().unwrap().iter().map(|part| part["outbox"].as_str().unwrap()).collect();
    assert!(
        waiting.iter().all(|name| ["away", "unroutable"].contains(name)) && waiting.contains(&"away"),
        "{body}"
    );
    eventually("events are set aside", async || {
        let (_, body) = relay.get("ready").await?;
        let said: serde_json::Value = serde_json::from_str(&body).ok()?;
        let aside = said["attention"].as_array()?.iter().any(|part| part["outbox"] == "unreadable");
        aside.then_some(())
    })
    .await;
    let sick = output(outboxes.command("health").env("LISTEN", relay.address())).await;
    assert!(sick.starts_with("exit code: 1") && sick.contains("away"), "{sick}");
    let (_, metrics) = relay.get("metrics").await.unwrap();
    for name in names {
        let series = format!("outbox_relay_leaderships_total{{source=\"{name}\",relay=\"default\"}} 1");
        assert!(metrics.contains(&series), "{series}: {metrics}");
    }
    // One command for one of them.
    let status = output(&mut outboxes.command("status --outbox well")).await;
    assert!(status.contains("settled up to 200") && status.starts_with("exit code: 0"), "{status}");

    server.execute(sqlx::AssertSqlSafe(shut(true))).await.unwrap();
    let (_, subscriber) = subscribers.iter_mut().find(|(name, _)| *name == "away").unwrap();
    subscriber.complete(3).await;
}

/// What SIGHUP finds in the file: one more, one less, one that is as before, and a mistake.
#[tokio::test]
async fn outboxes_come_and_go_while_others_go_on() {
    let outboxes = Outboxes::new(&["first", "second", "third"]).await;
    outboxes.write(&["first", "second"], "");
    let mut first = outboxes.stack("first").subscribe("#").await;
    let mut third = outboxes.stack("third").subscribe("#").await;
    let mut relay = Relay::ready(&mut outboxes.command("run")).await;
    arrive(outboxes.stack("first"), &mut first, 0..10).await;

    outboxes.write(&["first", "third"], "");
    relay.signal("HUP").await;
    arrive(outboxes.stack("third"), &mut third, 0..10).await;
    relay.is_ready().await;
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                    AND application_name LIKE 'outbox-relay%'";
    eventually("the second outbox is left alone", async || {
        let left: i64 =
            sqlx::query_scalar(sessions).fetch_one(&outboxes.stack("second").admin).await.unwrap();
        (left == 0).then_some(())
    })
    .await;
    let (_, ready) = relay.get("ready").await.unwrap();
    let process: serde_json::Value = serde_json::from_str(&ready).unwrap();
    let known: Vec<&String> = process["process"]["outbox"].as_object().unwrap().keys().collect();
    assert_eq!(known, ["first", "third"]);
    let (_, metrics) = relay.get("metrics").await.unwrap();
    assert!(!metrics.contains("source=\"second\""), "{metrics}");
    // What was as before has not changed its leader.
    let epochs = |name: &'static str| {
        let admin = outboxes.stack(name).admin.clone();
        async move {
            sqlx::query_scalar::<_, i64>("SELECT epoch FROM outbox.relay").fetch_one(&admin).await.unwrap()
        }
    };
    assert_eq!(epochs("first").await, 1);

    outboxes.write(&["first", "third"], "lanes = 100");
    relay.signal("HUP").await;
    eventually("the mistake is named", async || {
        let (status, body) = relay.get("ready").await?;
        (status == 200 && body.contains("100") && body.contains("Every outbox goes on as before"))
            .then_some(())
    })
    .await;
    arrive(outboxes.stack("first"), &mut first, 10..20).await;

    outboxes.write(&["first", "third"], "lanes = 2");
    relay.signal("HUP").await;
    eventually("both begin anew", async || {
        (epochs("first").await == 2 && epochs("third").await == 2).then_some(())
    })
    .await;
    arrive(outboxes.stack("first"), &mut first, 20..30).await;
    assert!(relay.terminate().await.success());
}

/// The series of a queue that is not expected any more would keep their last values forever.
#[tokio::test]
async fn expected_subscribers_come_and_go() {
    let outboxes = Outboxes::new(&["expecting", "other"]).await;
    let names = ["expecting", "other"];
    let expect = |queue: &str| format!("[[outbox.expecting.expect]]\nqueue = \"{queue}\"\ntypes = [\"#\"]\n");
    let write = |queues: &[&str]| {
        outboxes.write(&names[..1], &queues.iter().map(|queue| expect(queue)).collect::<String>());
        let path = outboxes.folder.join("relay.toml");
        let expecting = fs::read_to_string(&path).unwrap();
        outboxes.write(&names[1..], "");
        let other = fs::read_to_string(&path).unwrap();
        let (_, other) = other.split_once('\n').unwrap();
        fs::write(&path, expecting + other).unwrap();
    };
    write(&["mail", "stock"]);
    let relay = Relay::ready(&mut outboxes.command("run")).await;
    let shown = async |queues: &[&str]| {
        eventually(&format!("series of {queues:?}"), async || {
            let (_, metrics) = relay.get("metrics").await?;
            let series = |queue: &&str| {
                format!(
                    "outbox_relay_expected_subscribers{{source=\"expecting\",relay=\"default\",queue=\"{queue}\"}} 0"
                )
            };
            let count = metrics.matches("outbox_relay_expected_subscribers{").count();
            (count == queues.len() && queues.iter().all(|queue| metrics.contains(&series(queue)))).then_some(())
        })
        .await;
    };
    shown(&["mail", "stock"]).await;
    let attends = async |queue: &str| {
        eventually(&format!("attention to {queue}"), async || {
            let (_, ready) = relay.get("ready").await?;
            let ready: serde_json::Value = serde_json::from_str(&ready).unwrap();
            let of = |said: &&serde_json::Value| said["part"] == "subscribers";
            let said = ready["attention"].as_array()?.iter().find(of)?;
            assert_eq!(said["outbox"], "expecting");
            said["reason"].as_str()?.contains(&format!("the queue {queue} does not exist")).then_some(())
        })
        .await;
    };
    attends("mail").await;
    for queues in [&["stock"][..], &["mail"], &[], &["mail", "stock"]] {
        write(queues);
        relay.signal("HUP").await;
        shown(queues).await;
        if let Some(queue) = queues.first() {
            attends(queue).await;
        }
    }
}

/// What would make one outbox of two, or none of one.
#[tokio::test]
async fn tables_that_it_does_not_start_with() {
    let outboxes = Outboxes::new(&["one", "two"]).await;
    let path = outboxes.folder.join("relay.toml");
    let good = |name: &str| {
        let path = outboxes.folder.join(name);
        format!("database-url-file = \"{0}-database\"\namqp-url-file = \"{0}-broker\"\n", path.display())
    };
    let (one, two) = (good("one"), good("two"));
    let both = format!("[outbox.one]\n{one}[outbox.two]\n{two}");
    let mut said = Vec::new();
    for (case, file, command) in [
        ("what counts", format!("lanes = 3\n{both}lanes = 8\n"), "run --check-config"),
        ("a variable of its own", both.clone(), "run --check-config"),
        ("one chosen", both.clone(), "run --check-config --outbox two"),
        ("the same twice", format!("[outbox.one]\n{one}[outbox.two]\n{one}"), "run"),
        ("none chosen", both.clone(), "status"),
        ("an unknown one chosen", both.clone(), "status --outbox three"),
        ("a bad name", format!("[outbox.One]\n{one}"), "run"),
        ("no table", "outbox = \"one\"\n".to_owned(), "run"),
        ("a setting of a table outside of one", format!("outbox.one = 3\n{one}"), "run"),
        ("an unknown setting", format!("{both}lames = 8\n"), "run"),
        ("a wrong value", format!("{both}lanes = 100\n"), "run"),
        ("no database", "[outbox.one]\nlanes = 1\n".to_owned(), "run"),
        (
            "a password",
            "[outbox.one]\ndatabase-url = \"postgres://a:dbs3cretdbs3cret@b/c\"".to_owned(),
            "run",
        ),
        ("a password as a flag", both.clone(), "run --database-url postgres://a:hush@b/c"),
    ] {
        fs::write(&path, file).unwrap();
        let mut command = outboxes.command(command);
        command.env("LISTEN", "127.0.0.1:0");
        if case == "a variable of its own" {
            command.env("OUTBOX_TWO_LANES", "5").env("LANES", "6").env("OUTBOX_ONE_EXCHANGE", "mine");
        }
        said.push(format!("## {case}\n{}", output(&mut command).await));
    }
    let mut said = said.join("\n\n").replace(outboxes.folder.to_str().unwrap(), "FOLDER");
    for (name, stack) in &outboxes.stacks {
        let (_, database) = stack.database_url.rsplit_once('/').unwrap();
        said = said
            .replace(database, &format!("DATABASE_{name}"))
            .replace(&stack.vhost, &format!("VHOST_{name}"));
    }
    insta::with_settings!({filters => vec![(r"127\.0\.0\.1:\d+", "ADDRESS")]}, {
        insta::assert_snapshot!(said);
    });
}
