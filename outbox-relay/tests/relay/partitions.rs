//! Partitions are made ahead and retired while the relay runs.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use sqlx::Executor;

use crate::stack::{Relay, Stack, eventually, output};

/// Waits until partitions are made ahead up to `position`.
async fn reaches(stack: &Stack, position: i64) {
    eventually("partitions are made ahead", async || {
        let ahead = sqlx::query_scalar("SELECT max(upper) >= $1 FROM outbox.partition");
        ahead.bind(position).fetch_one(&stack.admin).await.unwrap_or(false).then_some(())
    })
    .await;
}

#[tokio::test]
async fn partitions_come_and_go_under_load() {
    let stack = Stack::new("relay_partitions").await;
    let mut subscriber = stack.subscribe("#").await;
    stack.admin.execute("SELECT setval('outbox.position', 999500)").await.unwrap();
    let relay = Relay::ready(
        stack
            .command("run")
            .env("PARTITION_SIZE", "1000")
            .env("PARTITIONS_AHEAD", "4")
            .env("KEEP", "1s")
            .env("WITHOUT_BASELINE", "true"),
    )
    .await;
    reaches(&stack, 1_004_001).await;
    for n in 0..25 {
        stack.append(n * 100..(n + 1) * 100, 10, &["thing.new"]).await;
    }
    subscriber.complete(2_500).await;
    let default: i64 = sqlx::query_scalar("SELECT count(*) FROM outbox.event_default")
        .fetch_one(&stack.admin)
        .await
        .unwrap();
    assert_eq!(default, 0);
    // Two partitions and a half: the full ones go, the last one stays.
    eventually("what is full and settled is retired", async || {
        let left = "SELECT count(*) = 0 FROM outbox.event WHERE position < 1002001";
        sqlx::query_scalar::<_, bool>(left).fetch_one(&stack.admin).await.unwrap().then_some(())
    })
    .await;
    relay.is_ready().await;
    // And the relay reads on.
    stack.append(2_500..2_600, 10, &["thing.new"]).await;
    subscriber.complete(2_600).await;
}

#[tokio::test]
async fn prune() {
    let stack = Stack::new("relay_prune").await;
    let mut subscriber = stack.subscribe("#").await;
    let _relay = Relay::ready(&mut stack.command("run")).await;
    reaches(&stack, 2_000_001).await;
    stack.append(0..10, 1, &["thing.new"]).await;
    subscriber.complete(10).await;
    stack.admin.execute("SELECT setval('outbox.position', 1000000)").await.unwrap();
    stack.append(10..20, 1, &["thing.new"]).await;
    subscriber.complete(20).await;
    stack.settled("default", 1_000_010).await;
    // An imported event is at the end, and says that it is old.
    stack.admin.execute("UPDATE outbox.event SET created_at = '2019-01-01Z'").await.unwrap();
    let young = output(stack.command("prune").args(["--keep", "1d", "--without-baseline"])).await;
    assert!(young.contains("event_1: kept: it is full only since 20"), "{young}");
    let age = "UPDATE outbox.partition_age SET full_since = now() - interval '2 days'";
    assert_eq!(stack.admin.execute(age).await.unwrap().rows_affected(), 1);
    let mut said = Vec::new();
    for arguments in [
        &["--keep", "3d"][..],
        &["--keep", "1d"],
        &["--keep", "1d", "--without-baseline", "--dry-run"],
        &["--keep", "1d", "--without-baseline", "--json"],
        &["--keep", "1d", "--without-baseline"],
        &[],
    ] {
        let answer = output(stack.command("prune").args(arguments)).await;
        let answer: Vec<&str> = answer.lines().map(|l| l.split(" since 20").next().unwrap()).collect();
        said.push(format!("## {}\n{}", arguments.join(" "), answer.join("\n")));
    }
    insta::assert_snapshot!(said.join("\n\n"));
}

