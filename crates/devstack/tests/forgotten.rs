//! Who is deleted is erased everywhere: from both databases, and never was in a log or a metric, also when
//! others were just writing about them.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

mod support;

use std::collections::BTreeMap;

use devstack::{
    stack::{Addresses, Stack},
    testing::{DEADLINE, client, eventually, tables_with},
};
use sqlx::{Connection, PgConnection};
use support::{Apis, stack};
use tokio_util::sync::CancellationToken;

/// Digits, and words that nothing else contains.
const CPF: u64 = 52_998_224_725;
const PERSONAL: [&str; 5] = ["52998224725", "Brunhilde", "Rheingold", "Nibelungenhort", "918273645"];

const WRITERS: usize = 8;

fn person(name: usize) -> String {
    format!(
        r#"{{"cpf": {CPF}, "name": "Brunhilde {name}", "address": "Rheingold {name}", "date_of_birth": "1899-07-08"}}"#
    )
}

/// Where something personal stands in one of the two databases.
async fn stands(addresses: &Addresses) -> Vec<String> {
    let mut found = Vec::new();
    for (name, url) in [("person", &addresses.person_database_url), ("score", &addresses.score_database_url)]
    {
        for text in PERSONAL {
            found.extend(tables_with(url, text).await.iter().map(|table| format!("{name}: {table}: {text}")));
        }
    }
    found
}

/// As an operator does who looks for slow statements. Sessions that are there already do it, too; those of this
/// test, which look for what is personal, do not.
async fn log_statements(url: &str) {
    let mut conn = PgConnection::connect(url).await.unwrap();
    for sql in [
        "ALTER ROLE CURRENT_USER SET log_min_duration_statement = -1",
        "ALTER SYSTEM SET log_min_duration_statement = 0",
        "SELECT pg_reload_conf()",
    ] {
        sqlx::query(sql).execute(&mut conn).await.unwrap();
    }
}

async fn one(url: &str, sql: &'static str) -> i64 {
    let mut conn = PgConnection::connect(url).await.unwrap();
    sqlx::query_scalar(sql).fetch_one(&mut conn).await.unwrap()
}

