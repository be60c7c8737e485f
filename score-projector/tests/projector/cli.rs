//! The command line: what it says, and how it refuses.

use std::process::Command;

use crate::stack::{PROGRAM, command};

fn help(arguments: &[&str]) -> String {
    let output = Command::new(PROGRAM).args(arguments).arg("--help").env("COLUMNS", "100").output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

/// What a failing `run` says.
fn refusal(database: Option<&str>, amqp: Option<&str>, arguments: &[&str]) -> String {
    let mut command = Command::new(PROGRAM);
    command.arg("run").args(["--listen", "127.0.0.1:0"]).args(arguments).env_clear();
    command.envs(database.map(|url| ("DATABASE_URL", url))).envs(amqp.map(|url| ("AMQP_URL", url)));
    let output = command.output().unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    // The log's lines are JSON.
    text.lines().filter(|line| !line.starts_with('{')).collect::<Vec<_>>().join("\n")
}

#[test]
fn help_of_every_command() {
    insta::assert_snapshot!("help", help(&[]));
    insta::assert_snapshot!("help_run", help(&["run"]));
    insta::assert_snapshot!("help_migrate", help(&["migrate"]));
    insta::assert_snapshot!("help_digest", help(&["digest"]));
    insta::assert_snapshot!("help_rebuild", help(&["rebuild"]));
    insta::assert_snapshot!("help_rebuild_swap", help(&["rebuild", "swap"]));
    insta::assert_snapshot!("help_republish", help(&["republish"]));
    insta::assert_snapshot!("help_verify", help(&["verify"]));
    insta::assert_snapshot!("help_health", help(&["health"]));
}

#[tokio::test]
async fn it_says_what_is_missing() {
    let database = devstack::testing::database("refusal").await;
    let amqp = "amqp://guest:secret@127.0.0.1:1/none";
    let mut said = vec![
        refusal(None, Some(amqp), &[]),
        refusal(Some("postgres://secret@["), Some(amqp), &[]),
        refusal(Some(&database), None, &[]),
        refusal(Some(&database), Some("amqp://guest:secret@host:port/"), &[]),
        refusal(Some(&database), Some(amqp), &["--queue", ""]),
        refusal(Some(&database), Some(amqp), &[]),
    ];
    let migrated = command(&["migrate"], &database);
    assert!(migrated.status.success());
    insta::assert_snapshot!("migrated", String::from_utf8(migrated.stdout).unwrap());
    assert!(command(&["migrate"], &database).status.success(), "once more changes nothing");
    said.push(refusal(Some(&database), Some(amqp), &[]));
    let refused = command(&["migrate", "--grant-to", "nobody_at_all"], &database);
    assert!(!refused.status.success());
    said.push(String::from_utf8(refused.stderr).unwrap());
    insta::assert_snapshot!("refusals", said.join("\n"));
}
