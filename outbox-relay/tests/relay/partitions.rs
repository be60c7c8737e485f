//! Partitions are made ahead and retired while the relay runs.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use sqlx::Executor;

use crate::stack::{Relay, Stack, at_terminal, eventually, output};

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
    stack.append(0..10, 10, &["thing.new"]).await;
    subscriber.complete(10).await;
    stack.admin.execute("SELECT setval('outbox.position', 1000000)").await.unwrap();
    stack.append(10..20, 1, &["thing.new"]).await;
    subscriber.complete(20).await;
    stack.settled("default", 1_000_010).await;
    reaches(&stack, 3_000_001).await;
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
        &["--keep", "1d", "--without-baseline"],
        &["--keep", "1d", "--without-baseline", "--yes", "--json"],
        &["--keep", "1d", "--without-baseline"],
        &[],
    ] {
        let answer = output(stack.command("prune").args(arguments)).await;
        let answer: Vec<&str> = answer.lines().map(|l| l.split(" since 20").next().unwrap()).collect();
        said.push(format!("## {}\n{}", arguments.join(" "), answer.join("\n")));
    }
    insta::assert_snapshot!(said.join("\n\n"));
}

/// On a terminal it asks before it retires what cannot be replayed again; only a yes does.
#[tokio::test]
async fn prune_asks_on_a_terminal() {
    let stack = Stack::new("relay_prune_asks").await;
    stack.append(0..10, 1, &["thing.new"]).await;
    stack.admin.execute(OLD).await.unwrap();
    let answered =
        async |typed| at_terminal(&stack.command("prune"), "prune --keep 1d --without-baseline", typed).await;
    for typed in ["n\n", "\n"] {
        let (code, said) = answered(typed).await;
        assert!(said.contains("event_1: without a newer baseline: thing/a0\r\n"), "{said}");
        assert!(said.contains("Retire 1 partition, so that the history of these aggregates"), "{said}");
        assert!(code == Some(3) && said.contains("nothing was retired"), "{said}");
        assert_eq!(count(&stack, "SELECT count(*) FROM outbox.event").await, 10);
    }
    let (code, said) = answered("y\n").await;
    assert!(code == Some(0) && said.contains("event_1: retired"), "{said}");
    assert_eq!(count(&stack, "SELECT count(*) FROM outbox.event").await, 0);
}

/// What lacks nothing is retired without a question.
#[tokio::test]
async fn prune_retires_what_can_be_replayed_without_a_question() {
    let stack = Stack::new("relay_prune_quiet").await;
    stack.append(0..10, 1, &["thing.new"]).await;
    stack.admin.execute(OLD).await.unwrap();
    let baseline = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers)
                    VALUES ('thing', 'a0', 11, 'thing.baseline', '{}', '{\"baseline\": true}')";
    stack.writer.execute(baseline).await.unwrap();
    let said = output(stack.command("prune").args(["--keep", "1d", "--without-baseline"])).await;
    assert!(said.starts_with("exit code: 0") && said.contains("event_1: retired\n"), "{said}");
}

/// What lacks nothing stays above what is kept: the baselines that the older one wants may lie in it.
#[tokio::test]
async fn prune_keeps_what_is_newer_than_what_is_kept() {
    let stack = Stack::new("relay_prune_newer").await;
    stack.append(0..10, 1, &["thing.new"]).await;
    stack
        .admin
        .execute(
            "SELECT outbox.add_partition(1000), outbox.add_partition(1000), setval('outbox.position', 1000000);
             INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
             VALUES ('thing', 'gone', 1, 'thing.new', '{}'), ('thing', 'gone', 2, 'thing.deleted', '{}');
             SELECT setval('outbox.position', 1001000);
             INSERT INTO outbox.relay (name, low_water, high) VALUES ('default', 1001000, 1001000);
             SELECT outbox.why_kept(name, '-infinity', true) FROM outbox.partition;
             UPDATE outbox.partition_age SET full_since = now() - interval '2 days'",
        )
        .await
        .unwrap();
    let prune = async |more: &[&str]| output(stack.command("prune").args(["--keep", "1d"]).args(more)).await;
    let said = prune(&[]).await;
    assert!(said.contains("event_1: kept: aggregates have neither"), "{said}");
    assert!(said.contains("event_2: kept: event_1 is older, and is kept\n"), "{said}");
    let said = prune(&["--without-baseline", "--yes"]).await;
    assert!(
        said.contains("event_1: retired; without a newer baseline: thing/a0\nevent_2: retired"),
        "{said}"
    );
}

