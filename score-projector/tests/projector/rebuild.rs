//! A read model that is built again beside the live one.

use std::{fmt::Write, sync::Arc};

use serde_json::{Value, json};
use sqlx::Connection;
use uuid::Uuid;

use crate::stack::{Stack, id, item, person, until};

/// Waits until the shadow may take the live model's place.
pub(crate) async fn until_level(stack: &Stack) {
    until("the shadow is level", async || stack.owner(&["rebuild", "status"]).0 == 0).await;
}

/// Starts a rebuild; its queue.
pub(crate) fn start(stack: &Stack) -> String {
    let (code, said) = stack.owner(&["rebuild", "start", "--json"]);
    assert_eq!(code, 0, "{said}");
    let answer: Value = serde_json::from_str(&said).unwrap();
    answer["queue"].as_str().unwrap().to_owned()
}

/// What each command says, and how it ends.
fn says(stack: &Stack, text: &mut String, arguments: &[&str]) {
    let (code, said) = stack.owner(arguments);
    let time = |line: &str| {
        line.split_once("since 20")
            .map(|(before, after)| format!("{before}since TIME{}", after.split_once(" UTC").unwrap().1))
    };
    let said: Vec<String> = said.lines().map(|line| time(line).unwrap_or_else(|| line.to_owned())).collect();
    writeln!(text, "$ score-projector {}\n{}\n=> {code}\n", arguments.join(" "), said.join("\n")).unwrap();
}

/// Schemas, tables, models, queues, and whom the inbox knows.
async fn traces(stack: &Stack) -> String {
    let rows: Vec<String> = sqlx::query_scalar(
        "SELECT concat_ws(' ', n.nspname, c.relkind, c.relname, c.relacl) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname LIKE 'score%' OR n.nspname LIKE 'inbox%' OR n.nspname LIKE 'outbox%'
         UNION ALL SELECT concat_ws(' ', nspname, nspacl) FROM pg_namespace WHERE nspname NOT LIKE 'pg_%'
         UNION ALL SELECT concat_ws(' ', 'model', role, consumer, queue) FROM score.model
         UNION ALL SELECT concat_ws(' ', 'inbox', consumer, aggregate_id, version) FROM inbox.aggregate
         UNION ALL SELECT concat_ws(' ', 'held', consumer, aggregate_id, version) FROM inbox.held
         UNION ALL SELECT concat_ws(' ', 'rejected', consumer, detail) FROM inbox.rejected
         UNION ALL SELECT concat_ws(' ', 'event', aggregate_id, version, type) FROM outbox.event
         ORDER BY 1",
    )
    .fetch_all(&stack.pool)
    .await
    .unwrap();
    format!("{}\nqueues {:?}", rows.join("\n"), stack.queues().await)
}

/// Persons 1 to 5, each with two assets.
async fn persons(stack: &Stack) {
    for n in 1..=5 {
        let p = id(n * 100);
        stack.publish("person.new", p, 1, &person(p, 11_110 + i64::try_from(n).unwrap())).await;
        stack.publish("asset.new", p, 2, &item(id(n * 100 + 1), p, 1, "20")).await;
        stack.publish("asset.new", p, 3, &item(id(n * 100 + 2), p, 1, "40")).await;
    }
    for n in 1..=5 {
        stack.until_version(id(n * 100), 3).await;
    }
}

