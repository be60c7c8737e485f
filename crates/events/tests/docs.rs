//! The samples in `docs/events.md` are what the types here read and write, field for field.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

use events::{Deleted, PersonEvent, Score, ScoreBaseline};
use serde_json::Value;

const DOCUMENT: &str = include_str!("../../../docs/events.md");

/// Each sample with what its fence says after `json`: the type, and perhaps `erased`.
fn samples() -> Vec<(&'static str, &'static str)> {
    let fences = DOCUMENT.split("```json ").skip(1);
    fences
        .map(|rest| {
            let (label, rest) = rest.split_once('\n').unwrap();
            (label, rest.split("```").next().unwrap().trim())
        })
        .collect()
}

#[test]
fn every_sample_is_what_the_types_write() {
    fn written(body: impl serde::Serialize) -> String {
        serde_json::to_string(&body).unwrap()
    }
    let mut shapes = Vec::new();
    for (label, sample) in samples() {
        let type_ = label.split(' ').next().unwrap();
        let again = if type_ == events::SCORE_DELETED {
            written(serde_json::from_str::<Deleted>(sample).unwrap())
        } else if type_ == events::SCORE_BASELINE {
            written(serde_json::from_str::<ScoreBaseline>(sample).unwrap())
        } else if type_.starts_with("score.") {
            written(serde_json::from_str::<Score>(sample).unwrap())
        } else {
            match PersonEvent::parse(type_, sample.as_bytes()).unwrap() {
                PersonEvent::New(body) | PersonEvent::Changed(body) => written(body),
                PersonEvent::Deleted(body) => written(body),
                PersonEvent::Baseline(body) => written(body),
                PersonEvent::ItemNew(_, body)
                | PersonEvent::ItemChanged(_, body)
                | PersonEvent::ItemDeleted(_, body) => written(body),
                PersonEvent::Erased => sample.to_owned(),
                PersonEvent::Unknown => panic!("{type_} is no type"),
            }
        };
        // `Z` and `+00:00` are one instant; the samples spell it the second way, as PostgreSQL does.
        assert_eq!(again.replace("Z\"", "+00:00\""), sample, "{label}");
        let fields: Value = serde_json::from_str(sample).unwrap();
        shapes.push(format!("{label}: {} fields", fields.as_object().unwrap().len()));
    }
    insta::assert_snapshot!(shapes.join("\n"), @r"
    person.new: 7 fields
    income.new: 6 fields
    debt.new: 5 fields
    score.new: 8 fields
    person.deleted: 1 fields
    score.deleted: 1 fields
    person.baseline: 10 fields
    score.baseline: 4 fields
    person.changed erased: 2 fields
    ");
}

#[test]
fn names_are_the_ones_of_the_code() {
    for name in [events::EXCHANGE, events::EXCHANGE_BY_AGGREGATE] {
        assert!(DOCUMENT.contains(&format!("| `{name}` |")), "{name} is missing");
    }
    for name in [events::SCORE_NEW, events::AGGREGATE_PERSON, events::AGGREGATE_SCORE] {
        assert!(DOCUMENT.contains(&format!("`{name}`")), "{name} is missing");
    }
}
