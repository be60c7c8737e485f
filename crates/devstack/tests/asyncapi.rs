//! `docs/asyncapi.yaml` is AsyncAPI 3, and each golden body fits it: by AsyncAPI's own parser, and a validator of JSON
//! Schema.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const DOCUMENT: &str = include_str!("../../../docs/asyncapi.yaml");
const PROGRAM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/asyncapi");
const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../events/golden");

/// The folder of the program, with the packages of its lock file in it.
fn installed() -> PathBuf {
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join("asyncapi");
    fs::create_dir_all(&home).unwrap();
    let lock = fs::read_to_string(Path::new(PROGRAM).join("package-lock.json")).unwrap();
    let done = home.join("installed");
    for file in ["package.json", "package-lock.json", "check.js"] {
        fs::copy(Path::new(PROGRAM).join(file), home.join(file)).unwrap();
    }
    if fs::read_to_string(&done).ok() != Some(lock.clone()) {
        let mut npm = Command::new("npm");
        npm.args(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"])
            .current_dir(&home);
        let output = npm
            .output()
            .unwrap_or_else(|error| panic!("npm: {error}; crates/devstack/install tests installs it"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        fs::write(done, lock).unwrap();
    }
    home
}

/// What is wrong with a document, and what was looked at.
fn check(home: &Path, document: &str) -> String {
    let file = home.join("asyncapi.yaml");
    fs::write(&file, document).unwrap();
    let output =
        Command::new("node").arg(home.join("check.js")).args([&file, Path::new(GOLDEN)]).output().unwrap();
    let [said, errors] = [output.stdout, output.stderr].map(|said| String::from_utf8(said).unwrap());
    assert!(output.status.success(), "{errors}");
    said.trim().to_owned()
}

#[test]
fn the_document_is_asyncapi_3_and_each_golden_body_fits_it() {
    let home = installed();
    insta::assert_snapshot!(check(&home, DOCUMENT), @"17 messages, 2 channels, 30 golden bodies");

    // What would be wrong is found.
    let changed = |from: &str, to: &str| {
        assert!(DOCUMENT.contains(from), "{from}");
        check(&home, &DOCUMENT.replacen(from, to, 1))
    };
    for (said, wanted) in [
        (changed("action: send", "action: sent"), "operations.publish.action"),
        (changed("deliveryMode: 2", "deliveryMode: 3"), "operations.publish.bindings.amqp.deliveryMode"),
        (
            changed("status: {type: string, enum: [active, inactive]}", ""),
            "person.baseline-2.json.status is not in the document",
        ),
        (
            changed("total: {$ref: '#/components/schemas/Total'}", "total: {type: string}"),
            "score.changed.json: data/total",
        ),
        (
            changed("required: [id, cpf, total, entries]", "required: [id, cpf, entries]"),
            "score.baseline.json: total is not required",
        ),
        (
            changed("      score.new: {$ref: '#/components/messages/score.new'}\n", ""),
            "byType lacks messages",
        ),
    ] {
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
}
