//! Every body that was ever published stays readable, to the last digit. `golden/` is append-only:
//! a file is named `<event type>.json`, with `-2`, `-3`, … for later shapes of the same type.

#![expect(clippy::unwrap_used, reason = "a panic is the report of a test")]

use events::{Deleted, PersonEvent, Score, ScoreBaseline};
use serde_json::Value;

fn golden() -> Vec<(String, String)> {
    let mut all: Vec<_> = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/golden"))
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            (name, std::fs::read_to_string(path).unwrap())
        })
        .collect();
    all.sort();
    all
}

/// Parses `body` as its type and writes it again.
fn again(type_: &str, body: &str) -> Value {
    fn value(body: impl serde::Serialize) -> Value {
        serde_json::to_value(body).unwrap()
    }
    if type_ == "score.deleted" {
        return value(serde_json::from_str::<Deleted>(body).unwrap());
    }
    if type_ == "score.baseline" {
        return value(serde_json::from_str::<ScoreBaseline>(body).unwrap());
    }
    if type_.starts_with("score.") {
        return value(serde_json::from_str::<Score>(body).unwrap());
    }
    match PersonEvent::parse(type_, body.as_bytes()).unwrap() {
        PersonEvent::New(person) | PersonEvent::Changed(person) => value(person),
        PersonEvent::Deleted(deleted) => value(deleted),
        PersonEvent::Baseline(baseline) => value(baseline),
        PersonEvent::ItemNew(_, item)
        | PersonEvent::ItemChanged(_, item)
        | PersonEvent::ItemDeleted(_, item) => value(item),
        PersonEvent::Erased => serde_json::from_str(body).unwrap(),
        PersonEvent::Unknown => panic!("{type_} is not known any more"),
    }
}

/// RFC 3339 has several spellings of one instant; the contract promises the instant.
fn same_instants(value: Value) -> Value {
    match value {
        Value::String(s) => match chrono::DateTime::parse_from_rfc3339(&s) {
            Ok(time) => Value::String(time.to_utc().to_rfc3339()),
            Err(_) => Value::String(s),
        },
        Value::Array(all) => all.into_iter().map(same_instants).collect(),
        Value::Object(all) => all.into_iter().map(|(k, v)| (k, same_instants(v))).collect(),
        other => other,
    }
}

#[test]
fn every_body_ever_published_is_read_without_loss() {
    let all = golden();
    assert!(all.len() >= 29, "golden bodies are missing: {}", all.len());
    for (name, body) in all {
        let type_ = name.split('-').next().unwrap();
        let published: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(same_instants(again(type_, &body)), same_instants(published), "{name}");
    }
}

#[test]
fn fields_of_tomorrow_are_ignored_and_types_of_tomorrow_pass() {
    let body = r#"{"id":"0198c0de-0000-7000-8000-000000000001","why":"moved away"}"#;
    assert!(matches!(PersonEvent::parse("person.deleted", body.as_bytes()), Ok(PersonEvent::Deleted(_))));
    assert!(matches!(PersonEvent::parse("person.married", body.as_bytes()), Ok(PersonEvent::Unknown)));
}

#[test]
fn an_error_never_quotes_the_body() {
    let body = r#"{"id":"0198c0de-0000-7000-8000-000000000001","cpf":"123.456.789-09","name":"Maria"}"#;
    let error = PersonEvent::parse("person.new", body.as_bytes()).unwrap_err().to_string();
    insta::assert_snapshot!(error, @"the body does not fit the type person.new: at line 1, column 67: a field is missing or of the wrong type");
}
