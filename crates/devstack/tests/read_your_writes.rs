//! Whoever asks for the score with the token of a write never misses the write.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

mod support;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use devstack::{stack::Stack, testing::DEADLINE};
use rand::{RngExt as _, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use support::{Answer, Apis, payload, stack};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// How many write at the same time, each to a person of their own.
const WRITERS: u64 = 4;
/// What each writes, unless `READ_YOUR_WRITES_SECONDS` says for how long.
const WRITES: usize = 25;
/// How many read each write.
const READERS: usize = 2;
/// How many changes of one person are followed entry by entry.
const CHANGES: usize = 60;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_read_with_the_token_of_a_write_misses_it() {
    let mut stack = stack().await;
    let apis = Apis::of(&stack.addresses());
    let end = std::env::var("READ_YOUR_WRITES_SECONDS")
        .ok()
        .map(|seconds| Instant::now() + Duration::from_secs(seconds.parse().unwrap()));

    let mut writers = JoinSet::new();
    for cpf in 1..=WRITERS {
        writers.spawn(write_and_read(apis.clone(), cpf, end));
    }
    let mut took: Vec<Duration> = writers.join_all().await.into_iter().flatten().collect();
    took.sort();
    eprintln!(
        "{} reads contained their write, half of them within {:?}, all within {:?}",
        took.len(),
        took[took.len() / 2],
        took[took.len() - 1]
    );
    entries_sum_up(&apis).await;
    says_where_it_stands(&mut stack, &apis).await;
    stack.stop(&CancellationToken::new()).await;
}

/// Writes, and has every write read at once by several; returns how long each read took.
async fn write_and_read(apis: Apis, cpf: u64, end: Option<Instant>) -> Vec<Duration> {
    let mut person: Value = serde_json::from_str(&payload("person")).unwrap();
    person["cpf"] = json!(cpf);
    let mut written = apis.post("/person", person.to_string()).await;
    let (mut score, mut took) = (0, Vec::new());
    let items = [("income", 20), ("asset", 5000), ("debt", -50)].into_iter().cycle();
    for (count, (item, worth)) in items.enumerate() {
        assert_eq!(written.status, 201, "{}", written.shown());
        let mut readers = JoinSet::new();
        for _ in 0..READERS {
            let (apis, token) = (apis.clone(), written.token().to_owned());
            readers.spawn(async move {
                let begun = Instant::now();
                let read = read(&apis, cpf, &token).await;
                assert_eq!(read.status, 200, "{}", read.shown());
                assert_eq!(read.json()["score"].as_i64(), Some(score), "{}", read.shown());
                // Nobody else writes to this person, so it contains this write and no other.
                assert_eq!(read.token(), token);
                begun.elapsed()
            });
        }
        took.extend(readers.join_all().await);
        if end.map_or(count == WRITES, |end| Instant::now() > end) {
            break;
        }
        written = apis.post(&format!("/person/{cpf}/{item}"), payload(item)).await;
        score += worth;
    }
    took
}

/// As a client does that is told to ask again.
async fn read(apis: &Apis, cpf: u64, token: &str) -> Answer {
    read_again(apis, &format!("/{cpf}/score?after={token}&wait=5s")).await
}

async fn read_again(apis: &Apis, path: &str) -> Answer {
    let end = Instant::now() + DEADLINE;
    loop {
        let answer = apis.read(path).await;
        let again = answer.status == 503 && answer.json()["type"] == "/problems/not-there-yet";
        if !again || Instant::now() > end {
            return answer;
        }
    }
}

/// Whatever is added, replaced and deleted: the entries that a reader pages through with the token of the last
/// write are those items, each worth what the contract says, and sum up to the score.
async fn entries_sum_up(apis: &Apis) {
    let seed: u64 = rand::random();
    eprintln!("the writes are those of the seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut person: Value = serde_json::from_str(&payload("person")).unwrap();
    person["cpf"] = json!(77777);
    let mut written = apis.post("/person", person.to_string()).await;
    let mut items: BTreeMap<String, (&str, i64)> = BTreeMap::new();
    for _ in 0..CHANGES {
        assert!([200, 201].contains(&written.status), "{}", written.shown());
        let limit = random.random_range(1..6);
        let first = format!("/77777/score/entries?limit={limit}&after={}&wait=5s", written.token());
        let (mut page, mut pages) = (read_again(apis, &first).await, 0);
        let (mut found, mut sum) = (BTreeMap::new(), 0);
        loop {
            assert_eq!((page.status, page.token()), (200, written.token()), "{}", page.shown());
            let page_of = page.json();
            for entry in page_of["entries"].as_array().unwrap() {
                let score = entry["score"].as_i64().unwrap();
                sum += score;
                found.insert(text(&entry["id"]), (text(&entry["type"]), score));
            }
            pages += 1;
            let Some(next) = page_of["next"].as_str() else {
                assert_eq!(page_of["score"].as_i64(), Some(sum), "{}", page.shown());
                break;
            };
            page = apis.read(next).await;
        }
        let expected = items.iter().map(|(id, (kind, score))| (id.clone(), ((*kind).to_owned(), *score)));
        assert_eq!(found, expected.collect());
        assert_eq!(pages, items.len().div_ceil(limit).max(1));

        let (units, decimals): (i64, u32) =
            (random.random_range(0..1_000_000), random.random_range(0..10_000));
        let kind = ["income", "asset", "debt"][random.random_range(0..3)];
        let body = |kind| {
            let type_ = if kind == "debt" { "" } else { r#""type": "of some sort", "# };
            format!(r#"{{{type_}"value": {units}.{decimals:04}}}"#)
        };
        let worth = |kind| match kind {
            "income" => units / 50,
            "asset" => units / 20,
            _ => -(units / 20),
        };
        let some = items.keys().nth(random.random_range(0..items.len().max(1))).cloned();
        written = match (some, random.random_range(0..4)) {
            (Some(id), 0) => {
                let (kind, _) = items.remove(&id).unwrap();
                apis.send("DELETE", &format!("/person/77777/{kind}/{id}"), "none", String::new()).await
            }
            (Some(id), 1) => {
                let kind = items[&id].0;
                items.insert(id.clone(), (kind, worth(kind)));
                apis.send("PUT", &format!("/person/77777/{kind}/{id}"), "none", body(kind)).await
            }
            _ => {
                let written = apis.post(&format!("/person/77777/{kind}"), body(kind)).await;
                items.insert(text(&written.json()["id"]), (kind, worth(kind)));
                written
            }
        };
    }
}

fn text(json: &Value) -> String {
    json.as_str().unwrap().to_owned()
}

/// Without a projector a read says what it has instead, and it has the write once there is one again.
async fn says_where_it_stands(stack: &mut Stack, apis: &Apis) {
    let created = apis.post("/person", payload("person")).await;
    assert_eq!(read(apis, 11111, created.token()).await.status, 200);
    stack.score_projector.stop(&CancellationToken::new()).await;
    let written = apis.post("/person/11111/income", payload("income")).await;
    let behind = apis.score_after(11111, written.token(), "300ms").await;
    let said = behind.json();
    assert_eq!(
        (behind.status, &said["type"], &said["asked"], &said["has"]),
        (503, &json!("/problems/not-there-yet"), &json!(2), &json!(1)),
        "{}",
        behind.shown()
    );
    // The projector has said what it did while it was there.
    assert!(said["last_applied_ms_ago"].is_u64(), "{}", behind.shown());
    stack.score_projector.start().await.unwrap();
    let there = read(apis, 11111, written.token()).await;
    assert_eq!((there.status, there.token()), (200, written.token()), "{}", there.shown());
}