/// Partitions and erasures are looked after every ten seconds, each over a connection of its own that stays, and that is
/// replaced when the server has ended it.
#[tokio::test]
async fn each_task_keeps_its_connection() {
    let stack = Stack::new("relay_connections").await;
    let _relay = Relay::ready(&mut stack.command("run")).await;
    let sessions = async || -> BTreeMap<String, (i32, DateTime<Utc>)> {
        let sql = "SELECT application_name, pid, query_start FROM pg_stat_activity
                   WHERE datname = current_database() AND application_name LIKE 'outbox-relay%'
                     AND query_start IS NOT NULL";
        let rows: Vec<(String, i32, DateTime<Utc>)> =
            sqlx::query_as(sql).fetch_all(&stack.admin).await.unwrap();
        let count = rows.len();
        let sessions: BTreeMap<_, _> = rows.into_iter().map(|(name, pid, at)| (name, (pid, at))).collect();
        assert_eq!(sessions.len(), count, "two sessions have one name");
        sessions
    };
    let names = ["outbox-relay", "outbox-relay erasures", "outbox-relay partitions", "outbox-relay wake-up"];
    let first = eventually("each task has its session", async || {
        let sessions = sessions().await;
        sessions.keys().eq(names.iter()).then_some(sessions)
    })
    .await;
    for name in ["outbox-relay erasures", "outbox-relay partitions"] {
        let (pid, at) = first[name];
        let again = eventually("the next round", async || {
            let session = sessions().await.get(name).copied();
            session.filter(|(_, again)| *again > at + TimeDelta::seconds(5))
        })
        .await;
        assert_eq!(again.0, pid, "{name}: a new connection for each round");
        sqlx::query("SELECT pg_terminate_backend($1)").bind(pid).execute(&stack.admin).await.unwrap();
    }
    eventually("both are replaced", async || {
        let sessions = sessions().await;
        names[1..3]
            .iter()
            .all(|name| sessions.get(*name).is_some_and(|(pid, _)| *pid != first[*name].0))
            .then_some(())
    })
    .await;
}

/// A reader of a partition is waited for, for some seconds, and then named.
#[tokio::test]
async fn prune_names_the_session_that_is_in_the_way() {
    let stack = Stack::new("relay_prune_reader").await;
    stack.append(0..10, 1, &["thing.new"]).await;
    stack
        .admin
        .execute(
            "SELECT outbox.add_partition(1000), setval('outbox.position', 1000000);
             INSERT INTO outbox.relay (name, low_water, high) VALUES ('default', 1000000, 1000000);
             SELECT outbox.why_kept('event_1', '-infinity', true);
             UPDATE outbox.partition_age SET full_since = now() - interval '2 days'",
        )
        .await
        .unwrap();
    let mut reader = stack.admin.begin().await.unwrap();
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *reader).await.unwrap();
    reader.execute("SET LOCAL application_name = 'a report'; SELECT FROM outbox.event_1").await.unwrap();
    let prune = async || output(stack.command("prune").args(["--keep", "1d", "--without-baseline"])).await;
    let said = prune().await;
    assert!(
        said.starts_with("exit code: 3")
            && said.contains(&format!(
                "event_1: kept: it is in use by pid {pid} (a report), idle in transaction, for "
            )),
        "{said}"
    );
    reader.rollback().await.unwrap();
    let said = prune().await;
    assert!(said.starts_with("exit code: 0\nevent_1: retired"), "{said}");
}

/// What the migration leaves out, `migrate` makes, also where it was interrupted in the middle.
#[tokio::test]
async fn migrate_makes_the_indexes_that_are_missing() {
    let stack = Stack::new("relay_indexes").await;
    stack.append(0..100, 1, &["thing.new"]).await;
    stack
        .admin
        .execute("SELECT outbox.add_partition(1000); DROP INDEX outbox.event_1_whole_state, outbox.parked_id")
        .await
        .unwrap();
    // One that was interrupted is not valid.
    stack
        .admin
        .execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'outbox.event_2_whole_state'::regclass")
        .await
        .unwrap();
    let waiting = async || -> Vec<String> {
        let sql = "SELECT name FROM outbox.partition_without_index ORDER BY name";
        sqlx::query_scalar(sql).fetch_all(&stack.admin).await.unwrap()
    };
    assert_eq!(waiting().await, ["event_1", "event_2"]);
    let url = std::env::var(devstack::testing::POSTGRES_URL).unwrap();
    let owner = format!("{url}/{}", stack.database_url.rsplit_once('/').unwrap().1);
    let mut migrate = stack.command("migrate");
    let said = output(migrate.args(["--source", "person"]).env("DATABASE_URL", owner)).await;
    assert!(said.starts_with("exit code: 0"), "{said}");
    assert_eq!(waiting().await, Vec::<String>::new());
    let valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'outbox.parked_id'::regclass";
    assert!(sqlx::query_scalar::<_, bool>(valid).fetch_one(&stack.admin).await.unwrap());
}
