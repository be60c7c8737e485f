//! What `devstack chaos` is told, and the setting by which it switches a guard off. The run itself is part of
//! `.ci/run`.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

use std::{path::Path, process::Command};

fn run(program: &str, args: &[&str], variable: Option<(&str, &str)>) -> String {
    let file = Path::new(env!("CARGO_BIN_EXE_devstack")).with_file_name(program);
    let output = Command::new(file).args(args).env_clear().envs(variable).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    format!("exit code {}\n{text}", output.status.code().unwrap())
}

/// Else a misspelled one would leave the guard on, and the run green.
#[test]
fn a_guard_that_nobody_knows_is_refused() {
    for (program, variable) in
        [("outbox-relay", "OUTBOX_RELAY_SABOTAGE"), ("score-projector", "INBOX_SABOTAGE")]
    {
        let refused = run(program, &["run"], Some((variable, "everything")));
        assert!(
            refused.starts_with(&format!("exit code 2\n{program}: {variable}: should be one of ")),
            "{refused}"
        );
    }
    let refused = run("devstack", &["chaos", "--sabotage", "everything"], None);
    assert!(
        refused.starts_with("exit code 2\n") && refused.contains("it should be all, confirms, "),
        "{refused}"
    );
}

#[test]
fn the_plan_is_shown_and_nothing_is_started() {
    let of = |args: &[&str]| run("devstack", &[&["chaos", "--plan"], args].concat(), None);
    assert_eq!(of(&["--seed", "5"]), of(&["--seed", "5", "--minutes", "5"]));
    assert_ne!(of(&["--seed", "5"]), of(&["--seed", "6"]));
    insta::assert_snapshot!(of(&["--seed", "1", "--seconds", "10"]), @r"
    exit code 0
        3.0 s  for  2.8 s  a slow wire: score-relay to PostgreSQL, 56 ms
        6.4 s  for  2.9 s  a prepared transaction: PreparedElsewhere, rolled back
        9.3 s  for  0.0 s  all connections closed
    ");
}
