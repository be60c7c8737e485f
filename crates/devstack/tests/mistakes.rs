//! Each message that the pages about writing quote as what a mistake answers is one that the outbox or PostgreSQL writes.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Messages of PostgreSQL itself, and names of constraints, which the tables quote too.
const NOT_RAISED: [&str; 7] = [
    "could not serialize access",
    "deadlock detected",
    "permission denied for",
    "query would be affected by row-level security",
    "function outbox.publish(",
    "event_payload_size",
    "event_headers_fit",
];

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| path.extension().is_some_and(|is| is == extension));
    found.sort();
    found
}

/// A text in which numbers, the sample's id and its type are `%`, as in the format of a message; `%%` is one of them, because
/// some formats are made by a format.
fn as_format(text: &str) -> String {
    let text = text.replace("order/42", "%").replace("type order", "type %").replace("%/%", "%");
    let mut format = String::new();
    for c in text.chars() {
        let c = if c.is_ascii_digit() { '%' } else { c };
        if c != '%' || !format.ends_with('%') {
            format.push(c);
        }
    }
    format
}

/// The code in the first column of the tables that say what a mistake answers.
fn quoted(page: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut inside = false;
    for line in page.lines() {
        inside = line.starts_with("| you see |") || inside && line.starts_with('|');
        if let Some(cell) = line.split('|').nth(1).filter(|_| inside) {
            found.extend(cell.split('`').skip(1).step_by(2).map(str::to_owned));
        }
    }
    found
}

#[test]
fn each_quoted_message_is_one_that_is_written() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let migrations = files(&root.join("crates/outbox/migrations"), "sql");
    let written: String =
        migrations.iter().map(|path| as_format(&fs::read_to_string(path).unwrap())).collect();
    let mut pages = files(&root.join("docs/writing"), "md");
    pages.push(root.join("docs/writing.md"));
    let (mut wrong, mut looked_at) = (Vec::new(), 0);
    for page in pages {
        for message in quoted(&fs::read_to_string(&page).unwrap()) {
            if NOT_RAISED.iter().any(|own| message.starts_with(own)) || message.starts_with("outbox-relay ") {
                continue;
            }
            looked_at += 1;
            for part in message.split('…').map(|part| as_format(part.trim())) {
                if !written.contains(&part) {
                    wrong.push(format!("{}: `{message}`: no migration has: {part}", page.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // The search itself works.
    assert!(looked_at > 20, "{looked_at} messages");
}
