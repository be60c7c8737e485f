//! A rebuild while everybody goes on: writers, readers, and a projector that is killed.

use std::{
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
};

use serde_json::Value;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{
    rebuild::{start, until_level},
    stack::{PROGRAM, Program, Stack, client, id, item, person, until},
};

const PERSONS: u128 = 8;

/// The real score-api, since what it has prepared must survive the exchange.
async fn score_api(stack: &Stack) -> (Program, String) {
    let program = Path::new(PROGRAM).with_file_name("score-api");
    assert!(program.exists(), "score-api is not built: cargo build -p score-api");
    let listen = format!("127.0.0.1:{}", devstack::ports::free());
    let mut command = Command::new(program);
    command.args(["run", "--listen", &listen]).env("DATABASE_URL", &stack.admin).stderr(Stdio::null());
    let program = Program(command.spawn().unwrap());
    until("score-api is ready", async || {
        client()
            .get(format!("http://{listen}/ready"))
            .send()
            .await
            .is_ok_and(|answer| answer.status().is_success())
    })
    .await;
    (program, listen)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_never_stop_and_subscribers_see_neither_fork_nor_hole() {
    let stack = Arc::new(Stack::new("load").await);
    let program = stack.start().await;
    let person_id = |n: u128| id(10_000 * (n + 1));
    for n in 0..PERSONS {
        let p = person_id(n);
        stack.publish("person.new", p, 1, &person(p, 100 + i64::try_from(n).unwrap())).await;
    }
    for n in 0..PERSONS {
        stack.until_version(person_id(n), 1).await;
    }
    let enough = CancellationToken::new();
    let written = Arc::new(AtomicI64::new(1));
    let writer = tokio::spawn({
        let (stack, enough, written) = (stack.clone(), enough.clone(), written.clone());
        async move {
            let mut version = 1;
            while !enough.is_cancelled() {
                version += 1;
                for n in 0..PERSONS {
                    let (p, v) = (person_id(n), u128::try_from(version).unwrap());
                    stack.publish("asset.new", p, version, &item(id(10_000 * (n + 1) + v), p, 1, "20")).await;
                }
                written.store(version, Ordering::Relaxed);
            }
        }
    });
    let (_api, listen) = score_api(&stack).await;
    let reads = Arc::new(AtomicU64::new(0));
    let mut readers = JoinSet::new();
    for n in 0..PERSONS {
        let (enough, listen, reads) = (enough.clone(), listen.clone(), reads.clone());
        readers.spawn(async move {
            let (client, mut last) = (client(), 0);
            while !enough.is_cancelled() {
                let url = format!("http://{listen}/{}/score", 100 + n);
                let answer = client.get(url).send().await.unwrap();
                let (status, text) = (answer.status(), answer.text().await.unwrap());
                assert!(status.is_success(), "a read failed: {status} {text}");
                let body: Value = serde_json::from_str(&text).unwrap();
                let (version, score) = (body["version"].as_i64().unwrap(), body["score"].as_i64().unwrap());
                assert!(version >= last, "a read went back from {last} to {version}");
                assert_eq!(score, version - 1, "one asset of 20 a version");
                last = version;
                reads.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let more = |n: i64| {
        let (written, from) = (written.clone(), written.load(Ordering::Relaxed));
        async move { until("more is written", async || written.load(Ordering::Relaxed) >= from + n).await }
    };

    more(5).await;
    let queue = start(&stack);
    stack.replay(&queue).await;
    // SIGKILL in the middle, twice.
    drop(program);
    let program = stack.start().await;
    more(5).await;
    drop(program);
    let program = stack.start().await;
    until_level(&stack).await;
    let reads_before = reads.load(Ordering::Relaxed);
    let (code, said) = stack.owner(&["rebuild", "swap"]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("the two models are equal"), "one moves on while they are compared: {said}");
    more(5).await;
    until("reads go on", async || reads.load(Ordering::Relaxed) > reads_before + 100).await;
    enough.cancel();
    writer.await.unwrap();
    while let Some(reader) = readers.join_next().await {
        reader.unwrap();
    }

    let last = written.load(Ordering::Relaxed);
    for n in 0..PERSONS {
        stack.until_version(person_id(n), last).await;
    }
    assert_eq!(stack.owner(&["verify"]).0, 0);
    // One score event for each asset, its version the next one, its total one more.
    let chains: Vec<(i64, i64, i64, bool)> = sqlx::query_as(
        "SELECT count(*), min(version), max(version), bool_and((payload->>'total')::bigint = version)
         FROM outbox.event GROUP BY aggregate_id",
    )
    .fetch_all(&stack.pool)
    .await
    .unwrap();
    assert_eq!(chains, vec![(last - 1, 1, last - 1, true); usize::try_from(PERSONS).unwrap()]);
    drop(program);
}
