//! What is held or rejected of an aggregate loses its content when the aggregate ends.

use std::sync::{Arc, atomic::Ordering};

use inbox::{Envelope, Redrive, Sequencer, held::Filter};
use lapin::BasicProperties;
use sqlx::PgPool;

use crate::support::{Recorder, database, event, forked, in_incarnation, tables, typed};

const ENDED: &str = "018f0000-0000-7000-8000-00000000000a";
const OTHER: &str = "018f0000-0000-7000-8000-00000000000b";

/// A message of another kind, such as somebody's typing error.
fn no_event(body: &str) -> Envelope {
    Envelope {
        routing_key: "thing.changed".to_owned(),
        properties: BasicProperties::default().with_message_id(body.get(..200).unwrap_or(body).into()),
        body: body.as_bytes().to_vec(),
    }
}

/// How often a person's name stands anywhere in the inbox, as text or as bytes.
async fn traces(pool: &PgPool, name: &str) -> i64 {
    sqlx::query_scalar(
        "SELECT count(*) FROM (SELECT h::text || encode(h.payload, 'escape') FROM inbox.held h
                               UNION ALL SELECT r::text || encode(r.body, 'escape') FROM inbox.rejected r
                               UNION ALL SELECT s::text FROM inbox.skipped s) AS all_of_it (row)
         WHERE row LIKE '%' || $1 || '%'",
    )
    .bind(name)
    .fetch_one(pool)
    .await
    .unwrap()
}

#[tokio::test]
async fn an_end_erases_what_any_consumer_holds_or_rejected_of_it() {
    let pool = database("erasure").await;
    let sequencer = Sequencer::new("erasure", pool.clone(), Recorder::new("erasure"));
    // Another consumer, which nobody runs any more: it will never hear of the end.
    let replaced = Sequencer::new("replaced", pool.clone(), Recorder::new("replaced"));
    let upper = ENDED.to_ascii_uppercase();
    let in_properties = Envelope { body: b"Ada".to_vec(), ..no_event(ENDED) };
    let messages = [
        event(ENDED, 1, ""),
        event(ENDED, 2, "poison"),
        event(ENDED, 3, "Ada, behind it"),
        event(ENDED, 5, "Ada, after a gap"),
        event(ENDED, 11, "Ida, who came back"),
        forked(event(ENDED, 1, "Ada, in another history"), ENDED, 1, 60),
        no_event(&format!("{{\"about\": \"{upper}\", \"name\": \"Ada\"}}")),
        in_properties,
        event(OTHER, 2, "Grace, of somebody else"),
        no_event(&format!("{{\"about\": \"{OTHER}\", \"name\": \"Grace\"}}")),
    ];
    sequencer.apply(&messages).await.unwrap();
    replaced.apply(&messages).await.unwrap();
    // A consumer that holds something of the time before a restore, and does not run any more.
    let stopped = Sequencer::new("stopped", pool.clone(), Recorder::new("stopped"));
    let early = in_incarnation(event(ENDED, 12, "Ada, of the second incarnation"), 2, Some(1));
    stopped.apply(&[early]).await.unwrap();
    assert!(traces(&pool, "Ada").await > 0);
    let of_others = traces(&pool, "Grace").await;

    sequencer.apply(&[typed("thing.deleted", ENDED, 9, "delete", &[])]).await.unwrap();
    let end = in_incarnation(typed("thing.deleted", ENDED, 9, "delete", &[]), 3, Some(1));
    sequencer.apply(&[end]).await.unwrap();

    assert_eq!(traces(&pool, "Ada").await, 0);
    assert_eq!(traces(&pool, "Grace").await, of_others, "others keep what they have");
    insta::assert_snapshot!("erasure", tables(&pool, "erasure").await);
    insta::assert_snapshot!("erasure_replaced", tables(&pool, "replaced").await);
}

#[tokio::test]
async fn an_end_that_was_held_erases_when_it_is_redriven() {
    let pool = database("erasure_redriven").await;
    let handler = Recorder::new("redriven");
    let passed = Arc::clone(&handler.passed);
    let sequencer = Sequencer::new("redriven", pool.clone(), handler);
    let replaced = Sequencer::new("replaced", pool.clone(), Recorder::new("replaced"));
    replaced.apply(&[event(ENDED, 2, "Ada")]).await.unwrap();
    sequencer.apply(&[typed("thing.deleted", ENDED, 3, "broken", &[])]).await.unwrap();
    assert_eq!(traces(&pool, "Ada").await, 1, "an end that was refused is none");

    passed.store(true, Ordering::Relaxed);
    let redrive = Redrive { filter: Filter::default(), batch: 64, dry_run: false };
    assert_eq!(sequencer.redrive(&redrive, |_| ()).await.unwrap().applied, 1);
    assert_eq!(traces(&pool, "Ada").await, 0);
}

#[tokio::test]
async fn two_consumers_that_hear_of_the_same_ends_do_not_wait_for_each_other_in_a_circle() {
    let pool = database("erasure_circle").await;
    let [one, two] = ["one", "two"].map(|name| Sequencer::new(name, pool.clone(), Recorder::new(name)));
    for round in 0..10 {
        let of = |n: u32| format!("{round}-{n}");
        let held: Vec<_> = (0..50).map(|n| event(&of(n), 2, "Ada")).collect();
        one.apply(&held).await.unwrap();
        two.apply(&held).await.unwrap();
        let ends: Vec<_> = (0..50).map(|n| typed("thing.deleted", &of(n), 3, "", &[])).collect();
        let (a, b) = tokio::join!(one.apply(&ends), two.apply(&ends));
        assert_eq!((a.unwrap().applied, b.unwrap().applied), (50, 50));
    }
    assert_eq!(traces(&pool, "Ada").await, 0);
}
