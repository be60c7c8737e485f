//! Writes and reads find their rows by index, also when the tables are large.

use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::{ADD_DEBT, ADD_INCOME, ADD_PERSON, PERSON};
use crate::republish::baseline::{LOCK, WRITE};

#[tokio::test]
async fn statements_use_indexes_only() {
    let url = devstack::testing::database("person_plan").await;
    let mut conn = PgConnection::connect(&url).await.unwrap();
    crate::schema::migrator().run(&mut conn).await.unwrap();
    outbox::install(&mut conn, "person").await.unwrap();
    sqlx::raw_sql(
        "INSERT INTO person.person (id, cpf, name, date_of_birth)
         SELECT gen_random_uuid(), n, 'n', now() FROM generate_series(1, 20000) n;
         INSERT INTO person.income SELECT gen_random_uuid(), id, 't', 1 FROM person.person;
         INSERT INTO person.asset SELECT gen_random_uuid(), id, 't', 1 FROM person.person;
         INSERT INTO person.debt SELECT gen_random_uuid(), id, 1 FROM person.person;
         ANALYZE;
         SET plan_cache_mode = force_generic_plan",
    )
    .execute(&mut conn)
    .await
    .unwrap();

    let statements = [
        ("add a person", ADD_PERSON, "bigint, text, text, timestamptz", "1, 'n', NULL, now()"),
        ("add an income", ADD_INCOME, "bigint, numeric, text", "1, 2, 't'"),
        ("add a debt", ADD_DEBT, "bigint, numeric", "1, 2"),
        ("read a person", PERSON, "bigint, integer", "1, 1000"),
        ("lock for baselines", LOCK, "uuid, uuid, bigint", "gen_random_uuid(), gen_random_uuid(), 100"),
        ("write baselines", WRITE, "uuid[], integer, integer", "ARRAY[gen_random_uuid()], 1000, 1000"),
    ];
    let mut plans = Vec::new();
    for (i, (name, sql, types, values)) in statements.into_iter().enumerate() {
        sqlx::raw_sql(AssertSqlSafe(format!("PREPARE s{i} ({types}) AS {sql}")))
            .execute(&mut conn)
            .await
            .unwrap();
        let plan: Vec<String> =
            sqlx::query_scalar(AssertSqlSafe(format!("EXPLAIN (COSTS OFF) EXECUTE s{i} ({values})")))
                .fetch_all(&mut conn)
                .await
                .unwrap();
        // How rows of tables are found; the rest of a plan is spelled differently by each version.
        let access: Vec<&str> = plan
            .iter()
            .map(|line| line.trim_start_matches([' ', '-', '>']))
            .filter(|line| {
                ["Index Scan", "Seq Scan", "Bitmap", "Conflict", "Limit", "LockRows"]
                    .iter()
                    .any(|p| line.starts_with(p))
            })
            .collect();
        assert!(!access.iter().any(|line| line.starts_with("Seq Scan")), "{name}: {plan:#?}");
        plans.push(format!("## {name}\n{}\n", access.join("\n")));
    }
    insta::assert_snapshot!(plans.join("\n"));
}
