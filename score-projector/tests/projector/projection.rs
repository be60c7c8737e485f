//! What the events of persons become.

use std::collections::BTreeSet;

use serde_json::json;
use sqlx::postgres::PgListener;
use uuid::Uuid;

use events::ItemKind;

use crate::stack::{DEADLINE, Stack, command, id, item, person, said, until};

#[tokio::test]
async fn the_samples_give_4970() {
    let stack = Stack::new("samples").await;
    let mut program = stack.start().await;
    let p = id(1);
    stack.publish("person.new", p, 1, &person(p, 11111)).await;
    stack.publish("income.new", p, 2, &item(id(2), p, 11111, "1000")).await;
    stack.publish("asset.new", p, 3, &item(id(3), p, 11111, "100000")).await;
    stack.publish("debt.new", p, 4, &item(id(4), p, 11111, "1000")).await;
    // 15 digits and 4 decimals arrive to the last of them.
    stack.publish("asset.new", p, 5, &item(id(5), p, 11111, "999999999999999.9999")).await;
    stack.until_version(p, 5).await;
    insta::assert_snapshot!(stack.state().await);
    let digest = |arguments: &str| {
        let arguments: Vec<&str> = arguments.split_whitespace().collect();
        let said = said(command(&arguments, &stack.database));
        format!("## {}\n{said}", arguments.join(" "))
    };
    insta::assert_snapshot!(
        "digest",
        ["digest", "digest --json --buckets 2", "digest --shadow"].map(digest).join("\n")
    );
    let ids: Vec<Uuid> =
        sqlx::query_scalar("SELECT id FROM outbox.event").fetch_all(&stack.pool).await.unwrap();
    assert!(ids.iter().all(|id| id.get_version_num() == 7));
    // SIGTERM ends it in order.
    let signalled = std::process::Command::new("kill").arg(program.0.id().to_string()).status().unwrap();
    assert!(signalled.success());
    assert!(program.0.wait().unwrap().success());
}

#[tokio::test]
async fn every_event_of_a_person() {
    let stack = Stack::new("lifecycle").await;
    let _program = stack.start().await;
    let p = id(1);
    let baseline = |n: u128, cpf: i64, income: &str| {
        let mut body = person(id(n), cpf);
        let entry = |n, value: &str| {
            let value: serde_json::Value = serde_json::from_str(value).unwrap();
            json!({"id": id(n), "value": value, "created_at": "2026-01-01T00:00:01+00:00"})
        };
        body["incomes"] = json!([entry(n + 1, income)]);
        body["assets"] = json!([entry(n + 4, "60")]);
        body["debts"] = json!([]);
        body
    };
    stack.publish("person.new", p, 1, &person(p, 11111)).await;
    stack.publish("income.new", p, 2, &item(id(2), p, 11111, "1000")).await;
    stack.publish("debt.new", p, 3, &item(id(3), p, 11111, "1000")).await;
    stack.publish("income.changed", p, 4, &item(id(2), p, 11111, "500.5")).await;
    // The same value: nothing differs, nothing is published.
    stack.publish("income.changed", p, 5, &item(id(2), p, 11111, "500.5")).await;
    stack.publish("debt.deleted", p, 6, &item(id(3), p, 11111, "1000")).await;
    stack.publish("person.changed", p, 7, &person(p, 11111)).await;
    stack.publish("person.married", p, 8, &json!({"what": "a type of tomorrow"})).await;
    stack.publish("asset.new", p, 9, &json!({"id": id(4), "erased": true})).await;
    stack.until_version(p, 9).await;
    insta::assert_snapshot!("changes", stack.state().await);

    // Only what differs is published: the asset is new, the income is as it was.
    stack.publish("person.baseline", p, 20, &baseline(1, 11111, "500.5")).await;
    stack.until_version(p, 20).await;
    // A late subscriber begins with a baseline, and so does this one for somebody new.
    stack.publish("person.baseline", id(100), 7, &baseline(100, 22222, "50")).await;
    stack.until_version(id(100), 7).await;
    // Another cpf is in the body of every entry.
    stack.publish("person.changed", p, 21, &person(p, 33333)).await;
    stack.until_version(p, 21).await;
    insta::assert_snapshot!("baselines", stack.state().await);

    stack.publish("person.deleted", p, 22, &json!({"id": p})).await;
    // A late event does not revive them, and the same cpf is a new life.
    stack.publish("income.new", p, 23, &item(id(9), p, 33333, "50")).await;
    stack.publish("person.new", id(200), 1, &person(id(200), 33333)).await;
    stack.until_version(id(200), 1).await;
    until("the late event is held", async || stack.state().await.contains("does not know this person")).await;
    insta::assert_snapshot!("deleted", stack.state().await);
}

