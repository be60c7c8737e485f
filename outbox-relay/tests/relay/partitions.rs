//! Partitions are made ahead and retired while the relay runs.

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
    stack.admin.execute("UPDATE outbox.event SET created_at = now() - interval '2 days'").await.unwrap();
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
        let answer: Vec<&str> = answer.lines().map(|l| l.split(" of 20").next().unwrap()).collect();
        said.push(format!("## {}\n{}", arguments.join(" "), answer.join("\n")));
    }
    insta::assert_snapshot!(said.join("\n\n"));
}