#[tokio::test]
async fn a_live_model_that_is_wrong_is_repaired_by_the_swap() {
    let stack = Stack::new("repair").await;
    let _program = stack.start().await;
    persons(&stack).await;
    // Somebody's hand: a wrong total, a missing entry, a wrong value, a person too few and one too many.
    sqlx::raw_sql(
        "UPDATE score.person SET total = 77 WHERE id = '0198c0de-0000-7000-8000-000000000064';
         DELETE FROM score.entry WHERE id = '0198c0de-0000-7000-8000-0000000000c9';
         UPDATE score.entry SET value = 1000, score = 3 WHERE id = '0198c0de-0000-7000-8000-00000000012d';
         DELETE FROM score.person WHERE id = '0198c0de-0000-7000-8000-000000000190';
         INSERT INTO score.person (id, cpf, created_at, version, total) VALUES ('0198c0de-0000-7000-8000-000000000999', 9, now(), 1, 0);
         SELECT outbox.number_by('score', 'outbox',
                                 $$SELECT '0198c0de-0000-7000-8000-000000000999' AS id, 4 AS version$$);",
    )
    .execute(&stack.pool)
    .await
    .unwrap();
    let before: i64 =
        sqlx::query_scalar("SELECT max(position) FROM outbox.event").fetch_one(&stack.pool).await.unwrap();
    let mut text = String::new();
    says(&stack, &mut text, &["verify"]);
    let queue = start(&stack);
    stack.replay(&queue).await;
    until_level(&stack).await;
    for arguments in [
        &["rebuild", "status"][..],
        &["rebuild", "status", "--difference"],
        &["rebuild", "swap", "--dry-run"],
        &["rebuild", "swap"],
        &["rebuild", "status"],
        &["verify"],
        &["rebuild", "start"],
        &["rebuild", "drop"],
        &["rebuild", "drop"],
        &["rebuild", "status"],
    ] {
        says(&stack, &mut text, arguments);
    }
    let events: Vec<String> = sqlx::query_scalar(
        "SELECT concat_ws(' ', type, aggregate_id, version, payload) FROM outbox.event WHERE position > $1 ORDER BY position",
    )
    .bind(before)
    .fetch_all(&stack.pool)
    .await
    .unwrap();
    insta::assert_snapshot!(format!("{text}published by the swap:\n{}", events.join("\n")));
    // By the name that it had before, too, it is found.
    let now: Vec<String> =
        sqlx::query_scalar("SELECT inbox.current_consumer(unnest(ARRAY['score', 'score-2', 'other']))")
            .fetch_all(&stack.pool)
            .await
            .unwrap();
    assert_eq!(now, ["score-2", "score-2", "other"]);
    assert_eq!(stack.queues().await, ["score", "score.dead"], "the shadow's queue is gone");

    // The live queue goes on, under the new name.
    let p = id(100);
    stack.publish("asset.new", p, 4, &item(id(103), p, 1, "20")).await;
    stack.until_version(p, 4).await;
    assert_eq!(stack.owner(&["verify"]).0, 0);
    let consumers: Vec<String> = sqlx::query_scalar("SELECT DISTINCT consumer FROM inbox.aggregate")
        .fetch_all(&stack.pool)
        .await
        .unwrap();
    assert_eq!(consumers, ["score-2"]);
}

#[tokio::test]
async fn what_a_shadow_holds_is_brought_on_by_hand() {
    let stack = Stack::new("shadow_held").await;
    let _program = stack.start().await;
    persons(&stack).await;
    let queue = start(&stack);
    // The shadow alone stumbles: somebody has put a person there.
    let stray = "INSERT INTO score_shadow.person (id, cpf, created_at, version) VALUES ($1, 9, now(), 1)";
    sqlx::query(stray).bind(id(100)).execute(&stack.pool).await.unwrap();
    stack.replay(&queue).await;
    until("the others are level, and three events are held", async || {
        let (_, said) = stack.owner(&["held", "list", "--shadow"]);
        said.contains("3 events held") && stack.owner(&["rebuild", "status"]).1.contains("1 behind")
    })
    .await;
    sqlx::query("DELETE FROM score_shadow.person WHERE id = $1")
        .bind(id(100))
        .execute(&stack.pool)
        .await
        .unwrap();
    let mut text = String::new();
    for arguments in [
        &["held", "list"][..],
        &["held", "list", "--shadow"],
        &["held", "redrive", "--shadow", "--all"],
        &["held", "list", "--shadow"],
        &["rebuild", "swap"],
        &["verify"],
    ] {
        says(&stack, &mut text, arguments);
    }
    insta::assert_snapshot!(text);
}

#[tokio::test]
async fn a_shadow_that_is_behind_is_refused_and_an_abort_leaves_no_trace() {
    let stack = Stack::new("abort").await;
    let _program = stack.start().await;
    persons(&stack).await;
    // Their end was before the rebuild: neither baselines nor pruned history speak of them.
    let ended = id(500);
    stack.publish("person.deleted", ended, 4, &json!({"id": ended})).await;
    until("they are gone", async || stack.state().await.contains("score.deleted")).await;
    let before = traces(&stack).await;
    let mut text = String::new();
    for arguments in [
        &["rebuild", "status"][..],
        &["rebuild", "swap"],
        &["rebuild", "abort"],
        &["rebuild", "drop"],
        &["held", "list", "--shadow"],
    ] {
        says(&stack, &mut text, arguments);
    }
    start(&stack);
    // A live event of which the shadow misses what was before: it holds it.
    let p = id(100);
    stack.publish("asset.new", p, 4, &item(id(103), p, 1, "20")).await;
    stack.until_version(p, 4).await;
    until("the shadow holds it", async || stack.state().await.contains("4 asset.new gap")).await;
    for arguments in [
        &["rebuild", "start"][..],
        &["held", "list", "--shadow"],
        &["rebuild", "status"],
        &["rebuild", "swap"],
        &["rebuild", "abort"],
        &["rebuild", "abort"],
    ] {
        says(&stack, &mut text, arguments);
    }
    insta::assert_snapshot!(text);
    stack.publish("asset.deleted", p, 5, &item(id(103), p, 1, "20")).await;
    stack.until_version(p, 5).await;
    // But for what live events have done since.
    let since = |line: &&str| !line.contains(&p.to_string());
    let after = traces(&stack).await;
    assert_eq!(
        after.lines().filter(since).collect::<Vec<_>>(),
        before.lines().filter(since).collect::<Vec<_>>()
    );
}

