//! Who is deleted is erased: nothing personal is left in the database, the logs or the metrics.

use std::sync::Arc;

use poem::http::Method;

use crate::support::{Database, Program, Redactions, plain, post, raw_request, with};

/// What must not be found anywhere afterwards.
const CPF: &str = "52998224725";
const PERSONAL: [&str; 5] = [CPF, "Brunhilde", "Rheingold", "1899-07", "Nibelungenhort"];
const PERSON: &str =
    r#"{"cpf": 52998224725, "name": "Brunhilde", "address": "Rheingold 7", "date_of_birth": "1899-07-08"}"#;
const ASSET: &str = r#"{"type": "Nibelungenhort", "value": 1}"#;

/// Where something personal stands in the database.
async fn stands(database: &Database) -> Vec<String> {
    let mut found = Vec::new();
    for text in PERSONAL {
        for table in devstack::testing::tables_with(&database.admin_url, text).await {
            found.push(format!("{table}: {text}"));
        }
    }
    found
}

#[tokio::test]
async fn nothing_is_left_in_the_database() {
    let database = Database::new().await;
    let app = database.app();
    app.call(with(post("/person", PERSON), "idempotency-key", "k")).await;
    let path = format!("/person/{CPF}");
    app.call(with(post(&format!("{path}/asset"), ASSET), "idempotency-key", "k")).await;
    app.call(raw_request(Method::PATCH, &path, Some("application/json"), r#"{"name": "Brunhilde II"}"#))
        .await;
    // One event is set aside by a relay, and another has its trace.
    sqlx::raw_sql(
        "INSERT INTO outbox.relay (name) VALUES ('default');
         INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, payload,
                                    headers, created_at, reason, detail)
         SELECT 'default', position, id, aggregate_type, aggregate_id, version, type, payload, headers, created_at,
                'unroutable', 'no queue' FROM outbox.event WHERE version = 2;
         UPDATE outbox.event SET headers = '{\"traceparent\": \"00-1-2-03\", \"note\": \"Brunhilde\"}' WHERE version = 1",
    )
    .execute(&database.admin)
    .await
    .unwrap();
    app.create("/person", &PERSON.replace(CPF, "22222").replace("Brunhilde", "another")).await;
    assert!(stands(&database).await.len() >= 15, "there is something to erase");

    app.call(plain(Method::DELETE, &path)).await;
    let shown = Redactions::default().apply(&database.rows().await);
    let others = [
        "person.person: Rheingold",
        "outbox.event_1: Rheingold",
        "person.person: 1899-07",
        "outbox.event_1: 1899-07",
    ];
    let left: Vec<String> =
        stands(&database).await.into_iter().filter(|found| !others.contains(&found.as_str())).collect();
    assert!(left.is_empty(), "{left:#?}");
    insta::assert_snapshot!(shown);
}

/// Whoever writes while a person is deleted has written before, and is erased too; or finds nobody.
#[tokio::test(flavor = "multi_thread")]
async fn writers_that_race_with_the_deletion_leave_nothing() {
    let database = Database::new().await;
    let app = Arc::new(database.app());
    let path = format!("/person/{CPF}");
    let mut written = 0;
    for round in 0..10 {
        app.call(with(post("/person", PERSON), "idempotency-key", &format!("k{round}"))).await;
        let mut writers = tokio::task::JoinSet::new();
        for writer in 0..24 {
            if writer == 12 {
                let (app, path) = (Arc::clone(&app), path.clone());
                writers.spawn(async move {
                    let status = app.call(plain(Method::DELETE, &path)).await.status().as_u16();
                    assert_eq!(status, 200);
                    2
                });
            }
            let (app, path) = (Arc::clone(&app), path.clone());
            writers.spawn(async move {
                let key = format!("{round}-{writer}");
                let request = match writer % 3 {
                    0 => with(post(&format!("{path}/asset"), ASSET), "idempotency-key", &key),
                    1 => post(&format!("{path}/debt"), r#"{"value": 1}"#),
                    _ => {
                        let name = format!(r#"{{"name": "Brunhilde {writer}"}}"#);
                        raw_request(Method::PATCH, &path, Some("application/json"), name)
                    }
                };
                let status = app.call(request).await.status().as_u16();
                assert!([200, 201, 404].contains(&status), "{status}");
                i64::from(status != 404)
            });
        }
        written += writers.join_all().await.iter().sum::<i64>();
        assert_eq!(stands(&database).await, Vec::<String>::new(), "round {round}");
    }
    // Nothing is missing: every life has its versions without holes, and ends with its deletion.
    let chains: Vec<(i64, i64, bool)> = sqlx::query_as(
        "SELECT count(*), max(version), (array_agg(type ORDER BY version DESC))[1] = 'person.deleted'
         FROM outbox.event GROUP BY aggregate_id",
    )
    .fetch_all(&database.admin)
    .await
    .unwrap();
    assert_eq!(chains.len(), 10);
    assert!(chains.iter().all(|(count, last, ended)| count == last && *ended), "{chains:?}");
    assert_eq!(chains.iter().map(|(count, ..)| count).sum::<i64>(), written);
}

#[tokio::test]
async fn nothing_is_in_the_log_or_the_metrics() {
    let database = Database::new().await;
    let program = Program::start(&database.url(None)).await;
    crate::support::until("it is ready", async || program.get("/ready").await.contains("\"ready\":true"))
        .await;
    let path = format!("/person/{CPF}");
    program.post("/person", PERSON).await;
    program.post("/person", PERSON).await;
    program.post(&format!("{path}/asset"), ASSET).await;
    program.post(&format!("{path}/asset"), r#"{"type": "Nibelungenhort", "value": -1}"#).await;
    program.get(&path).await;
    program.get(&format!("{path}/asset?limit=1&after=Brunhilde")).await;
    let deleted = program
        .send(&format!("DELETE {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"))
        .await;
    assert!(crate::support::answer(deleted).await.contains("\"deleted\""));
    program.post(&format!("{path}/asset"), ASSET).await;
    let metrics = program.get("/metrics").await;
    program.terminate();
    let (_, log) = program.ended().await;
    assert!(metrics.contains("/person/:cpf/asset"), "{metrics}");
    for text in PERSONAL {
        assert!(!metrics.contains(text), "the metrics have {text}");
        assert!(!log.contains(text), "the log has {text}: {log}");
    }
}
