//! Writes and reads find their rows by index, also when the tables are large.

use events::ItemKind;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, SqlSafeStr};

use super::{erase, idempotency, items::ItemSql, persons};
use crate::republish::baseline::{LOCK, NEXT, READ_AHEAD, WRITE};

/// A connection to a new database with the schemas.
async fn connect(database: &str) -> PgConnection {
    let url = devstack::testing::database(database).await;
    let mut conn = PgConnection::connect(&url).await.unwrap();
    crate::schema::migrator().run(&mut conn).await.unwrap();
    outbox::install(&mut conn, "person").await.unwrap();
    conn
}

#[tokio::test]
async fn the_statements_of_each_kind_fit_its_table() {
    let mut conn = connect("person_items").await;
    for kind in [ItemKind::Income, ItemKind::Asset, ItemKind::Debt] {
        let ItemSql { add, change, delete, list, read } = ItemSql::of(kind);
        for sql in [add, change, delete, list, read] {
            conn.prepare(sql.as_str().into_sql_str()).await.unwrap_or_else(|error| panic!("{error}: {sql}"));
        }
    }
}

#[tokio::test]
async fn statements_use_indexes_only() {
    let mut conn = connect("person_plan").await;
    sqlx::raw_sql(
        "INSERT INTO person.person (id, cpf, name, date_of_birth)
         SELECT gen_random_uuid(), n, 'n', now() FROM generate_series(1, 20000) n;
         INSERT INTO person.income SELECT gen_random_uuid(), id, 't', 1 FROM person.person;
         INSERT INTO person.asset SELECT gen_random_uuid(), id, 't', 1 FROM person.person;
         INSERT INTO person.debt SELECT gen_random_uuid(), id, 1 FROM person.person;
         INSERT INTO person.idempotency SELECT 'c', '/', id, '', id, '', '', '' FROM person.person;
         ANALYZE;
         SET plan_cache_mode = force_generic_plan",
    )
    .execute(&mut conn)
    .await
    .unwrap();

    let [income, debt] = [ItemKind::Income, ItemKind::Debt].map(ItemSql::of);
    let statements = [
        (
            "add a person",
            persons::ADD,
            "bigint, text, text, timestamptz, text, text, text, bytea, text, text, jsonb",
            "1, 'n', NULL, now(), 'c', '/', 'k', '', '', '', NULL",
        ),
        (
            "change a person",
            persons::CHANGE,
            "bigint, uuid[], bigint[], text, boolean, text, timestamptz, text, jsonb",
            "1, NULL, NULL, 'n', false, NULL, NULL, NULL, NULL",
        ),
        ("read a person's state", persons::STATE, "bigint", "1"),
        ("read a person", persons::READ, "bigint, integer", "1, 1000"),
        ("lock to erase", erase::LOCK, "bigint, uuid[], bigint[]", "1, NULL, NULL"),
        ("delete a person", erase::DELETE, "uuid, bigint, jsonb", "gen_random_uuid(), 1000, NULL"),
        ("find persons who were emptied", erase::EMPTIED, "bigint", "16"),
        ("remove rows of an emptied person", erase::REMOVE, "uuid, bigint", "gen_random_uuid(), 1000"),
        (
            "add an income",
            &income.add,
            "bigint, numeric, text, text, text, bytea, text, text, uuid[], bigint[], jsonb, text",
            "1, 2, 'c', '/', 'k', '', '', '', NULL, NULL, NULL, 't'",
        ),
        (
            "add a debt",
            &debt.add,
            "bigint, numeric, text, text, text, bytea, text, text, uuid[], bigint[], jsonb",
            "1, 2, 'c', '/', 'k', '', '', '', NULL, NULL, NULL",
        ),
        (
            "change an income",
            &income.change,
            "bigint, uuid, uuid[], bigint[], numeric, jsonb, text",
            "1, gen_random_uuid(), NULL, NULL, 2, NULL, 't'",
        ),
        (
            "delete a debt",
            &debt.delete,
            "bigint, uuid, uuid[], bigint[], jsonb",
            "1, gen_random_uuid(), NULL, NULL, NULL",
        ),
        ("list incomes", &income.list, "bigint, uuid, integer", "1, gen_random_uuid(), 100"),
        ("read an income", &income.read, "bigint, uuid", "1, gen_random_uuid()"),
        ("find a stored response", idempotency::FIND, "text, text, text, bytea", "'c', '/', 'k', ''"),
        ("remove old stored responses", idempotency::REMOVE, "interval, bigint", "'24 hours', 1000"),
        ("lock for baselines", LOCK, "uuid, uuid, bigint", "gen_random_uuid(), gen_random_uuid(), 100"),
        (
            "find the next for baselines",
            NEXT,
            "uuid, uuid, bigint",
            "gen_random_uuid(), gen_random_uuid(), 100",
        ),
        ("read ahead for baselines", READ_AHEAD, "uuid[]", "ARRAY[gen_random_uuid()]"),
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
                ["Index Scan", "Tid Scan", "Seq Scan", "Bitmap", "Conflict", "Limit", "LockRows"]
                    .iter()
                    .any(|p| line.starts_with(p))
            })
            .collect();
        assert!(!access.iter().any(|line| line.starts_with("Seq Scan")), "{name}: {plan:#?}");
        plans.push(format!("## {name}\n{}\n", access.join("\n")));
    }
    insta::assert_snapshot!(plans.join("\n"));
}