/// Of many aggregates that are not level, some are looked at. One or twenty behind among those that the shadow does not need
/// are counted exactly, whether they were among these or not.
#[tokio::test]
async fn one_behind_is_found_among_many_that_have_ended() {
    let stack = Stack::new("shadow_estimate").await;
    start(&stack);
    let persons = "WITH ended AS (
             INSERT INTO inbox.aggregate (consumer, source, aggregate_type, aggregate_id, version, last_event_id)
             SELECT 'score', 'person', 'person', gen_random_uuid(), 2, gen_random_uuid() FROM generate_series(1, 20000)
             RETURNING aggregate_id)
         INSERT INTO score.person (id, cpf, created_at, version)
         SELECT id::uuid, n, now(), 2 FROM (SELECT aggregate_id, row_number() OVER () FROM ended) e (id, n) WHERE n <= $1";
    sqlx::query(persons).bind(1_i64).execute(&stack.pool).await.unwrap();
    for behind in [1_i64, 20] {
        // Of twenty, about four are among the 4,096 that are looked at first. Of each part by id, one is taken.
        let more = "INSERT INTO score.person (id, cpf, created_at, version)
             SELECT id::uuid, n, now(), 2
             FROM (SELECT id, row_number() OVER () + 1
                   FROM (SELECT DISTINCT ON (hashtext(aggregate_id) & 4095) aggregate_id AS id FROM inbox.aggregate
                         WHERE hashtext(aggregate_id) & 4095
                            <> ALL (SELECT hashtext(id::text) & 4095 FROM score.person)) parts) e (id, n)
             WHERE n <= $1";
        sqlx::query(more).bind(behind).execute(&stack.pool).await.unwrap();
        let (code, said) = stack.owner(&["rebuild", "status"]);
        let excused = 20_000 - behind;
        assert!(
            said.contains(&format!(
                "of 20000 aggregates: 0 level, {excused} ended or of an earlier incarnation, {behind} behind"
            )),
            "{said}"
        );
        assert_eq!(code, 3);
    }
    sqlx::query("DELETE FROM score.person WHERE cpf > 1").execute(&stack.pool).await.unwrap();
    let level =
        "INSERT INTO inbox.aggregate SELECT (jsonb_populate_record(a, '{\"consumer\": \"score-2\"}')).*
                 FROM inbox.aggregate a JOIN score.person p ON p.id::text = a.aggregate_id";
    sqlx::query(level).execute(&stack.pool).await.unwrap();
    let (code, said) = stack.owner(&["rebuild", "status"]);
    assert!(
        said.contains("of 20000 aggregates: 1 level, 19999 ended or of an earlier incarnation, 0 behind"),
        "{said}"
    );
    assert_eq!(code, 0);
    // Half of others: these are too many to look at each.
    sqlx::raw_sql("DELETE FROM inbox.aggregate; DELETE FROM score.person")
        .execute(&stack.pool)
        .await
        .unwrap();
    sqlx::query(persons).bind(10_000_i64).execute(&stack.pool).await.unwrap();
    let (code, said) = stack.owner(&["rebuild", "status", "--json"]);
    let progress = &serde_json::from_str::<Value>(&said).unwrap()["progress"];
    let [level, excused, behind] =
        ["level", "excused", "behind"].map(|name| progress[name].as_i64().unwrap());
    assert_eq!(
        (code, progress["estimated"].as_bool(), level + excused + behind),
        (3, Some(true), 20_000),
        "{said}"
    );
    // Of about 4,000 that are looked at, chance moves half by 0.8 %.
    assert!(excused.abs_diff(10_000) < 2_000 && behind.abs_diff(10_000) < 2_000, "{said}");
}