async fn count(stack: &Stack, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(&stack.admin).await.unwrap()
}

/// The first partition is full for two days, and settled.
const OLD: &str = "
    SELECT outbox.add_partition(1000), setval('outbox.position', 1000000);
    INSERT INTO outbox.relay (name, low_water, high) VALUES ('default', 1000000, 1000000);
    SELECT outbox.why_kept('event_1', '-infinity', true);
    UPDATE outbox.partition_age SET full_since = now() - interval '2 days'";

/// An outbox of before has a first partition that would take years to fill. The relay ends it while events flow and a
/// writer is open, and its events go when they are old enough.
#[tokio::test]
async fn a_partition_in_use_for_long_is_ended_while_events_flow() {
    let stack = Stack::new("relay_ended").await;
    let mut subscriber = stack.subscribe("#").await;
    stack.append(0..500, 10, &["thing.new"]).await;
    let mut open = stack.writer.begin().await.unwrap();
    let publish = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                   VALUES ('thing', 'open', 1, 'thing.new', '{\"n\": 500}')";
    open.execute(publish).await.unwrap();
    stack.admin.execute("UPDATE outbox.source SET since = now() - interval '40 days'").await.unwrap();
    let relay = Relay::ready(stack.command("run").env("KEEP", "30d").env("WITHOUT_BASELINE", "true")).await;
    let mut next = 501;
    eventually("writers begin the next partition", async || {
        stack.append(next..next + 10, 10, &["thing.changed"]).await;
        next += 10;
        let begun = "SELECT count(*) FROM outbox.event WHERE position > 1000000";
        (count(&stack, begun).await > 0).then_some(())
    })
    .await;
    open.commit().await.unwrap();
    subscriber.complete(usize::try_from(next).unwrap()).await;
    stack.settled("default", count(&stack, "SELECT max(position) FROM outbox.event").await).await;
    relay.is_ready().await;
    assert_eq!(count(&stack, "SELECT count(*) FROM outbox.event_default").await, 0);
    assert_eq!(count(&stack, "SELECT count(*) FROM outbox.event").await, next);
    let age =
        "UPDATE outbox.partition_age SET full_since = now() - interval '31 days' WHERE name = 'event_1'";
    eventually("its age is noted", async || {
        (stack.admin.execute(age).await.unwrap().rows_affected() == 1).then_some(())
    })
    .await;
    eventually("it is retired", async || {
        let left = "SELECT count(*) FROM outbox.event WHERE position <= 1000000";
        (count(&stack, left).await == 0).then_some(())
    })
    .await;
    relay.is_ready().await;
}

/// A burst is larger than the partitions that somebody wanted small: nothing is lost, and writers leave the net soon.
#[tokio::test]
async fn a_burst_falls_into_the_net_for_a_moment() {
    let stack = Stack::new("relay_burst").await;
    let mut subscriber = stack.subscribe("#").await;
    let _relay = Relay::ready(stack.command("run").env("PARTITION_SIZE", "1000")).await;
    stack.admin.execute("SELECT setval('outbox.position', 999000)").await.unwrap();
    reaches(&stack, 1_001_001).await;
    stack.append(0..10_000, 10, &["thing.new"]).await;
    assert!(count(&stack, "SELECT count(*) FROM outbox.event_default").await > 5_000);
    let mut next = 10_000;
    eventually("writers leave the net", async || {
        stack.append(next..next + 10, 10, &["thing.changed"]).await;
        next += 10;
        let last = "SELECT count(*) FROM outbox.event WHERE tableoid <> 'outbox.event_default'::regclass
                    AND position = (SELECT max(position) FROM outbox.event)";
        (count(&stack, last).await == 1).then_some(())
    })
    .await;
    subscriber.complete(usize::try_from(next).unwrap()).await;
    stack.settled("default", count(&stack, "SELECT max(position) FROM outbox.event").await).await;
}

