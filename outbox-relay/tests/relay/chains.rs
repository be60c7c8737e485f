//! `doctor` on chains of versions, and the repairs that are printed, each done to a system that was used.

use lapin::types::FieldTable;
use sqlx::Executor;

use crate::stack::{Relay, Stack, eventually, output};

/// What `doctor` says of the versions.
async fn versions(stack: &Stack) -> String {
    let said = output(stack.command("doctor").env_remove("AMQP_URL")).await;
    let mut lines = said.lines().skip_while(|line| !line.contains(" versions: "));
    let mut told = vec![lines.next().unwrap().to_owned()];
    told.extend(lines.take_while(|line| line.trim_start().starts_with("->")).map(str::to_owned));
    told.join("\n")
}

/// As they were stored before the outbox checked it.
fn appended(aggregate: &str, versions: &[i64], headers: &str) -> String {
    format!(
        "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers, previous_id)
         SELECT 'order', '{aggregate}', v, 'order.changed', '{{}}', {headers}, gen_random_uuid() FROM unnest(ARRAY{versions:?}::bigint[]) v;"
    )
}

#[tokio::test]
async fn skipped_repeated_and_begun_again() {
    let stack = Stack::new("chains").await;
    let run = async |sql: String| stack.admin.execute(sqlx::AssertSqlSafe(sql)).await.map(|_| ()).unwrap();
    let mut told = vec![format!("## nothing\n{}", versions(&stack).await)];
    run(appended("right", &[1, 2, 3], "NULL") + &appended("jumped", &[1, 5], "'{\"baseline\": true}'")).await;
    told.push(format!("## whole chains, and a baseline that jumps\n{}", versions(&stack).await));
    run(appended("skips", &[1, 2, 19, 21], "NULL") + &appended("late", &[7], "NULL")).await;
    told.push(format!("## skipped\n{}", versions(&stack).await));
    // In the next partition the unique index does not see it.
    run("SELECT outbox.add_partition(1000); SELECT setval('outbox.position', 1000000); DELETE FROM outbox.event
         WHERE aggregate_id IN ('skips', 'late')"
        .to_owned())
    .await;
    run(appended("right", &[3], "NULL") + &appended("jumped", &[1, 2], "NULL")).await;
    run(appended("line\u{1b}[31m\nfeed", &[1, 3], "NULL")).await;
    told.push(format!("## repeated and begun again, across partitions\n{}", versions(&stack).await));
    // The last version that a table without checks can hold, twice.
    run("ALTER TABLE outbox.event DROP CONSTRAINT event_rules".to_owned()).await;
    run(appended("end", &[i64::MAX - 1, i64::MAX], "NULL")).await;
    run("SELECT outbox.add_partition(1000); SELECT setval('outbox.position', 1001000)".to_owned()).await;
    run(appended("end", &[i64::MAX], "NULL")).await;
    told.push(format!("## the last version there is\n{}", versions(&stack).await));
    // As it says: the whole state, with the version after the highest.
    run("DELETE FROM outbox.event WHERE aggregate_id = 'end'".to_owned()).await;
    run(appended("right", &[4], "'{\"baseline\": true}'")
        + &appended("jumped", &[6], "'{\"baseline\": true}'")
        + &appended("line\u{1b}[31m\nfeed", &[4], "'{\"baseline\": true}'"))
    .await;
    told.push(format!("## cured\n{}", versions(&stack).await));
    insta::assert_snapshot!(told.join("\n\n"));
}

/// A relay name that set events aside, and is not used any more, keeps retention waiting: it is removed by a command,
/// and never while it runs.
#[tokio::test]
async fn a_relay_that_is_not_used_any_more_is_forgotten() {
    let stack = Stack::new("forget").await;
    let mut subscriber = stack.subscribe("thing.*").await;
    stack.append(0..4, 2, &["thing.new", "audit.new"]).await;
    let admin = std::env::var(devstack::testing::POSTGRES_URL).unwrap();
    let (_, database) = stack.database_url.rsplit_once('/').unwrap();
    let owner = format!("{admin}/{database}");
    let forget = async |arguments: &[&str], url: &str| {
        output(stack.command("forget").args(arguments).env("DATABASE_URL", url)).await
    };
    // It is not ready for long: two events that nothing follows have no queue.
    let relay = Relay::start(stack.command("run").args(["--name", "old"])).await;
    let mut more = 0;
    eventually("it has set something aside", async || {
        // What somebody takes tells that somebody listens.
        stack.append(4 + 2 * more..5 + 2 * more, 2, &["thing.new"]).await;
        more += 1;
        let aside = "SELECT count(*) = 2 FROM outbox.parked WHERE relay = 'old' AND state = 'parked'";
        sqlx::query_scalar::<_, bool>(aside).fetch_one(&stack.admin).await.unwrap().then_some(())
    })
    .await;
    stack.settled("old", 4 + more).await;
    let mut told = vec![forget(&["nobody"], &owner).await, forget(&["old", "--yes"], &owner).await];
    relay.kill().await;
    // What the server still holds of a process that was killed goes with its session.
    eventually("its session is gone", async || {
        let led = "SELECT count(*) = 0 FROM pg_locks
                   WHERE locktype = 'advisory' AND classid = 1869968492 AND objsubid = 2
                     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        sqlx::query_scalar::<_, bool>(led).fetch_one(&stack.admin).await.unwrap().then_some(())
    })
    .await;
    told.push(forget(&["old"], &owner).await);
    told.push(forget(&["old", "--yes"], &stack.database_url).await);
    let left = "SELECT (SELECT count(*) FROM outbox.relay), (SELECT count(*) FROM outbox.parked)";
    assert_eq!(sqlx::query_as::<_, (i64, i64)>(left).fetch_one(&stack.admin).await.unwrap(), (1, 2));
    told.push(forget(&["old", "--yes", "--json"], &owner).await);
    assert_eq!(sqlx::query_as::<_, (i64, i64)>(left).fetch_one(&stack.admin).await.unwrap(), (0, 0));
    told.push(forget(&["old", "--yes"], &owner).await);
    let came = 2 + usize::try_from(more).unwrap();
    assert_eq!(subscriber.count(came).await.len(), came);
    let last = (4 + more).to_string();
    let told = told.join("\n\n").replace(&format!("up to {last} "), "up to LAST ");
    assert_told!("forget", told.replace(&format!("\"low_water\": {last}"), "\"low_water\": LAST"));
}

