//! The examples of `docs/examples`, run as they stand, by a role that may append events and make its own table.

use std::path::Path;

use sqlx::{AssertSqlSafe, Executor};
use tokio::process::Command;

use crate::stack::{Relay, Stack, output};

fn example(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/examples").join(name);
    path.to_str().unwrap().to_owned()
}

/// A Python that has psycopg2, which crates/devstack/install sees to.
async fn python() -> Command {
    for python in ["python3", "/usr/bin/python3"] {
        let asked = Command::new(python).args(["-c", "import psycopg2"]).output().await;
        if asked.is_ok_and(|asked| asked.status.success()) {
            return Command::new(python);
        }
    }
    panic!("no python3 has psycopg2: run crates/devstack/install tests")
}

/// Services in other languages need nothing of ours: what they commit arrives, and nothing else.
#[tokio::test]
async fn in_sql_and_in_python() {
    let stack = Stack::new("relay_examples").await;
    let (writer, _) = stack.writer_url.trim_start_matches("postgres://").split_once(':').unwrap();
    stack.admin.execute(AssertSqlSafe(format!("GRANT CREATE ON SCHEMA public TO {writer}"))).await.unwrap();
    let mut orders = stack.subscribe("order.#").await;
    let _relay = Relay::ready(&mut stack.command("run")).await;

    let mut psql = Command::new("psql");
    // The address would show the password in the list of processes.
    psql.env("PGSERVICEFILE", "/dev/null").args(["-v", "ON_ERROR_STOP=1", "-qXf", &example("order.sql")]);
    for (name, value) in parts(&stack.writer_url) {
        psql.env(name, value);
    }
    assert_eq!(output(&mut psql).await, "exit code: 0");
    let mut python = python().await;
    python.arg(example("order.py")).env("DATABASE_URL", &stack.writer_url);
    assert_eq!(output(&mut python).await, "exit code: 0");

    let arrived: Vec<String> = orders
        .count(6)
        .await
        .iter()
        .map(|m| {
            format!("{} {} v{} {}", m.key, m.header("aggregate_id"), m.header("aggregate_version"), m.body)
        })
        .collect();
    insta::assert_snapshot!(arrived.join("\n"));
}

/// A URL, as the variables that libpq reads.
fn parts(url: &str) -> [(&'static str, String); 5] {
    let url = reqwest::Url::parse(url).unwrap();
    [
        ("PGUSER", url.username().to_owned()),
        ("PGPASSWORD", url.password().unwrap().to_owned()),
        ("PGHOST", url.host_str().unwrap().to_owned()),
        ("PGPORT", url.port().unwrap().to_string()),
        ("PGDATABASE", url.path().trim_start_matches('/').to_owned()),
    ]
}