#[tokio::test]
async fn a_person_who_is_deleted_leaves_no_trace() {
    let stack = Stack::new("erasure").await;
    let _program = stack.start().await;
    let (p, cpf) = (id(1), 98_765_432_100);
    let traces = async || devstack::testing::tables_with(&stack.admin, &cpf.to_string()).await;
    stack.publish("person.new", p, 1, &person(p, cpf)).await;
    stack.publish("income.new", p, 2, &item(id(2), p, cpf, "1000")).await;
    stack.publish("income.changed", p, 3, &item(id(2), p, cpf, "2000")).await;
    stack.until_version(p, 3).await;
    // As after a rebuild that was swapped: a live model and the one of before.
    sqlx::raw_sql(
        "SELECT score.create_shadow();
         INSERT INTO score_shadow.person TABLE score.person;
         INSERT INTO score_shadow.entry TABLE score.entry;
         SELECT score.exchange_tables()",
    )
    .execute(&stack.pool)
    .await
    .unwrap();
    stack.publish("income.new", p, 5, &item(id(3), p, cpf, "1000")).await;
    stack.publish_to_queue("score", &item(id(4), p, cpf, "1000").to_string()).await;
    until("one is held and one rejected", async || {
        let traces = traces().await;
        ["inbox.held", "inbox.rejected"].iter().all(|table| traces.iter().any(|t| t == table))
    })
    .await;
    insta::assert_compact_debug_snapshot!(traces().await, @r#"["inbox.held", "inbox.rejected", "outbox.event_1", "score.person", "score_old.person"]"#);

    stack.publish("person.deleted", p, 6, &json!({"id": p})).await;
    until("the person is gone", async || !stack.state().await.contains("total")).await;
    assert_eq!(traces().await, [""; 0]);
    insta::assert_snapshot!("erased", stack.state().await);
}

#[tokio::test]
async fn what_is_wrong_is_held_with_its_reason() {
    let stack = Stack::new("wrong").await;
    let _program = stack.start().await;
    let (p, q) = (id(1), id(2));
    let first = |n: u128| id(1_000 + n);
    stack.publish("person.new", first(0), 1, &json!({"id": first(0), "cpf": "Maria's"})).await;
    stack.publish("income.new", first(1), 1, &item(id(5), first(1), 1, "1")).await;
    stack.publish("person.new", first(2), 1, &person(p, 1)).await;
    for (n, value) in [(3, "-1"), (4, "0.00001"), (5, "1000000000000000"), (6, "1e40")] {
        stack.publish("person.new", first(n), 1, &person(first(n), 1)).await;
        stack.publish("asset.new", first(n), 2, &item(id(5), first(n), 1, value)).await;
    }
    stack.publish("person.new", p, 1, &person(p, 1)).await;
    stack.publish("asset.new", p, 2, &item(id(5), p, 1, "20")).await;
    stack.publish("debt.changed", p, 3, &item(id(5), p, 1, "20")).await;
    // Another person's item.
    stack.publish("person.new", q, 1, &person(q, 2)).await;
    stack.publish("asset.new", q, 2, &item(id(5), q, 2, "20")).await;
    // Nobody else waits.
    stack.publish("person.new", id(7), 1, &person(id(7), 3)).await;
    stack.until_version(id(7), 1).await;
    let state = stack.state().await;
    insta::assert_snapshot!(state);
    assert!(!state.contains("Maria"));
}

#[tokio::test]
async fn sigkill_loses_and_doubles_nothing() {
    let stack = Stack::new("sigkill").await;
    // Its queue is there and everything waits in it.
    drop(stack.start().await);
    let (persons, items) = (6, 120);
    for version in 1..=items + 1 {
        for n in 0..persons {
            let p = id(1_000 * n);
            if version == 1 {
                stack.publish("person.new", p, 1, &person(p, 1)).await;
            } else {
                let v = u128::try_from(version).unwrap();
                stack.publish("asset.new", p, version, &item(id(1_000 * n + v), p, 1, "20")).await;
            }
        }
    }
    let expected = items * i64::try_from(persons).unwrap();
    let published = async || -> i64 {
        sqlx::query_scalar("SELECT count(*) FROM outbox.event").fetch_one(&stack.pool).await.unwrap()
    };
    for _ in 0..4 {
        let before = published().await;
        let program = stack.start_slow().await;
        // In the middle of the batches that follow the first one.
        until("it has begun", async || published().await > before).await;
        drop(program);
    }
    assert!(published().await < expected, "every kill came in the middle");
    let _program = stack.start().await;
    for n in 0..persons {
        stack.until_version(id(1_000 * n), items + 1).await;
    }
    let (totals, versions): (i64, i64) = sqlx::query_as(
        "SELECT sum(total)::bigint, (SELECT sum(version)::bigint FROM outbox.aggregate) FROM score.person",
    )
    .fetch_one(&stack.pool)
    .await
    .unwrap();
    assert_eq!((totals, versions, published().await), (expected, expected, expected));
    let held: i64 =
        sqlx::query_scalar("SELECT count(*) FROM inbox.held").fetch_one(&stack.pool).await.unwrap();
    assert_eq!(held, 0);
}

#[tokio::test]
async fn the_relay_and_the_readers_are_told_of_what_is_committed() {
    let stack = Stack::new("told").await;
    let mut listener = PgListener::connect_with(&stack.pool).await.unwrap();
    // By their names on the wire: each is what another program listens to.
    listener.listen_all(["outbox_event", "score_model"]).await.unwrap();
    let _program = stack.start().await;
    stack.publish("person.new", id(1), 1, &person(id(1), 11111)).await;
    let mut told = BTreeSet::new();
    let both = async {
        while told.len() < 2 {
            let notice = listener.recv().await.unwrap();
            assert_eq!(notice.payload(), "");
            told.insert(notice.channel().to_owned());
        }
    };
    tokio::time::timeout(DEADLINE, both).await.expect("both are told");
}

/// `verify` has the database sum up, and looks at what differs itself.
#[tokio::test]
async fn the_database_computes_the_score_of_an_item_as_the_projector_does() {
    let stack = Stack::new("of_item").await;
    let values = [
        "0",
        "-0",
        "19.9999",
        "20",
        "39.9999",
        "49.9999",
        "50",
        "1.50000000",
        "123456789.4321",
        "999999999999999.9999",
        "1000000000000000",
        "0.00001",
        "-1",
    ];
    for (name, kind) in [("income", ItemKind::Income), ("asset", ItemKind::Asset), ("debt", ItemKind::Debt)] {
        for value in values {
            let score: Option<i64> =
                sqlx::query_scalar("SELECT score.of_item($1, $2::text::numeric)::bigint")
                    .bind(name)
                    .bind(value)
                    .fetch_one(&stack.pool)
                    .await
                    .unwrap();
            assert_eq!(score, score_projector::score::of(kind, value.parse().unwrap()), "{name} {value}");
        }
    }
}
