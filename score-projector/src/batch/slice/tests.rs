use events::PersonEvent;
use serde_json::{Value, json};

use super::*;

fn id(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

fn person(n: u128, cpf: u64) -> Value {
    json!({"id": id(n), "cpf": cpf, "name": "abc", "address": null,
           "date_of_birth": "2019-06-15T22:23:55Z", "created_at": "2026-01-01T00:00:00Z"})
}

fn item(n: u128, of: u128, value: u64) -> Value {
    json!({"id": id(n), "person_id": id(of), "type": "x", "value": value,
           "created_at": "2026-01-01T00:00:01Z", "person": person(of, 1)})
}

fn apply(slice: &mut Slice, type_: &str, of: u128, version: i64, body: &Value) -> Result<(), Refusal> {
    let body = PersonEvent::parse(type_, body.to_string().as_bytes()).unwrap();
    slice.apply(&Cause { person: id(of), version, trace: None, begins_anew: false, body })
}

/// As the first event of a new incarnation.
fn begin_anew(slice: &mut Slice, type_: &str, of: u128, version: i64, body: &Value) -> Result<(), Refusal> {
    let body = PersonEvent::parse(type_, body.to_string().as_bytes()).unwrap();
    slice.apply(&Cause { person: id(of), version, trace: None, begins_anew: true, body })
}

/// What is published: type, entry, total.
fn published(slice: &mut Slice) -> Vec<String> {
    let line = |event: ScoreEvent| {
        let body: Value = serde_json::from_str(event.payload.get()).unwrap();
        format!("{} {} {} of {}", event.type_, body["score"], body["total"], event.person.as_u128())
    };
    slice.take_events().into_iter().map(line).collect()
}

#[test]
fn an_item_and_its_end_are_published_with_the_total_after_each() {
    let mut slice = Slice::default();
    apply(&mut slice, "person.new", 1, 1, &person(1, 1)).unwrap();
    apply(&mut slice, "asset.new", 1, 2, &item(10, 1, 100)).unwrap();
    apply(&mut slice, "debt.new", 1, 3, &item(11, 1, 40)).unwrap();
    apply(&mut slice, "asset.deleted", 1, 4, &item(10, 1, 100)).unwrap();
    let expected = ["score.new 5 5 of 1", "score.new -2 3 of 1", "score.changed 0 -2 of 1"];
    assert_eq!(published(&mut slice), expected);
    assert_eq!(slice.person(id(1)).unwrap().version, 4);
}

#[test]
fn nobody_is_revived_and_an_item_keeps_its_person() {
    let mut slice = Slice::default();
    for n in [1, 2] {
        apply(&mut slice, "person.new", n, 1, &person(n, 1)).unwrap();
    }
    apply(&mut slice, "asset.new", 1, 2, &item(10, 1, 100)).unwrap();
    let taken = apply(&mut slice, "asset.new", 2, 2, &item(10, 2, 100));
    assert_eq!(taken, Err(Refusal::ItemOfAnother));
    let changed = apply(&mut slice, "asset.changed", 2, 2, &item(10, 2, 100));
    assert_eq!(changed, Err(Refusal::ItemUnknown));
    apply(&mut slice, "person.deleted", 1, 3, &json!({"id": id(1)})).unwrap();
    let late = apply(&mut slice, "asset.new", 1, 4, &item(11, 1, 100));
    assert_eq!(late, Err(Refusal::PersonUnknown));
    // Their items are gone with them, and were never written.
    apply(&mut slice, "asset.new", 2, 2, &item(10, 2, 100)).unwrap();
    assert_eq!(slice.persons_gone(), [id(1)]);
    assert_eq!(slice.persons_written().iter().map(|person| person.id).collect::<Vec<_>>(), [id(2)]);
    assert_eq!(slice.entries_written().iter().map(|(owner, _)| *owner).collect::<Vec<_>>(), [id(2)]);
}

/// A key that recurs after a restore: the read model knows the person of the lost history.
#[test]
fn a_new_person_replaces_one_of_a_lost_history() {
    let mut slice = Slice::default();
    apply(&mut slice, "person.new", 1, 1, &person(1, 1)).unwrap();
    apply(&mut slice, "asset.new", 1, 2, &item(10, 1, 100)).unwrap();
    apply(&mut slice, "debt.new", 1, 3, &item(11, 1, 40)).unwrap();
    published(&mut slice);

    begin_anew(&mut slice, "person.new", 1, 1, &person(1, 2)).unwrap();
    assert_eq!(published(&mut slice), ["score.changed 0 -2 of 1", "score.changed 0 0 of 1"]);
    let now = slice.person(id(1)).unwrap();
    assert_eq!((now.version, now.cpf.get(), now.total), (1, 2, Decimal::ZERO));
    assert_eq!(slice.persons_gone(), [id(1)], "the row is written anew");
    assert!(slice.entries_written().is_empty());
    apply(&mut slice, "asset.new", 1, 2, &item(10, 1, 60)).unwrap();
    assert_eq!(published(&mut slice), ["score.new 3 3 of 1"]);
}

#[test]
fn a_lost_history_ends_whatever_begins_the_chain_anew() {
    for (type_, body) in [("person.deleted", json!({"id": id(1)})), ("person.married", json!({}))] {
        let mut slice = Slice::default();
        apply(&mut slice, "person.new", 1, 1, &person(1, 1)).unwrap();
        apply(&mut slice, "asset.new", 1, 2, &item(10, 1, 100)).unwrap();
        published(&mut slice);
        begin_anew(&mut slice, type_, 1, 1, &body).unwrap();
        assert_eq!(slice.take_events().len(), 1, "the end of the score, by {type_}");
        assert!(slice.person(id(1)).is_none(), "{type_}");
    }
    // An event that needs a person finds none.
    let mut slice = Slice::default();
    apply(&mut slice, "person.new", 1, 1, &person(1, 1)).unwrap();
    let refused = begin_anew(&mut slice, "asset.new", 1, 1, &item(10, 1, 100));
    assert_eq!(refused, Err(Refusal::PersonUnknown));
}
