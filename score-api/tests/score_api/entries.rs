//! How a score came about.

use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::{
    answers::join,
    support::{Database, Program, id},
};

/// The samples, in another order than they came in: id, type, value, score.
const SAMPLES: [(u32, &str, &str, i64); 3] =
    [(3, "debt", "1000", -50), (1, "income", "1000", 20), (2, "asset", "100000", 5000)];

async fn add(database: &mut Database, life: u32, (item, type_, value, score): (u32, &str, &str, i64)) {
    let sql = format!(
        "INSERT INTO score.entry (id, person_id, type, value, score, created_at)
         VALUES ('{}', '{}', '{type_}', {value}, {score}, '2026-01-03 12:00:00.{item:06}')",
        id(1000 + item),
        id(life)
    );
    sqlx::query(AssertSqlSafe(sql)).execute(&mut database.admin).await.unwrap();
}

#[tokio::test]
async fn a_score_and_what_it_is_the_sum_of() {
    let mut database = Database::migrated().await;
    database.person(11111, 1, 2, 4, "4970").await;
    database.inbox("score", "person", "person", 1, 4).await;
    database.person(22222, 2, 1, 1, "0").await;
    // Another life of the first one's cpf, which is over.
    database.person(11111, 9, 1, 7, "1").await;
    for sample in SAMPLES {
        add(&mut database, 1, sample).await;
    }
    add(&mut database, 9, (9, "asset", "20", 1)).await;
    // Values of the widest.
    database.person(33333, 3, 1, 3, "-49999999999999").await;
    add(&mut database, 3, (31, "debt", "999999999999999.9999", -49_999_999_999_999)).await;
    add(&mut database, 3, (32, "asset", "0.0001", 0)).await;
    let program = Program::ready(&database.url()).await;
    let held = [("If-None-Match", "\"0198c0de-0000-7000-8000-000000000001.4\"")];
    let token = format!("{}.4", id(1));
    insta::assert_snapshot!(join(&[
        program.get("/11111/score/entries").await,
        program.get("/00011111/score/entries?limit=2").await,
        program.get(&format!("/11111/score/entries?limit=2&after_entry={}", id(1002))).await,
        program.get("/11111/score/entries?limit=3").await,
        program.get(&format!("/11111/score/entries?after_entry={}", id(1003))).await,
        // Without items.
        program.get("/22222/score/entries").await,
        program.get("/33333/score/entries?limit=1000").await,
        program.request("GET", "/11111/score/entries", &held).await,
        program.request("HEAD", "/11111/score/entries", &[]).await,
        program.get(&format!("/11111/score/entries?after={token}&wait=1s&limit=1")).await,
    ]));
}

#[tokio::test]
async fn what_cannot_be_answered_is_a_problem() {
    let database = Database::migrated().await;
    let program = Program::ready(&database.url()).await;
    let token = format!("{}.4", id(1));
    insta::assert_snapshot!(
        "entries_refused",
        join(&[
            program.get("/11111/score/entries").await,
            program.get("/abc/score/entries?limit=0&after_entry=1&after=2&wait=soon&offset=3").await,
            program.get("/11111/score/entries?limit=1001").await,
            program.get("/11111/score/entries?limit=1&limit=2").await,
            program.get("/11111/score/entries?limit=9999999999").await,
            program.get("/11111/score/entries?wait=1s").await,
            program.get(&format!("/11111/score/entries?after={token}&wait=20ms")).await,
            program.get("/11111/score/entries/").await,
            program.request("POST", "/11111/score/entries", &[("Content-Length", "0")]).await,
        ])
    );
}

/// A page and the score beside it are of one state, whoever writes meanwhile: the entries sum up to the score
/// and their number is the version's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_and_its_score_are_of_one_state() {
    let mut database = Database::migrated().await;
    database.person(11111, 1, 1, 1, "0").await;
    let program = Program::ready(&database.url()).await;
    let mut conn = PgConnection::connect_with(&database.options).await.unwrap();
    // Each answer lets some more be written, which is done while the next one is read.
    let turns = std::sync::Arc::new(tokio::sync::Semaphore::new(10));
    let taken = std::sync::Arc::clone(&turns);
    let writer = tokio::spawn(async move {
        for item in 1..=500_i64 {
            taken.acquire().await.unwrap().forget();
            // As the projector does: entry and sum in one transaction.
            let mut tx = conn.begin().await.unwrap();
            let entry = "INSERT INTO score.entry (id, person_id, type, value, score, created_at)
                         SELECT gen_random_uuid(), id, 'asset', $1 * 20, $1, now() FROM score.person";
            sqlx::query(entry).bind(item).execute(&mut *tx).await.unwrap();
            let sum = "UPDATE score.person SET version = version + 1, total = total + $1";
            sqlx::query(sum).bind(item).execute(&mut *tx).await.unwrap();
            tx.commit().await.unwrap();
        }
    });
    let mut states = std::collections::BTreeSet::new();
    while !writer.is_finished() {
        let answer = program.get("/11111/score/entries?limit=1000").await;
        let body: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
        let entries = body["entries"].as_array().unwrap();
        let sum: i64 = entries.iter().map(|entry| entry["score"].as_i64().unwrap()).sum();
        let version = i64::try_from(entries.len()).unwrap() + 1;
        assert_eq!((body["score"].as_i64(), body["version"].as_i64()), (Some(sum), Some(version)));
        states.insert(version);
        turns.add_permits(10);
    }
    writer.await.unwrap();
    assert!(states.len() > 10, "{} states were seen", states.len());
}