#[tokio::test]
async fn an_abort_or_a_swap_that_was_killed_is_finished_by_the_next() {
    let stack = Stack::new("killed").await;
    let _program = stack.start().await;
    persons(&stack).await;
    let (mut text, queue) = (String::new(), start(&stack));
    stack.replay(&queue).await;
    until_level(&stack).await;
    // As it stands after each one's first transaction.
    sqlx::raw_sql(
        "DROP SCHEMA score_shadow CASCADE; UPDATE score.model SET role = 'ending' WHERE role = 'shadow'",
    )
    .execute(&stack.pool)
    .await
    .unwrap();
    for arguments in
        [&["rebuild", "status"][..], &["rebuild", "start"], &["rebuild", "abort"], &["rebuild", "status"]]
    {
        says(&stack, &mut text, arguments);
    }
    assert_eq!(stack.queues().await, ["score", "score.dead"]);
    let queue = start(&stack);
    stack.replay(&queue).await;
    until_level(&stack).await;
    assert_eq!(stack.owner(&["rebuild", "swap"]).0, 0);
    sqlx::query("UPDATE score.model SET queue = $1 WHERE role = 'live'")
        .bind(&queue)
        .execute(&stack.pool)
        .await
        .unwrap();
    for arguments in
        [&["rebuild", "status"][..], &["rebuild", "swap"], &["rebuild", "swap"], &["rebuild", "status"]]
    {
        says(&stack, &mut text, arguments);
    }
    insta::assert_snapshot!(text);
}

/// What the live consumer holds and has acknowledged would come to nobody else.
#[tokio::test]
async fn what_waits_moves_to_the_new_consumer() {
    let stack = Stack::new("waits").await;
    let _program = stack.start().await;
    persons(&stack).await;
    let p = id(100);
    stack.publish("asset.new", p, 5, &item(id(105), p, 1, "20")).await;
    until("it is held", async || stack.state().await.contains("5 asset.new gap")).await;
    let queue = start(&stack);
    // All but the one that is held.
    stack.forget_last();
    stack.replay(&queue).await;
    until_level(&stack).await;
    assert_eq!(stack.owner(&["rebuild", "swap"]).0, 0);
    stack.publish("asset.new", p, 4, &item(id(104), p, 1, "20")).await;
    stack.until_version(p, 5).await;
    assert_eq!(stack.owner(&["verify"]).0, 0);
}

/// The models are compared before the live one stands still. What anybody changes after that is looked at again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_changes_after_the_comparison_is_in_the_swap() {
    let stack = Arc::new(Stack::new("after_compared").await);
    let _program = stack.start().await;
    persons(&stack).await;
    let queue = start(&stack);
    stack.replay(&queue).await;
    until_level(&stack).await;
    // The swap has compared everything, and waits for the live model.
    let mut writer = stack.pool.begin().await.unwrap();
    sqlx::query("SELECT FROM score.model WHERE role = 'live' FOR SHARE").execute(&mut *writer).await.unwrap();
    let swap = tokio::task::spawn_blocking({
        let stack = stack.clone();
        move || stack.owner(&["rebuild", "swap"])
    });
    let waits = async || {
        until("it waits for the live model", async || {
            let sql = "SELECT EXISTS (SELECT FROM pg_stat_activity
                                      WHERE datname = current_database() AND application_name = 'score-projector rebuild'
                                        AND wait_event_type = 'Lock' AND query LIKE '%score.model%FOR UPDATE%')";
            sqlx::query_scalar(sql).fetch_one(&stack.pool).await.unwrap()
        })
        .await;
    };
    waits().await;
    for sql in [
        // Of either model, of either table, in each way.
        "UPDATE score.person SET total = 77 WHERE id = '0198c0de-0000-7000-8000-000000000064'",
        "DELETE FROM score.entry WHERE id = '0198c0de-0000-7000-8000-0000000000c9'",
        "UPDATE score_shadow.entry SET value = 1000, score = 50 WHERE id = '0198c0de-0000-7000-8000-00000000012d'",
        "INSERT INTO score.person (id, cpf, created_at, version, total)
             VALUES ('0198c0de-0000-7000-8000-000000000999', 9, now(), 1, 0)",
        "DELETE FROM score_shadow.person WHERE id = '0198c0de-0000-7000-8000-0000000001f4'",
        // And back again: no difference.
        "UPDATE score.person SET total = 5 WHERE id = '0198c0de-0000-7000-8000-000000000190'",
        "UPDATE score.person SET total = 3 WHERE id = '0198c0de-0000-7000-8000-000000000190'",
    ] {
        sqlx::query(sql).execute(&mut *writer).await.unwrap();
    }
    // With the commit it gets the lock, and no look before that has seen any of it.
    waits().await;
    writer.commit().await.unwrap();
    let (code, said) = swap.await.unwrap();
    assert_eq!(code, 0, "{said}");
    let left: Vec<String> = sqlx::query_scalar(
        "SELECT concat(tgrelid::regclass, ' ', tgname) FROM pg_trigger WHERE tgfoid = 'score.note_change()'::regprocedure
         UNION ALL SELECT 'changed ' || id FROM score.changed_person",
    )
    .fetch_all(&stack.pool)
    .await
    .unwrap();
    assert!(left.is_empty(), "left over: {left:?}");
    insta::assert_snapshot!(said);
}