/// Writes about the person until nobody is there any more. Returns how much was accepted.
async fn writer(apis: Apis, number: usize) -> usize {
    let path = format!("/person/{CPF}");
    let mut accepted = 0;
    loop {
        let key = format!("{number}-{accepted}");
        let answer = match (number + accepted) % 4 {
            0 => apis.send("PATCH", &path, &key, format!(r#"{{"name": "Brunhilde {key}"}}"#)).await,
            1 => apis.send("POST", &format!("{path}/debt"), &key, r#"{"value": 918273645}"#.into()).await,
            kind => {
                let kind = if kind == 2 { "asset" } else { "income" };
                let body = r#"{"type": "Nibelungenhort", "value": 918273645}"#;
                apis.send("POST", &format!("{path}/{kind}"), &key, body.into()).await
            }
        };
        match answer.status {
            200 | 201 => accepted += 1,
            404 => return accepted,
            // Others had the person for too long, and nothing was written.
            503 if answer.body.contains("/problems/person-busy") => {}
            _ => panic!("{}", answer.shown()),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_deleted_while_others_write_leaves_no_trace() {
    let mut stack = stack().await;
    let addresses = stack.addresses();
    let apis = Apis::of(&addresses);
    log_statements(&addresses.person_database_url).await;

    for (life, projector) in ["runs", "is stopped", "is killed"].into_iter().enumerate() {
        let created = apis.send("POST", "/person", &format!("life-{life}"), person(life)).await;
        assert_eq!(created.status, 201, "{}", created.shown());
        if projector == "is stopped" {
            // It hears of a whole life at once, erased already.
            assert!(stack.score_projector.stop(&CancellationToken::new()).await);
        }
        let mut writers = tokio::task::JoinSet::new();
        for number in 0..WRITERS {
            writers.spawn(writer(apis.clone(), life * WRITERS + number));
        }
        eventually("the writers have written", async || {
            let count = one(&addresses.person_database_url, LIVING).await;
            if count > 50 { Ok(()) } else { Err(format!("{count} events")) }
        })
        .await;
        if projector == "is killed" {
            // It was in the middle of it, and finds the deletion among what it gets again.
            stack.score_projector.kill().await;
            stack.score_projector.start().await.unwrap();
        }
        if projector == "runs" {
            eventually("something is on the score side", async || {
                let found = stands(&addresses).await;
                if found.iter().any(|found| found.starts_with("score")) {
                    Ok(())
                } else {
                    Err(format!("{found:?}"))
                }
            })
            .await;
        }
        let deleted = apis.send("DELETE", &format!("/person/{CPF}"), "unused", String::new()).await;
        assert_eq!(deleted.status, 200, "{}", deleted.shown());
        let accepted: usize = writers.join_all().await.iter().sum();
        assert!(accepted >= 50, "{accepted}");

        if projector == "is stopped" {
            stack.score_projector.start().await.unwrap();
        }
        stack.score_projector.ready(DEADLINE).await.unwrap();
        eventually("the score side has heard of everything", async || {
            let (written, heard): (Vec<_>, Vec<_>) = (
                chains(&addresses.person_database_url, SOURCE_CHAINS).await,
                chains(&addresses.score_database_url, INBOX_CHAINS).await,
            );
            if written == heard { Ok(()) } else { Err(format!("{heard:?} of {written:?}")) }
        })
        .await;
        // Who has over a thousand rows is removed in steps.
        eventually(&format!("nothing of them is left, when the projector {projector}"), async || {
            let left = stands(&addresses).await;
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        })
        .await;
    }

    // Gaps were erased, not made: both sides still agree on every life, and nothing waits or was refused.
    let both = [
        ("DATABASE_URL", &*addresses.person_database_url),
        ("INBOX_DATABASE_URL", &addresses.score_database_url),
    ];
    stack.person_relay.command(&["digest", "--consumer", "score"], &both).await.unwrap();
    let (held, rejected, parked) = (
        one(&addresses.score_database_url, "SELECT count(*) FROM inbox.held").await,
        one(&addresses.score_database_url, "SELECT count(*) FROM inbox.rejected").await,
        one(&addresses.person_database_url, "SELECT count(*) FROM outbox.parked").await,
    );
    assert_eq!((held, rejected, parked), (0, 0, 0));

    let metrics = metrics(&addresses).await;
    assert!(metrics.contains("http_requests_total"), "{metrics}");
    for program in stack.programs() {
        assert!(program.stop(&CancellationToken::new()).await);
    }
    let logs = logs(&stack);
    assert!(logs["postgres.log"].contains("INSERT INTO outbox.event"), "the server has logged statements");
    let names: Vec<_> = logs.keys().collect();
    assert!(logs.len() >= 7, "the five programs and both servers have logged: {names:?}");
    stack.stop(&CancellationToken::new()).await;
    for text in PERSONAL {
        assert!(!metrics.contains(text), "the metrics have {text}");
        for (name, log) in &logs {
            assert!(!log.contains(text), "{name} has {text}");
        }
    }
}

/// Events of who is not deleted.
const LIVING: &str =
    "SELECT count(*) FROM outbox.event e JOIN person.person p ON p.id::text = e.aggregate_id";
/// Everybody's last version, as it was written, and as the score side has heard of it.
const SOURCE_CHAINS: &str = "SELECT aggregate_id, max(version) FROM outbox.event GROUP BY 1 ORDER BY 1";
const INBOX_CHAINS: &str = "SELECT aggregate_id, version FROM inbox.aggregate ORDER BY 1";

async fn chains(url: &str, sql: &'static str) -> Vec<(String, i64)> {
    let mut conn = PgConnection::connect(url).await.unwrap();
    sqlx::query_as(sql).fetch_all(&mut conn).await.unwrap()
}

async fn metrics(addresses: &Addresses) -> String {
    let mut all = String::new();
    for url in [
        &addresses.person_url,
        &addresses.person_relay_url,
        &addresses.projector_url,
        &addresses.score_relay_url,
        &addresses.score_url,
    ] {
        let answer = client().get(format!("{url}/metrics")).send().await.unwrap();
        assert!(answer.status().is_success(), "{url}");
        all += &answer.text().await.unwrap();
    }
    all
}

/// The logs of the programs and of both servers, by name.
fn logs(stack: &Stack) -> BTreeMap<String, String> {
    let files = std::fs::read_dir(stack.folder().path().join("log")).unwrap();
    let logs = files.map(|file| {
        let path = file.unwrap().path();
        let log = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
        (path.file_name().unwrap().to_string_lossy().into_owned(), log)
    });
    logs.collect()
}
