//! The sequencer's table, case by case, each under a consumer's name of its own in one database.

use std::{cell::Cell, sync::atomic::Ordering};

use inbox::{Envelope, Interrupted, Outcome, Sequencer};
use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable},
};
use sqlx::PgPool;

use crate::support::{Recorder, database, event, forked, tables, typed};

thread_local! {
    /// How many statements this thread, and so this test, has sent.
    static SENT: Cell<u64> = const { Cell::new(0) };
}

/// Counts what sqlx says it sends.
struct Statements;

impl tracing::Subscriber for Statements {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target() == "sqlx::query"
    }
    fn event(&self, _: &tracing::Event<'_>) {
        SENT.set(SENT.get() + 1);
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

struct Case {
    pool: PgPool,
    consumer: &'static str,
    handler: Recorder,
    sequencer: Sequencer<Recorder>,
}

impl Case {
    async fn new(consumer: &'static str) -> Self {
        let pool = database(consumer).await;
        let handler = Recorder::new(consumer);
        let sequencer = Sequencer::new(consumer, pool.clone(), handler.clone());
        Self { pool, consumer, handler, sequencer }
    }

    async fn apply(&self, messages: &[Envelope]) -> Outcome {
        self.sequencer.apply(messages).await.unwrap()
    }

    async fn interrupted(&self, messages: &[Envelope]) -> Interrupted {
        self.sequencer.apply(messages).await.unwrap_err()
    }

    async fn snapshot(&self) {
        insta::assert_snapshot!(self.consumer, tables(&self.pool, self.consumer).await);
    }
}

#[tokio::test]
async fn in_order_and_again() {
    let case = Case::new("in_order_and_again").await;
    let batch = [event("a", 1, ""), event("a", 2, ""), event("b", 1, ""), event("a", 2, "")];
    let first = case.apply(&batch).await;
    assert_eq!(first, Outcome { applied: 3, duplicates: 1, ..Outcome::default() });
    assert_eq!(case.apply(&batch).await, Outcome { duplicates: 4, ..Outcome::default() });
    assert_eq!(case.handler.commits.load(Ordering::Relaxed), 1, "nobody is woken for duplicates");

    // Another consumer in the same database has its own view.
    let other = Sequencer::new("other", case.pool.clone(), Recorder::new("other"));
    assert_eq!(other.apply(&batch).await.unwrap(), first);
    case.snapshot().await;
}

#[tokio::test]
async fn a_gap_holds_only_its_own_aggregate_until_it_is_filled() {
    let case = Case::new("gap").await;
    let mut strange = event("a", 3, "x\0y");
    let mut headers = strange.properties.headers().clone().unwrap();
    headers.insert("note".into(), AMQPValue::LongString("\0".into()));
    strange.properties = strange.properties.with_headers(headers);
    let outcome =
        case.apply(&[strange.clone(), event("a", 2, ""), event("b", 1, ""), event("a", 5, "")]).await;
    assert_eq!(outcome, Outcome { applied: 1, held: 3, ..Outcome::default() });
    assert_eq!(case.apply(&[strange]).await.duplicates, 1);
    insta::assert_snapshot!("gap_open", tables(&case.pool, case.consumer).await);
    assert_eq!(case.apply(&[event("a", 1, "")]).await.applied, 3);
    case.snapshot().await;
}

#[tokio::test]
async fn a_long_gap_is_drained_over_many_transactions_and_resumed_after_a_crash() {
    let case = Case::new("long_gap").await;
    let body = |v| if v == 150 { "transient" } else { "" };
    let held: Vec<Envelope> = (2..=200).rev().map(|v| event("a", v, body(v))).collect();
    assert_eq!(case.apply(&held).await.held, 199);
    // As if the process had died between two of the transactions: what was committed stays.
    let interrupted = case.interrupted(&[event("a", 1, "")]).await;
    assert_eq!(interrupted.reason, "another service is away");
    let version = "SELECT version FROM inbox.aggregate";
    let reached: i64 = sqlx::query_scalar(version).fetch_one(&case.pool).await.unwrap();
    assert!((64..150).contains(&reached), "{reached}");

    // The broker delivers the filler again, and it is a duplicate by now.
    case.handler.passed.store(true, Ordering::Relaxed);
    assert_eq!(case.apply(&[event("a", 1, "")]).await.duplicates, 1);
    let order: Vec<i64> =
        sqlx::query_scalar("SELECT version FROM applied ORDER BY n").fetch_all(&case.pool).await.unwrap();
    assert_eq!(order, (1..=200).collect::<Vec<_>>());
    let held: i64 =
        sqlx::query_scalar("SELECT count(*) FROM inbox.held").fetch_one(&case.pool).await.unwrap();
    assert_eq!(held, 0);
}

#[tokio::test]
async fn baselines_and_deletions_jump() {
    let case = Case::new("jumps").await;
    let flags = ["baseline"];
    let outcome = case
        .apply(&[
            event("a", 1, ""),
            event("a", 4, "dropped"),
            event("a", 8, "follows"),
            typed("thing.baseline", "a", 7, "", &flags),
            typed("thing.deleted", "b", 3, "", &[]),
            // Neither of these says what the aggregate looks like.
            typed("part.deleted", "c", 3, "", &[]),
            typed("thing.baseline", "d", 3, "", &["baseline", "erased"]),
            typed("thing.deleted", "e", 1, "", &["replayed"]),
        ])
        .await;
    assert_eq!(outcome, Outcome { applied: 5, held: 4, ..Outcome::default() });
    case.snapshot().await;
}

#[tokio::test]
async fn poison_is_held_and_costs_nobody_else() {
    let case = Case::new("poison").await;
    let batch = [
        event("a", 1, ""),
        event("b", 1, ""),
        event("a", 4, ""),
        event("a", 2, "poison"),
        event("a", 3, ""),
        event("b", 2, ""),
        event("c", 1, "panic"),
        event("d", 1, "divide"),
        event("e", 1, "deferred"),
        event("f", 1, "overlook"),
        event("b", 3, ""),
    ];
    let outcome = case.apply(&batch).await;
    assert_eq!(outcome, Outcome { applied: 4, held: 2, poison: 5, ..Outcome::default() });
    case.snapshot().await;

    // Deliveries are no attempts.
    let before = tables(&case.pool, case.consumer).await;
    assert_eq!(case.apply(&batch).await, Outcome { duplicates: 11, ..Outcome::default() });
    assert_eq!(case.apply(&[event("a", 2, "poison")]).await.duplicates, 1);
    assert_eq!(tables(&case.pool, case.consumer).await, before);

    // A complete state makes up for what was refused.
    let baseline = typed("thing.baseline", "a", 5, "", &["baseline"]);
    assert_eq!(case.apply(&[event("a", 7, ""), baseline]).await.applied, 1);
    insta::assert_snapshot!("poison_after_baseline", tables(&case.pool, case.consumer).await);
}

#[tokio::test]
async fn one_in_a_hundred_is_found_by_halving() {
    let case = Case::new("halving").await;
    let batch = |poison: usize| -> Vec<Envelope> {
        (0..100)
            .map(|n| event(&format!("{poison} {n}"), 1, if n == poison { "poison" } else { "" }))
            .collect()
    };
    // The whole, then two halves at each of seven levels.
    for poison in [0, 63, 99] {
        let before = case.handler.calls.load(Ordering::Relaxed);
        let outcome = case.apply(&batch(poison)).await;
        assert_eq!(outcome, Outcome { applied: 99, poison: 1, ..Outcome::default() });
        let calls = case.handler.calls.load(Ordering::Relaxed) - before;
        assert!(calls <= 1 + 2 * 7, "{calls} calls");
    }

    // Among events that were held before, too.
    let mut held: Vec<Envelope> =
        (2..=120).map(|v| event("held", v, if v == 100 { "poison" } else { "" })).collect();
    assert_eq!(case.apply(&held).await.held, 119);
    let before = case.handler.calls.load(Ordering::Relaxed);
    held.truncate(1);
    let outcome = case.apply(&[event("held", 1, "")]).await;
    assert_eq!(outcome, Outcome { applied: 99, poison: 1, ..Outcome::default() });
    let calls = case.handler.calls.load(Ordering::Relaxed) - before;
    assert!(calls <= 2 + 3 * 6, "{calls} calls");
}

#[tokio::test]
async fn a_batch_costs_as_many_statements_whatever_is_in_it() {
    let case = Case::new("statements").await;
    let messages = |count: usize| -> Vec<Envelope> {
        let mut all = Vec::new();
        for n in 0..count {
            let mut no_event = event("x", 1, &format!("{count} {n}"));
            no_event.properties = no_event.properties.with_message_id("none".into());
            let fork = forked(event(&format!("{count} a {n}"), 1, "other"), "a", 1, 60);
            all.push(event(&format!("{count} a {n}"), 1, ""));
            all.push(event(&format!("{count} b {n}"), 2, ""));
            all.push(event(&format!("{count} c {n}"), 3, ""));
            all.extend([fork, no_event]);
        }
        all
    };
    let filler = |count: usize| -> Vec<Envelope> {
        (0..count)
            .flat_map(|n| [event(&format!("{count} b {n}"), 1, ""), event(&format!("{count} c {n}"), 1, "")])
            .collect()
    };
    // Its source is known.
    case.apply(&[event("first", 1, "")]).await;
    tracing::subscriber::set_global_default(Statements).unwrap();
    let mut counts = Vec::new();
    for count in [1, 20] {
        for batch in [messages(count), filler(count)] {
            let before = SENT.get();
            let outcome = case.apply(&batch).await;
            // The handler's own are one for each event.
            counts.push(SENT.get() - before - outcome.applied);
        }
    }
    // Lock the source, insert and lock chains, read what is held, then versions, held and rejected, or what was held and its
    // end; commit.
    insta::assert_compact_debug_snapshot!(counts, @"[8, 8, 8, 8]");
}

#[tokio::test]
async fn poison_that_was_held_for_a_gap_stops_what_follows() {
    let case = Case::new("poison_in_gap").await;
    let held = [event("a", 2, ""), event("a", 3, "poison"), event("a", 4, "")];
    assert_eq!(case.apply(&held).await.held, 3);
    let outcome = case.apply(&[event("b", 1, ""), event("a", 1, "")]).await;
    assert_eq!(outcome, Outcome { applied: 3, poison: 1, ..Outcome::default() });
    case.snapshot().await;
}

#[tokio::test]
async fn a_contradiction_is_kept_and_not_applied() {
    let case = Case::new("fork").await;
    case.apply(&[event("a", 1, ""), event("a", 2, ""), event("a", 3, ""), event("a", 5, "")]).await;
    let at_the_same_version = forked(event("a", 3, "other"), "a", 3, 0);
    // Whenever they were made: a quick failover, and clocks that differ.
    let below = forked(event("a", 2, "other"), "a", 2, 0);
    let later = forked(event("a", 1, "other"), "a", 1, 5);
    let of_a_held_version = forked(event("a", 5, "other"), "a", 5, 0);
    let outcome = case
        .apply(&[
            at_the_same_version.clone(),
            below,
            of_a_held_version,
            later,
            event("a", 2, ""),
            event("a", 1, ""),
        ])
        .await;
    assert_eq!(outcome, Outcome { forks: 4, duplicates: 2, ..Outcome::default() });
    assert_eq!(case.apply(&[at_the_same_version]).await.forks, 1);
    case.snapshot().await;
}

#[tokio::test]
async fn what_passes_changes_nothing_and_is_delivered_again() {
    let case = Case::new("transient").await;
    let batch = [event("a", 1, ""), event("b", 1, "poison"), event("c", 1, "transient"), event("d", 1, "")];
    let interrupted = case.interrupted(&batch[2..]).await;
    assert_eq!(
        interrupted,
        Interrupted { settled: 0, reason: "another service is away".to_owned(), refused: false }
    );
    // One at a time because of the poison: what was committed by then may be acknowledged.
    assert_eq!(case.interrupted(&batch).await.settled, 2);
    insta::assert_snapshot!("transient_interrupted", tables(&case.pool, case.consumer).await);
    case.handler.passed.store(true, Ordering::Relaxed);
    assert_eq!(case.apply(&batch[2..]).await.applied, 2);
    case.snapshot().await;

    case.pool.close().await;
    assert!(!case.interrupted(&batch).await.refused);
}

#[tokio::test]
async fn what_is_no_event_is_kept_as_it_came() {
    let case = Case::new("malformed").await;
    let without = |name: &str| {
        let mut envelope = event("a", 1, "without");
        let mut headers = FieldTable::default();
        for (key, value) in envelope.properties.headers().as_ref().unwrap().inner() {
            if key.as_str() != name {
                headers.insert(key.clone(), value.clone());
            }
        }
        envelope.properties = envelope.properties.with_headers(headers);
        envelope
    };
    let with = |name: &str, value: AMQPValue| {
        let mut envelope = without(name);
        let mut headers = envelope.properties.headers().clone().unwrap();
        headers.insert(name.into(), value);
        envelope.properties = envelope.properties.with_headers(headers);
        envelope
    };
    let text = |text: &str| AMQPValue::LongString(text.into());
    let mut wrong = vec![
        Envelope {
            routing_key: "a.key".to_owned(),
            properties: BasicProperties::default(),
            body: b"\xff\x00\\".to_vec(),
        },
        without("aggregate_type"),
        without("aggregate_id"),
        without("aggregate_version"),
        with("aggregate_id", text("secret\0")),
        with("aggregate_id", text(&"secret".repeat(50))),
        with("aggregate_id", AMQPValue::LongString(b"\xff".to_vec().into())),
        with("aggregate_type", text("")),
        with("aggregate_type", AMQPValue::LongInt(7)),
        with("aggregate_version", AMQPValue::LongInt(0)),
        with("aggregate_version", text("secret")),
        with("aggregate_version", AMQPValue::Double(1.5)),
        with("baseline", text("true")),
    ];
    let mut no_uuid = event("a", 1, "");
    no_uuid.properties = no_uuid.properties.with_message_id("secret".into());
    let mut no_source = event("a", 1, "");
    no_source.properties = no_source.properties.with_app_id("\0".into());
    no_source.routing_key = "\0".to_owned();
    wrong.extend([no_uuid, no_source]);

    // A body of its own each: messages that agree in id, routing key and body are one.
    for (n, envelope) in wrong.iter_mut().enumerate().skip(1) {
        envelope.body = n.to_string().into_bytes();
    }
    let count = wrong.len() as u64;
    let good = event("a", 1, "good");
    wrong.push(good);
    assert_eq!(case.apply(&wrong).await, Outcome { rejected: count, applied: 1, ..Outcome::default() });
    assert_eq!(case.apply(&wrong[..1]).await.rejected, 1);
    case.snapshot().await;
    let details: Vec<String> =
        sqlx::query_scalar("SELECT detail FROM inbox.rejected").fetch_all(&case.pool).await.unwrap();
    assert!(details.iter().all(|detail| !detail.contains("secret")));
}

#[test]
fn headers_of_any_client_are_read() {
    let mut version = Vec::new();
    let values = [
        AMQPValue::ShortShortInt(7),
        AMQPValue::ShortShortUInt(7),
        AMQPValue::ShortInt(7),
        AMQPValue::ShortUInt(7),
        AMQPValue::LongInt(7),
        AMQPValue::LongUInt(7),
        AMQPValue::LongLongInt(7),
        AMQPValue::LongString("7".into()),
    ];
    for value in values {
        let mut envelope = event("a", 1, "");
        let mut headers = envelope.properties.headers().clone().unwrap();
        headers.insert("aggregate_version".into(), value);
        headers.insert("traceparent".into(), AMQPValue::LongString("00-1-2-01".into()));
        headers.insert("x-delivery-count".into(), AMQPValue::LongLongInt(3));
        headers.insert("erased".into(), AMQPValue::Boolean(true));
        envelope.properties = envelope.properties.with_headers(headers);
        let event = envelope.event().unwrap();
        assert_eq!(event.traceparent(), Some("00-1-2-01"));
        assert!(event.is_erased() && !event.is_baseline() && !event.headers.contains_key("x-delivery-count"));
        version.push(event.version);
    }
    assert_eq!(version, [7; 8]);
}
