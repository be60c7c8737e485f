//! `docs/operating/log.md` names every line that a program writes at a level that operators read, and no other.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// What no program writes when it runs for operators.
const NOT_PROGRAMS: [&str; 3] = ["target", "devstack", "tests"];

#[test]
fn the_document_names_what_is_logged() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    let document = fs::read_to_string(root.join("docs/operating/log.md")).unwrap();
    let documented: BTreeSet<String> = document
        .lines()
        .filter(|line| line.starts_with("| `") && line.contains(" | ") && line.matches(" | ").count() == 3)
        .flat_map(|line| line.split(" | ").next().unwrap().trim_start_matches("| ").split("`, `"))
        .map(|message| message.trim_matches('`').to_owned())
        .collect();
    let mut logged = BTreeSet::new();
    for file in sources(root) {
        let text = fs::read_to_string(&file).unwrap();
        for level in ["info", "warn", "error"] {
            let macro_ = format!("tracing::{level}!(");
            for (at, _) in text.match_indices(&macro_) {
                logged.extend(message(&text[at + macro_.len()..]));
            }
        }
    }
    // Written by a macro of its own, and described by itself.
    assert!(!logged.contains("request"));
    assert_eq!(logged.difference(&documented).collect::<Vec<_>>(), [""; 0], "logged, and not documented");
    assert_eq!(documented.difference(&logged).collect::<Vec<_>>(), [""; 0], "documented, and never logged");
}

/// The last string literal before the macro's end.
fn message(rest: &str) -> Option<String> {
    let (mut depth, mut literal, mut last) = (1, None::<String>, None);
    for c in rest.chars() {
        match (&mut literal, c) {
            (Some(_), '"') => last = literal.take(),
            (Some(text), c) => text.push(c),
            (None, '"') => literal = Some(String::new()),
            (None, '(') => depth += 1,
            (None, ')') => depth -= 1,
            (None, _) => {}
        }
        if depth == 0 {
            break;
        }
    }
    // A literal may go on in the next line, with a backslash.
    let whole = |text: String| text.split("\\\n").map(str::trim_start).collect::<String>();
    last.map(whole)
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() && !name.starts_with('.') && !NOT_PROGRAMS.contains(&name) {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}
