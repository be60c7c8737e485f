//! Two histories under one source, found by the ids of events.

use inbox::{Envelope, Outcome, Redrive, held::Filter};
use lapin::types::{AMQPValue, FieldTable};
use uuid::Uuid;

use crate::{
    incarnations::{self, Case, baseline},
    support::{event, forked, id, typed},
};

/// The receiver keeps the last sixteen ids of each aggregate.
#[tokio::test]
async fn a_fork_is_found_by_the_ids_that_were_applied() {
    let case = Case::new("incarnation_forks").await;
    let all: Vec<Envelope> = (1..=20).map(|version| event("a", version, "1")).collect();
    case.apply(&all[..7]).await;
    case.apply(&all[7..]).await;
    let other: Vec<Envelope> = (1..=20).map(|v| forked(event("a", v, "other"), "a", v, 0)).collect();
    // Those of versions 1 to 4 are not known any more.
    assert_eq!(case.apply(&other).await, Outcome { duplicates: 4, forks: 16, ..Outcome::default() });
    assert_eq!(case.apply(&all).await, Outcome { duplicates: 20, ..Outcome::default() });
    let bytes = "SELECT octet_length(recent) FROM inbox.aggregate";
    assert_eq!(sqlx::query_scalar::<_, i32>(bytes).fetch_one(&case.pool).await.unwrap(), 64);

    // What a baseline jumped over was never seen here.
    case.apply(&[baseline("a", 25, "1"), event("a", 26, "1")]).await;
    let other = [20, 24, 25, 26].map(|v| forked(event("a", v, "other"), "a", v, 0));
    assert_eq!(case.apply(&other).await, Outcome { duplicates: 2, forks: 2, ..Outcome::default() });
}

/// The same message, with the id of the event before it.
pub(crate) fn after(mut envelope: Envelope, previous: AMQPValue) -> Envelope {
    let mut headers = envelope.properties.headers().clone().unwrap();
    headers.insert("previous_id".into(), previous);
    envelope.properties = envelope.properties.with_headers(headers);
    envelope
}

fn named(id: Uuid) -> AMQPValue {
    AMQPValue::LongString(id.to_string().into())
}

/// An event of the chain `a`, which names the one before it.
fn next(version: i64) -> Envelope {
    after(event("a", version, "1"), named(id("a", version - 1, 0)))
}

/// One that follows an event of another history.
fn astray(version: i64) -> Envelope {
    let other = forked(event("a", version, "666"), "a", version, 0);
    after(other, named(id("b", version - 1, 0)))
}

/// The events that were rejected, and why.
async fn rejected(case: &Case) -> Vec<String> {
    // As text: the server cannot decode a NUL.
    let sql = r#"SELECT concat_ws(' ', reason, substring(properties::text FROM '"aggregate_version":(\d+)'), times, detail)
               FROM inbox.rejected ORDER BY id"#;
    sqlx::query_scalar(sql).fetch_all(&case.pool).await.unwrap()
}

/// How far the chain `a` is, and what is held of it.
async fn stands(case: &Case) -> String {
    let sql = "SELECT concat_ws(' ', version, 'held', (SELECT string_agg(concat_ws(' ', h.version, h.reason), ', ' ORDER BY h.version)
                                                       FROM inbox.held h WHERE h.aggregate_id = 'a'))
               FROM inbox.aggregate WHERE aggregate_id = 'a'";
    sqlx::query_scalar(sql).fetch_one(&case.pool).await.unwrap()
}

const FORK: &str = "it follows another event than the one that was applied";

