//! The command line of `make chaos`, and its patches. The run itself is a step of `.ci/run`.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

use std::{path::Path, process::Command};

use chaos::sabotage::{Sabotage, build};

fn run(args: &[&str]) -> String {
    let file = Path::new(env!("CARGO_BIN_EXE_chaos"));
    let output = Command::new(file).args(args).env_clear().output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    format!("exit code {}\n{text}", output.status.code().unwrap())
}

/// Otherwise a misspelled name would leave the guard in place, and the run would be green.
#[test]
fn an_unknown_guard_is_refused() {
    let refused = run(&["--sabotage", "everything"]);
    assert!(
        refused.starts_with("exit code 2\n") && refused.contains("it should be all, confirms, "),
        "{refused}"
    );
}

/// Each patch fits the sources, and relay and projector compile with all of them.
#[tokio::test]
async fn every_guard_can_be_removed() {
    build::check(&Sabotage::ALL).await.unwrap_or_else(|error| panic!("{error:#}"));
}

/// Builds of the whole workspace have failpoints, for the fault suites. A program that is built by its package, as the
/// image is, does not even contain the library.
#[test]
fn no_release_has_failpoints() {
    let has_failpoints = |selection: &[&str]| {
        let mut tree = Command::new(env!("CARGO"));
        tree.args(["tree", "--offline", "--locked", "--edges", "normal", "--prefix", "none"]).args(selection);
        let output = tree.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().lines().any(|line| line.starts_with("fail v"))
    };
    assert!(has_failpoints(&["--workspace"]));
    assert!(!has_failpoints(&["--workspace", "--exclude", "chaos"]));
    let dockerfile = include_str!("../../../deploy/Dockerfile");
    let packages: Vec<&str> =
        dockerfile.split("--package ").skip(1).filter_map(|rest| rest.split_whitespace().next()).collect();
    assert_eq!(packages.len(), 4);
    assert!(!has_failpoints(&packages.iter().flat_map(|package| ["--package", package]).collect::<Vec<_>>()));
    for package in packages {
        assert!(!has_failpoints(&["--package", package]), "{package}");
    }
}

#[test]
fn the_plan_is_shown_and_nothing_is_started() {
    let of = |args: &[&str]| run(&[&["--plan"], args].concat());
    assert_eq!(of(&["--seed", "5"]), of(&["--seed", "5", "--minutes", "5"]));
    assert_ne!(of(&["--seed", "5"]), of(&["--seed", "6"]));
    insta::assert_snapshot!(of(&["--only", "restore", "--only", "failover", "--seconds", "40"]), @r"
    exit code 0
        5.0 s  for  5.0 s  a backup restored, with the procedure
       25.0 s  for  5.0 s  a failover that lost commits, with the procedure
    ");
    insta::assert_snapshot!(of(&["--seed", "1", "--seconds", "10"]), @r"
    exit code 0
        3.0 s  for  3.4 s  a half-open link: person-api to PostgreSQL, FromServer
        6.3 s  for  2.0 s  a program stopped and continued: score-api
    ");
}