/// A swap that was killed leaves its triggers. They note nothing, since nobody compares, and cost no writer a right.
#[tokio::test]
async fn what_a_killed_swap_leaves_notes_nothing() {
    let stack = Stack::new("left_over").await;
    let _program = stack.start().await;
    persons(&stack).await;
    let mut swap = stack.pool.acquire().await.unwrap().detach();
    let began: bool = sqlx::query_scalar("SELECT score.try_swap()").fetch_one(&mut swap).await.unwrap();
    assert!(began);
    for table in ["score.person", "score.entry", "inbox.aggregate"] {
        sqlx::query("SELECT score.note_changes_of($1::regclass)")
            .bind(table)
            .execute(&mut swap)
            .await
            .unwrap();
    }
    let p = id(100);
    stack.publish("asset.new", p, 4, &item(id(104), p, 1, "20")).await;
    stack.until_version(p, 4).await;
    let noted = async || -> Vec<String> {
        sqlx::query_scalar(
            "SELECT DISTINCT 'person ' || id FROM score.changed_person
             UNION ALL SELECT DISTINCT concat_ws(' ', 'chain', source, aggregate_type, aggregate_id) FROM score.changed_chain",
        )
        .fetch_all(&stack.pool)
        .await
        .unwrap()
    };
    assert_eq!(noted().await, [format!("person {p}"), format!("chain person person {p}")]);
    let (code, said) = stack.owner(&["rebuild", "start"]);
    assert_eq!(code, 0, "{said}");
    let (code, said) = stack.owner(&["rebuild", "swap"]);
    assert!(code == 1 && said.contains("another score-projector rebuild swap is under way"), "{said}");
    sqlx::raw_sql("DELETE FROM score.changed_person; DELETE FROM score.changed_chain")
        .execute(&stack.pool)
        .await
        .unwrap();
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut swap).await.unwrap();
    swap.close().await.unwrap();
    // Its lock lasts as long as the server's process.
    until("the session is gone", async || {
        let gone = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)";
        sqlx::query_scalar(gone).bind(pid).fetch_one(&stack.pool).await.unwrap()
    })
    .await;
    stack.publish("asset.new", p, 5, &item(id(105), p, 1, "20")).await;
    stack.until_version(p, 5).await;
    assert!(noted().await.is_empty());
}

/// Made from the catalog, so that the two cannot differ.
#[tokio::test]
async fn a_shadow_has_the_tables_of_the_live_model() {
    let stack = Stack::new("shape").await;
    let shape = async |schema: &str| -> Vec<String> {
        sqlx::query_scalar("SELECT score.model_shape($1)").bind(schema).fetch_all(&stack.pool).await.unwrap()
    };
    // Whatever a later migration does to them.
    sqlx::raw_sql(
        "ALTER TABLE score.person ADD COLUMN of_tomorrow text NOT NULL DEFAULT 'x' CHECK (of_tomorrow <> '');
         CREATE UNIQUE INDEX tomorrow ON score.entry (lower(type), id) WHERE score > 0;
         ALTER TABLE score.entry ADD CONSTRAINT two UNIQUE (person_id, id)",
    )
    .execute(&stack.pool)
    .await
    .unwrap();
    let live = shape("score").await;
    start(&stack);
    assert_eq!(shape("score_shadow").await, live);
    // PostgreSQL 18 makes a constraint of each NOT NULL, which the line of the column has, too.
    let shown: Vec<String> = live.into_iter().filter(|line| !line.contains("_not_null NOT NULL ")).collect();
    let number = devstack::testing::Roles::of(&stack.admin).name("");
    insta::assert_snapshot!(shown.join("\n").replace(&number, ""));
    // A migration in the middle of a rebuild.
    sqlx::raw_sql("ALTER TABLE score.person ADD COLUMN later text").execute(&stack.pool).await.unwrap();
    let (code, said) = stack.owner(&["rebuild", "swap"]);
    assert_eq!(code, 1);
    insta::assert_snapshot!(said);
    let names: Vec<Uuid> =
        sqlx::query_scalar("SELECT id FROM score_shadow.person").fetch_all(&stack.pool).await.unwrap();
    assert!(names.is_empty());
}