/// The version fits, and the history does not: an event was lost and its version used again.
#[tokio::test]
async fn an_event_that_follows_another_one_is_a_fork() {
    let case = Case::new("fork_live").await;
    assert_eq!(case.apply(&[next(1), next(2)]).await.applied, 2);
    assert_eq!(case.apply(&[astray(3), next(4)]).await, Outcome { forks: 1, held: 1, ..Outcome::default() });
    assert_eq!(case.apply(&[astray(3)]).await.forks, 1, "a redelivery is counted");
    assert_eq!(rejected(&case).await, [format!("fork 3 2 {FORK}")]);
    assert_eq!(stands(&case).await, "2 held 4 gap");
    // The one that does follow.
    assert_eq!(case.apply(&[next(3)]).await.applied, 2);
    assert_eq!(stands(&case).await, "4 held");
    // Or the whole state.
    assert_eq!(case.apply(&[astray(5)]).await.forks, 1);
    let whole = after(baseline("a", 6, "40"), named(id("b", 5, 0)));
    assert_eq!(case.apply(&[whole]).await.applied, 1);
    assert_eq!(case.state().await, [("a".to_owned(), 40)]);
}

/// One batch, several transactions, and a redrive take held events.
#[tokio::test]
async fn a_held_event_that_follows_another_one_is_a_fork_when_its_turn_comes() {
    let case = Case::new("fork_held").await;
    case.apply(&[next(1)]).await;
    // Held and freed in one transaction.
    let outcome = case.apply(&[astray(3), next(4), next(2)]).await;
    assert_eq!(outcome, Outcome { applied: 1, held: 1, forks: 1, ..Outcome::default() });
    assert_eq!(stands(&case).await, "2 held 4 gap");
    assert_eq!(rejected(&case).await, [format!("fork 3 1 {FORK}")]);
    // A delivery of the same event is the same fork.
    assert_eq!(case.apply(&[astray(3)]).await.forks, 1);
    assert_eq!(rejected(&case).await, [format!("fork 3 2 {FORK}")]);

    // Stored in between.
    assert_eq!(case.apply(&[astray(5), next(6)]).await.held, 2);
    let outcome = case.apply(&[next(3), event("b", 1, "1")]).await;
    assert_eq!(outcome, Outcome { applied: 3, forks: 1, ..Outcome::default() });
    assert_eq!(stands(&case).await, "4 held 6 gap");
    assert_eq!(rejected(&case).await, [format!("fork 3 2 {FORK}"), format!("fork 5 1 {FORK}")]);
    let stored: Vec<String> = sqlx::query_scalar(
        "SELECT concat_ws(' ', routing_key, convert_from(body, 'UTF8'), bytes, about @> ARRAY['a'],
                                             about @> ARRAY[properties->>'message_id'], properties->>'app_id',
                                             properties->>'timestamp', properties->'headers'->>'aggregate_id')
                            FROM inbox.rejected ORDER BY id",
    )
    .fetch_all(&case.pool)
    .await
    .unwrap();
    assert_eq!(stored, ["thing.changed 666 3 t t things 1767225600 a"; 2], "erasure finds both");
    assert_eq!(case.apply(&[next(5)]).await.applied, 2);

    // Beside a text that the server cannot decode, and one that only looks like the name.
    let mut odd = after(astray(8), named(id("b", 7, 0)));
    let mut headers = odd.properties.headers().clone().unwrap();
    headers.insert("note".into(), AMQPValue::LongString(r#"\u0000 "previous_id":"#.into()));
    headers.insert("nul".into(), AMQPValue::LongString("a\0b\\".into()));
    odd.properties = odd.properties.with_headers(headers);
    assert_eq!(case.apply(&[odd, next(9)]).await.held, 2);
    assert_eq!(case.apply(&[next(7)]).await, Outcome { applied: 1, forks: 1, ..Outcome::default() });
    assert_eq!(case.apply(&[next(8)]).await.applied, 2);
    assert_eq!(stands(&case).await, "9 held");

    // Left by a process that died between two transactions.
    case.apply(&[astray(11), next(12)]).await;
    let put = "UPDATE inbox.held SET version = version - 1 WHERE aggregate_id = 'a'";
    sqlx::query(put).execute(&case.pool).await.unwrap();
    let every = Redrive { filter: Filter::default(), batch: 64, dry_run: true };
    let would = case.sequencer.redrive(&every, |_| ()).await.unwrap();
    assert_eq!((would.applied, would.refused, would.errors.get(FORK), would.held), (0, 1, Some(&1), 1));
    assert_eq!(stands(&case).await, "9 held 10 gap, 11 gap");
    let done = case.sequencer.redrive(&Redrive { dry_run: false, ..every }, |_| ()).await.unwrap();
    assert_eq!((done.applied, done.refused, done.errors.get(FORK), done.held), (0, 1, Some(&1), 1));
    assert_eq!(stands(&case).await, "9 held 11 gap");
    assert_eq!(rejected(&case).await.len(), 4);
}

/// What replaces the state follows nothing, and what comes after it follows it.
#[tokio::test]
async fn after_a_baseline_the_baseline_is_the_event_before() {
    let case = Case::new("fork_baseline").await;
    case.apply(&[next(1), next(2)]).await;
    assert_eq!(case.apply(&[after(baseline("a", 5, "7"), named(id("b", 4, 0)))]).await.applied, 1);
    assert_eq!(case.apply(&[astray(6)]).await.forks, 1);
    assert_eq!(case.apply(&[next(6)]).await.applied, 1);
    // With the very next version, too.
    let deleted = after(typed("thing.deleted", "a", 7, "delete", &[]), named(id("b", 6, 0)));
    assert_eq!(case.apply(&[deleted]).await, Outcome { applied: 1, ..Outcome::default() });
    assert_eq!(case.apply(&[astray(8)]).await.forks, 1);
    assert_eq!(case.apply(&[next(8)]).await.applied, 1);
    // Erased, it says nothing of the state, so it has to follow.
    let erased = after(typed("thing.baseline", "a", 9, "", &["baseline", "erased"]), named(id("b", 8, 0)));
    assert_eq!(case.apply(&[erased]).await.forks, 1);
}

/// A source that does not name the event before, or names none, proves nothing.
#[tokio::test]
async fn a_missing_or_wrong_name_is_no_evidence() {
    let case = Case::new("fork_unknown").await;
    case.apply(&[event("a", 1, "1"), event("a", 2, "1")]).await;
    let text = |text: &str| AMQPValue::LongString(text.into());
    let all = [
        text("no id"),
        text(""),
        text(&Uuid::nil().to_string()),
        AMQPValue::LongString(vec![0xff; 16].into()),
        AMQPValue::LongLongInt(7),
        AMQPValue::Boolean(true),
        AMQPValue::Void,
        AMQPValue::FieldTable(FieldTable::default()),
    ];
    let mut version = 2;
    for value in all {
        version += 1;
        let outcome = case.apply(&[after(event("a", version, "1"), value)]).await;
        assert_eq!(outcome, Outcome { applied: 1, ..Outcome::default() }, "version {version}");
    }
    // A client may write it as bytes, or in capitals.
    let before = id("a", version, 0).to_string();
    let bytes = AMQPValue::ByteArray(before.to_ascii_uppercase().into_bytes().into());
    assert_eq!(case.apply(&[after(event("a", version + 1, "1"), bytes)]).await.applied, 1);
    let bytes = AMQPValue::ByteArray(id("b", 1, 0).to_string().into_bytes().into());
    assert_eq!(case.apply(&[after(event("a", version + 2, "1"), bytes)]).await.forks, 1);
}

/// A chain that begins in a new incarnation may name an event of the earlier one, and then continues with its own.
#[tokio::test]
async fn a_new_incarnation_begins_without_an_event_before() {
    let case = Case::new("fork_incarnation").await;
    case.apply(&[next(1), next(2)]).await;
    let first = incarnations::new(typed("thing.new", "a", 1, "5", &["chain_start"]));
    let first_id = first.properties.message_id().as_ref().unwrap().as_str().parse().unwrap();
    let first = after(first, named(id("a", 2, 0)));
    assert_eq!(case.apply(&[first]).await, Outcome { applied: 1, ..Outcome::default() });
    let fork = incarnations::new(after(event("a", 2, "666"), named(id("a", 1, 0))));
    assert_eq!(case.apply(&[fork]).await.forks, 1);
    let second = incarnations::new(after(event("a", 2, "1"), named(first_id)));
    assert_eq!(case.apply(&[second]).await.applied, 1);
}
