//! A person with a long history, in either database, is forgotten like any other: the score is gone at once, nobody else
//! waits, and in the end nothing is left.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

mod support;

use devstack::testing::{eventually, tables_with};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use support::{Apis, stack};
use tokio_util::sync::CancellationToken;

const CPF: u64 = 52_998_224_725;
/// More than is erased in one transaction, and small enough for a test.
const EVENTS: i64 = 30_000;

async fn execute(url: &str, sql: String) {
    let mut conn = PgConnection::connect(url).await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut conn).await.unwrap();
}

async fn one(url: &str, sql: &'static str) -> i64 {
    let mut conn = PgConnection::connect(url).await.unwrap();
    sqlx::query_scalar(sql).fetch_one(&mut conn).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_a_long_history_is_forgotten_and_nobody_waits_for_it() {
    let mut stack = stack().await;
    let addresses = stack.addresses();
    let apis = Apis::of(&addresses);
    let body = |cpf: u64, name: &str| {
        format!(r#"{{"cpf": {cpf}, "name": "{name}", "date_of_birth": "1899-07-08"}}"#)
    };
    for (cpf, name) in [(CPF, "Brunhilde"), (22_222, "another")] {
        let created = apis.send("POST", "/person", name, body(cpf, name)).await;
        assert_eq!(created.status, 201, "{}", created.shown());
        let path = format!("/person/{cpf}/debt");
        apis.send("POST", &path, name, r#"{"value": 1000}"#.into()).await;
    }
    for cpf in [CPF, 22_222] {
        apis.until_score(cpf, -50).await;
    }
    // A long past, which was published long ago.
    let history = |aggregate_type: &str, chain: &str, raise: &str| {
        format!(
            "WITH person AS ({chain})
             INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
             SELECT '{aggregate_type}', id, version + n, '{aggregate_type}.changed',
                    json_build_object('id', id, 'cpf', {CPF}, 'name', 'Brunhilde')
             FROM person, generate_series(1, {EVENTS}) n ORDER BY n;
             {raise}"
        )
    };
    let person = format!("SELECT id::text AS id, version FROM person.person WHERE cpf = {CPF}");
    let raise = format!("UPDATE person.person SET version = version + {EVENTS} WHERE cpf = {CPF}");
    let published = "UPDATE outbox.relay SET (low_water, high, open) = (SELECT last_value, last_value, '{}'::int8multirange FROM outbox.position)";
    let hurry = CancellationToken::new();
    assert!(stack.person_relay.stop(&hurry).await && stack.score_relay.stop(&hurry).await);
    execute(&addresses.person_database_url, history("person", &person, &raise) + ";" + published).await;
    let score_person = format!("(SELECT id FROM score.person WHERE cpf = {CPF})");
    // The outbox counts these versions.
    let history = format!(
        "SELECT count(outbox.publish('score.changed', 'score', id::text,
                                     json_build_object('id', id, 'cpf', {CPF}, 'name', 'Brunhilde')))
         FROM (SELECT {score_person} AS id) person, generate_series(1, {EVENTS})"
    );
    execute(&addresses.score_database_url, history + ";" + published).await;
    stack.person_relay.start().await.unwrap();
    stack.score_relay.start().await.unwrap();

    let deleted = apis.send("DELETE", &format!("/person/{CPF}"), "unused", String::new()).await;
    assert_eq!(deleted.status, 200, "{}", deleted.shown());
    let written = apis.send("POST", "/person/22222/debt", "more", r#"{"value": 1000}"#.into()).await;
    assert_eq!(written.status, 201, "{}", written.shown());
    apis.until_score(22_222, -100).await;
    eventually("the deleted person's score is gone", async || {
        let answer = apis.score(CPF).await;
        if answer.status == 404 { Ok(()) } else { Err(answer.shown()) }
    })
    .await;
    for url in [&addresses.person_database_url, &addresses.score_database_url] {
        eventually("the relays have erased everything", async || {
            match one(url, "SELECT count(*) FROM outbox.erasure").await {
                0 => Ok(()),
                left => Err(format!("{left} are left")),
            }
        })
        .await;
        for personal in ["Brunhilde", "52998224725"] {
            assert_eq!(tables_with(url, personal).await, Vec::<String>::new(), "{personal}");
        }
    }
    assert_eq!(one(&addresses.score_database_url, "SELECT count(*) FROM inbox.held").await, 0);
}
