//! A run whose only fault is a restored backup, under writes, with the documented procedure. Short runs leave it out, and
//! `crates/devstack/tests/back_in_time.rs` has the cases one by one.

use std::{path::Path, process::Command};

#[test]
fn a_backup_is_restored_under_writes_and_the_procedure_ends_green() {
    let file = Path::new(env!("CARGO_BIN_EXE_chaos"));
    let run =
        Command::new(file).args(["--seed", "1", "--seconds", "20", "--only", "restore"]).output().unwrap();
    let said = String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{said}");
    assert!(said.contains("| a backup restored, with the procedure | 1 |"), "{said}");
}
