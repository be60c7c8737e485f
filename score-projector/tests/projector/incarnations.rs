//! The person service was restored from a backup, and its outbox has begun a new incarnation.

use serde_json::{Value, json};

use crate::{
    rebuild::{start, until_level},
    stack::{Stack, id, item, person, until},
};

const NEW: i64 = 1_764_426_123_456;

fn baseline(n: u128, cpf: i64, assets: &[(u128, i64)]) -> Value {
    let mut body = person(id(n), cpf);
    let asset = |(n, value): &(u128, i64)| json!({"id": id(*n), "value": value, "created_at": "2026-01-01T00:00:01+00:00"});
    body["assets"] = assets.iter().map(asset).collect();
    body["incomes"] = json!([]);
    body["debts"] = json!([]);
    body
}

async fn events(stack: &Stack) -> Vec<String> {
    sqlx::query_scalar(
        "SELECT concat_ws(' ', type, right(aggregate_id, 3), version, payload->>'score', payload->>'total')
         FROM outbox.event ORDER BY position",
    )
    .fetch_all(&stack.pool)
    .await
    .unwrap()
}

/// Persons 100 to 300 with an asset each. The backup was made before the asset of 100 and before 200 and 300.
async fn lost(stack: &Stack) {
    for n in [100, 200, 300] {
        let p = id(n);
        stack.publish("person.new", p, 1, &person(p, 11_000 + i64::try_from(n).unwrap())).await;
        stack.publish("asset.new", p, 2, &item(id(n + 1), p, 1, "1000")).await;
        stack.until_version(p, 2).await;
    }
}

#[tokio::test]
async fn a_state_of_the_lost_time_ends_when_its_chain_begins_anew() {
    let stack = Stack::new("incarnation").await;
    let _program = stack.start().await;
    lost(&stack).await;
    let others = 1_000..1_025;
    let other = |n: u128| person(id(n), 20_000 + i64::try_from(n).unwrap());
    for n in others.clone() {
        stack.publish("person.new", id(n), 1, &other(n)).await;
    }
    // What the restored outbox had not published yet comes as the new incarnation's: more of it in a row than the
    // handler may refuse. And the old primary goes on.
    for n in others.clone() {
        stack.publish_in(NEW, &[], ("person.new", id(n), 1, other(n))).await;
        stack.publish("person.changed", id(n), 2, &other(n)).await;
    }
    for n in others {
        let body = baseline(n, 20_000 + i64::try_from(n).unwrap(), &[]);
        stack.publish_in(NEW, &[], ("person.baseline", id(n), 2, body)).await;
    }
    // A key that recurs, and the complete state of another person.
    stack.publish_in(NEW, &["chain_start"], ("person.new", id(200), 1, person(id(200), 11_200))).await;
    stack.publish_in(NEW, &[], ("asset.new", id(200), 2, item(id(205), id(200), 1, "40"))).await;
    stack.publish_in(NEW, &[], ("person.baseline", id(100), 2, baseline(100, 11_100, &[(105, 60)]))).await;
    until("both have begun", async || {
        let totals: Vec<String> =
            sqlx::query_scalar("SELECT total::text FROM score.person WHERE total <> 0 ORDER BY id")
                .fetch_all(&stack.pool)
                .await
                .unwrap();
        totals == ["3", "2", "50"]
    })
    .await;
    let left: Vec<String> = sqlx::query_scalar("SELECT aggregate_id FROM inbox.left_behind")
        .fetch_all(&stack.pool)
        .await
        .unwrap();
    assert_eq!(left, [id(300).to_string()]);
    // The source does not have this person.
    stack.publish_in(NEW, &[], ("person.deleted", id(300), 1, json!({"id": id(300)}))).await;
    until("the person is gone", async || events(&stack).await.iter().any(|e| e.starts_with("score.deleted")))
        .await;
    insta::assert_snapshot!(events(&stack).await.join("\n"));
    let rejected: Vec<(String, i64)> =
        sqlx::query_as("SELECT reason, sum(times)::bigint FROM inbox.rejected GROUP BY 1 ORDER BY 1")
            .fetch_all(&stack.pool)
            .await
            .unwrap();
    assert_eq!(rejected, [("superseded".to_owned(), 25)], "an old primary's");
    let held: i64 =
        sqlx::query_scalar("SELECT count(*) FROM inbox.held").fetch_one(&stack.pool).await.unwrap();
    assert_eq!(held, 0);
    assert_eq!(stack.owner(&["verify"]).0, 0);
}

/// Also of those that the source has lost, and that nothing has ended yet.
#[tokio::test]
async fn a_rebuild_needs_nothing_of_an_earlier_incarnation() {
    let stack = Stack::new("incarnation_rebuild").await;
    let _program = stack.start().await;
    lost(&stack).await;
    stack.forget_all();
    stack.publish_in(NEW, &[], ("person.baseline", id(100), 1, baseline(100, 11_100, &[]))).await;
    stack.until_version(id(100), 1).await;
    let queue = start(&stack);
    stack.replay(&queue).await;
    until_level(&stack).await;
    let (code, said) = stack.owner(&["rebuild", "swap"]);
    assert_eq!(code, 0, "{said}");
    let persons: i64 =
        sqlx::query_scalar("SELECT count(*) FROM score.person").fetch_one(&stack.pool).await.unwrap();
    assert_eq!(persons, 1);
    let sources: Vec<String> = sqlx::query_scalar(
        "SELECT concat_ws(' ', consumer, name, incarnation, earlier) FROM inbox.source ORDER BY 1",
    )
    .fetch_all(&stack.pool)
    .await
    .unwrap();
    assert_eq!(sources, [format!("score person {NEW} {{1}}"), format!("score-2 person {NEW} {{1}}")]);
    // The new model has no state of them, so nothing is left behind; and an old primary still changes nothing.
    let left: Vec<String> =
        sqlx::query_scalar("SELECT aggregate_id FROM inbox.left_behind WHERE consumer = 'score-2'")
            .fetch_all(&stack.pool)
            .await
            .unwrap();
    assert_eq!(left, [""; 0]);
    stack.publish("asset.new", id(200), 3, &item(id(209), id(200), 1, "40")).await;
    until("it is refused", async || {
        let refused =
            "SELECT count(*) FROM inbox.rejected WHERE reason = 'superseded' AND consumer = 'score-2'";
        sqlx::query_scalar::<_, i64>(refused).fetch_one(&stack.pool).await.unwrap() == 1
    })
    .await;
    insta::assert_snapshot!(events(&stack).await.join("\n"));
}
