//! Many writers at once: versions without holes, in the order of their positions.

use std::{collections::BTreeMap, sync::Arc};

use crate::support::{Database, post};

const PERSONS: i64 = 5;
const WRITERS: i64 = 16;
const WRITES: i64 = 25;

#[tokio::test(flavor = "multi_thread")]
async fn versions_have_no_holes_and_rise_with_the_positions() {
    let database = Database::new().await;
    let app = Arc::new(database.app());
    for cpf in 1..=PERSONS {
        app.create("/person", &format!(r#"{{"cpf": {cpf}, "name": "n", "date_of_birth": "2000-01-01"}}"#))
            .await;
    }
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let app = Arc::clone(&app);
        writers.spawn(async move {
            for n in 0..WRITES {
                // Most of them on one person, so that they wait for each other.
                let cpf = if (writer + n) % 2 == 0 { 1 } else { n % PERSONS + 1 };
                let (kind, body) = match n % 3 {
                    0 => ("income", r#"{"type": "t", "value": 1}"#),
                    1 => ("asset", r#"{"type": "t", "value": 1}"#),
                    _ => ("debt", r#"{"value": 1}"#),
                };
                app.create(&format!("/person/{cpf}/{kind}"), body).await;
                // Some that fail in between.
                let missing = app.call(post("/person/99/debt", r#"{"value": 1}"#)).await;
                assert_eq!(missing.status().as_u16(), 404);
            }
        });
    }
    while let Some(done) = writers.join_next().await {
        done.unwrap();
    }

    let events: Vec<(String, i64)> =
        sqlx::query_as("SELECT aggregate_id, version FROM outbox.event ORDER BY position")
            .fetch_all(&database.admin)
            .await
            .unwrap();
    let mut last: BTreeMap<String, i64> = BTreeMap::new();
    for (person, version) in events {
        let last = last.entry(person).or_default();
        assert_eq!(version, *last + 1, "versions follow the positions one by one");
        *last = version;
    }
    let stored: Vec<(String, i64)> = sqlx::query_as("SELECT id::text, version FROM person.person ORDER BY 1")
        .fetch_all(&database.admin)
        .await
        .unwrap();
    assert_eq!(last.into_iter().collect::<Vec<_>>(), stored);
    assert_eq!(stored.iter().map(|(_, version)| version).sum::<i64>(), PERSONS + WRITERS * WRITES);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_that_create_one_person_one_wins() {
    let database = Database::new().await;
    let app = Arc::new(database.app());
    let mut writers = tokio::task::JoinSet::new();
    for _ in 0..WRITERS {
        let app = Arc::clone(&app);
        let body = r#"{"cpf": 7, "name": "n", "date_of_birth": "2000-01-01"}"#;
        writers.spawn(async move { app.call(post("/person", body)).await.status().as_u16() });
    }
    let mut answers = writers.join_all().await;
    answers.sort_unstable();
    let others = usize::try_from(WRITERS).unwrap() - 1;
    assert_eq!(answers, [vec![201], vec![409; others]].concat());
    assert_eq!(database.rows().await.lines().count(), 2, "one person and one event");
}