/// 400 events a day, and what is older than 30 days goes: played day by day, with times set back.
#[tokio::test]
async fn few_events_a_day_are_gone_in_time() {
    for baselines in [false, true] {
        let stack = Stack::new("relay_small").await;
        let mut prune = vec!["--keep", "30d"];
        if !baselines {
            prune.extend(["--without-baseline", "--yes"]);
        }
        stack.admin.execute("INSERT INTO outbox.relay (name) VALUES ('default')").await.unwrap();
        let mut oldest = Vec::new();
        for day in 0..40_i64 {
            // Ten aggregates with forty events each, in their order; once a week the first is a baseline.
            let events = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers)
                          SELECT 'thing', 'a' || n % 10, $1 * 40 + n / 10 + 1, 'thing.changed', json_build_object('day', $1),
                                 CASE WHEN $2 AND n < 10 AND $1 % 7 = 0 THEN '{\"baseline\": true}'::jsonb END
                          FROM generate_series(0, 399) n ORDER BY n";
            sqlx::query(events).bind(day).bind(baselines).execute(&stack.writer).await.unwrap();
            stack
                .admin
                .execute(
                    "UPDATE outbox.relay SET (low_water, high) = (SELECT last_value, last_value FROM outbox.position);
                     UPDATE outbox.partition_age SET full_since = full_since - interval '1 day';
                     UPDATE outbox.source SET since = since - interval '1 day'",
                )
                .await
                .unwrap();
            let said = output(stack.command("prune").args(&prune)).await;
            assert!(said.starts_with("exit code: 0"), "{said}");
            let first = "SELECT min((payload ->> 'day')::bigint) FROM outbox.event";
            oldest.push(day - count(&stack, first).await);
        }
        // Thirty days after its day of use.
        assert_eq!(oldest.iter().max(), Some(&29), "baselines: {baselines}: {oldest:?}");
        assert!(count(&stack, "SELECT count(*) FROM outbox.event").await <= 32 * 400);
        assert_eq!(count(&stack, "SELECT count(*) FROM outbox.event_default").await, 0);
    }
}

/// Partitions and erasures are looked after every ten seconds, each over a connection of its own that stays, and that is
/// replaced when the server has ended it.
#[tokio::test]
async fn each_task_keeps_its_connection() {
    let stack = Stack::new("relay_connections").await;
    let _relay = Relay::ready(&mut stack.command("run")).await;
    // None while two have one name: one that was ended is listed until it is gone, beside the one that replaces it.
    let sessions = async || -> Option<BTreeMap<String, (i32, DateTime<Utc>)>> {
        let sql = "SELECT application_name, pid, query_start FROM pg_stat_activity
                   WHERE datname = current_database() AND application_name LIKE 'outbox-relay%'
                     AND query_start IS NOT NULL";
        let rows: Vec<(String, i32, DateTime<Utc>)> =
            sqlx::query_as(sql).fetch_all(&stack.admin).await.unwrap();
        let count = rows.len();
        let sessions: BTreeMap<_, _> = rows.into_iter().map(|(name, pid, at)| (name, (pid, at))).collect();
        (sessions.len() == count).then_some(sessions)
    };
    let names = ["outbox-relay", "outbox-relay erasures", "outbox-relay partitions", "outbox-relay wake-up"];
    let first = eventually("each task has its session", async || {
        let sessions = sessions().await?;
        sessions.keys().eq(names.iter()).then_some(sessions)
    })
    .await;
    for name in ["outbox-relay erasures", "outbox-relay partitions"] {
        let (pid, at) = first[name];
        let again = eventually("the next round", async || {
            let session = sessions().await?.get(name).copied();
            session.filter(|(_, again)| *again > at + TimeDelta::seconds(5))
        })
        .await;
        assert_eq!(again.0, pid, "{name}: a new connection for each round");
        sqlx::query("SELECT pg_terminate_backend($1)").bind(pid).execute(&stack.admin).await.unwrap();
    }
    eventually("both are replaced", async || {
        let sessions = sessions().await?;
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
    let prune =
        async || output(stack.command("prune").args(["--keep", "1d", "--without-baseline", "--yes"])).await;
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