/// Each event's fate is told, once it is settled: confirmed, let go by a rule, given up by hand; and of one that is held,
/// what for.
#[tokio::test]
async fn trace_says_what_became_of_an_event() {
    let stack = Stack::new("fates").await;
    let mut subscriber = stack.subscribe("thing.*").await;
    let rules = "audit.#=drop,held.#=hold,park";
    let relay = Relay::ready(stack.command("run").env("UNROUTABLE", rules)).await;
    let append = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload) VALUES
                  ('fate', 'confirmed', 1, 'thing.new', '{}'), ('fate', 'rule', 1, 'audit.new', '{}'),
                  ('fate', 'hand', 1, 'other.new', '{}'), ('fate', 'aside', 1, 'else.new', '{}'),
                  ('fate', 'held', 1, 'held.new', '{}')";
    stack.writer.execute(append).await.unwrap();
    let mut n = 0;
    eventually("two are aside", async || {
        // What somebody takes tells that somebody listens.
        stack.append(n..n + 1, 1, &["thing.new"]).await;
        n += 1;
        let aside = "SELECT count(*) = 2 FROM outbox.parked WHERE state = 'parked' AND type IN ('other.new', 'else.new')";
        sqlx::query_scalar::<_, bool>(aside).fetch_one(&stack.admin).await.unwrap().then_some(())
    })
    .await;
    output(stack.command("parked").args(["drop", "--type", "other.new", "--yes"])).await;
    relay.waits("held.new").await;
    let trace = async |id: &str| output(stack.command("trace").arg(format!("fate/{id}"))).await;
    let held = eventually("what it waits for is stored", async || {
        let said = trace("held").await;
        said.contains("the relay waits: ").then_some(said)
    })
    .await;
    assert!(held.contains("no queue takes events of type held.new"), "{held}");
    assert!(trace("aside").await.contains("set aside: no queue takes events of type else.new"));
    let let_go = eventually("what a rule let go is stored", async || {
        let said = trace("rule").await;
        said.contains("a rule").then_some(said)
    })
    .await;
    assert!(let_go.contains("no queue took it, and a rule let it go"), "{let_go}");
    assert!(trace("confirmed").await.contains("confirmed by the broker"));
    eventually("what was given up by hand is stored", async || {
        trace("hand").await.contains("given up by hand").then_some(())
    })
    .await;
    // Known to the next leader, too; and of what was there before a relay began, nothing is known.
    relay.kill().await;
    stack.bind("all", "#", FieldTable::default()).await;
    let relay = Relay::ready(stack.command("run").args(["--name", "late", "--begin", "end"])).await;
    let late = trace("rule").await;
    assert!(late.contains("relay default: no queue took it"), "{late}");
    assert!(late.contains("relay late: settled, and it is not known how"), "{late}");
    relay.kill().await;
    subscriber.count(2).await;
}

/// Positions that were handed out and have no event are told as such, beside events that are stored.
#[tokio::test]
async fn positions_without_an_event_are_no_backlog() {
    let stack = Stack::new("no_backlog").await;
    let mut subscriber = stack.subscribe("#").await;
    let _relay = Relay::ready(&mut stack.command("run")).await;
    stack.append(0..3, 1, &["thing.new"]).await;
    subscriber.complete(3).await;
    stack.settled("default", 3).await;
    let mut rolled_back = stack.writer.begin().await.unwrap();
    let append = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                  SELECT 'thing', 'b', n, 'thing.new', '{}' FROM generate_series(1, 3) n";
    rolled_back.execute(append).await.unwrap();
    rolled_back.rollback().await.unwrap();
    let said = output(&mut stack.command("status")).await;
    let line = said.lines().find(|line| line.contains("backlog")).unwrap();
    insta::assert_snapshot!(line.trim());
}
