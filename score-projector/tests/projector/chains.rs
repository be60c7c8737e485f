//! The versions of scores: an installation that counted them itself goes on with them in the outbox.

use sqlx::AssertSqlSafe;

use crate::stack::{Stack, id, item, person};

impl Stack {
    async fn chains(&self) -> Vec<String> {
        let chains =
            "SELECT concat_ws(' ', aggregate_id, version, state) FROM outbox.aggregate ORDER BY aggregate_id";
        sqlx::query_scalar(chains).fetch_all(&self.pool).await.unwrap()
    }
}

#[tokio::test]
async fn an_installation_of_before_goes_on_with_its_versions() {
    let stack = Stack::new("chains").await;
    let program = stack.start().await;
    let (kept, retired, gone) = (id(1), id(11), id(21));
    for (p, income) in [(kept, id(2)), (retired, id(12))] {
        stack.publish("person.new", p, 1, &person(p, 11111)).await;
        stack.publish("income.new", p, 2, &item(income, p, 11111, "1000")).await;
        stack.until_version(p, 2).await;
    }
    drop(program);
    // As an earlier release left it: it counted in a table of its own, its writers gave the versions, and the events of
    // some scores are no longer stored.
    let before = format!(
        "INSERT INTO score.chain VALUES ('{kept}', 1), ('{retired}', 8), ('{gone}', 5);
         DELETE FROM outbox.event WHERE aggregate_id = '{retired}';
         DELETE FROM outbox.aggregate WHERE aggregate_id = '{retired}';
         UPDATE outbox.source SET adopts_chains = true;
         SELECT outbox.number_by('score', 'writer')"
    );
    sqlx::raw_sql(AssertSqlSafe(before)).execute(&stack.pool).await.unwrap();

    // The owner of the schema may be another one than the outbox's.
    let of_another = "DO $$ BEGIN CREATE ROLE score_owner_test; EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$;
        GRANT USAGE ON SCHEMA outbox TO score_owner_test; GRANT SELECT ON outbox.aggregate_type TO score_owner_test;
        ALTER FUNCTION score.hand_over_chains() OWNER TO score_owner_test";
    sqlx::raw_sql(of_another).execute(&stack.pool).await.unwrap();
    let (code, told) = stack.owner(&["republish", "--all"]);
    insta::assert_snapshot!(format!("{code}: {told}"), @"1: score-projector: the owner of the schema score may not hand its versions over to the outbox. As the owner of the schema outbox, who may read score.handed_over: SELECT outbox.number_by('score', 'outbox', 'TABLE score.handed_over').");
    sqlx::raw_sql("ALTER FUNCTION score.hand_over_chains() OWNER TO CURRENT_USER")
        .execute(&stack.pool)
        .await
        .unwrap();

    let _program = stack.start().await;
    for (p, asset) in [(kept, id(3)), (retired, id(13))] {
        stack.publish("asset.new", p, 3, &item(asset, p, 11111, "1000")).await;
        stack.until_version(p, 3).await;
    }
    let expected = [format!("{kept} 2 live"), format!("{retired} 9 live"), format!("{gone} 5 ended")];
    assert_eq!(stack.chains().await, expected);
    let (code, told) = stack.owner(&["republish", "--all"]);
    assert_eq!((code, told.trim()), (0, "the scores of 2 persons republished"));
    let expected = [format!("{kept} 3 live"), format!("{retired} 10 live"), format!("{gone} 5 ended")];
    assert_eq!(stack.chains().await, expected);
    // What was counted before stays as it was, and nobody counts there.
    assert_eq!(stack.count("SELECT sum(version)::bigint FROM score.chain").await, 14);
}
