//! Nothing that a sender makes grows without a limit, and a limit that is reached shows.

use inbox::{Envelope, Outcome, Sequencer, held, rejected};
use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldArray, FieldTable},
};
use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    consumer::World,
    support::{DEADLINE, Recorder, database, event, tables, typed, until},
};

/// A message without properties.
fn no_event(body: Vec<u8>) -> Envelope {
    Envelope { routing_key: "thing.changed".to_owned(), properties: BasicProperties::default(), body }
}

/// UUIDs, one after the other.
fn uuids(count: u128) -> Vec<u8> {
    (0..count).flat_map(|n| format!("{} ", Uuid::from_u128(n)).into_bytes()).collect()
}

/// Of what was rejected: how large it was, how much of it is kept, and how many names.
async fn kept(pool: &PgPool) -> Vec<(String, i64, i32, i32, i64)> {
    sqlx::query_as(
        "SELECT detail, bytes, octet_length(body), cardinality(about), times FROM inbox.rejected
         ORDER BY 2, 5, 1, 3, 4",
    )
    .fetch_all(pool)
    .await
    .unwrap()
}

#[tokio::test]
async fn of_a_rejected_message_a_bounded_part_is_kept_and_nothing_that_cannot_be_erased() {
    let pool = database("limits_kept").await;
    let sequencer = Sequencer::new("limits", pool.clone(), Recorder::new("limits"));
    let mut large_event = event("large", 1, "1");
    large_event.body = vec![b'1'; (16 << 20) + 1];
    let mut many_headers = no_event(b"x".to_vec());
    let mut table = FieldTable::default();
    for n in 0..3_000u128 {
        table.insert(Uuid::from_u128(n).to_string().into(), AMQPValue::LongString("x".repeat(20).into()));
    }
    many_headers.properties = many_headers.properties.with_headers(table);
    let messages = [
        no_event(uuids(64 * 1024 * 1024 / 37)),
        no_event(vec![b'x'; 8 << 20]),
        no_event(uuids(900)),
        no_event(b"short".to_vec()),
        large_event,
        many_headers,
        event("a", 1, "1"),
    ];
    let mut outcome = sequencer.apply(&messages).await.unwrap();
    // Each is known again by the whole of it.
    outcome += sequencer.apply(&messages[..2]).await.unwrap();
    let almost = no_event([vec![b'x'; (8 << 20) - 1], b"y".to_vec()].concat());
    outcome += sequencer.apply(&[almost]).await.unwrap();
    assert_eq!(outcome, Outcome { applied: 1, rejected: 9, ..Outcome::default() });
    // How much of each, and how many names of it, decides how long its statement takes. Without a bound on the names, the
    // statement came to its timeout, and was retried for ever.
    insta::assert_debug_snapshot!(kept(&pool).await);

    // A name in what is kept is found, and what was cut off is not there to be found.
    let named: Vec<String> =
        sqlx::query_scalar("SELECT unnest(about) FROM inbox.rejected WHERE bytes > 60000000")
            .fetch_all(&pool)
            .await
            .unwrap();
    let (number, body): (i64, Vec<u8>) =
        sqlx::query_as("SELECT id, body FROM inbox.rejected WHERE bytes > 60000000")
            .fetch_one(&pool)
            .await
            .unwrap();
    let stored = String::from_utf8(body).unwrap();
    let whole: Vec<&str> = stored.split(' ').filter(|word| word.len() == 36).collect();
    assert!(whole.iter().all(|id| named.iter().any(|name| name == id)), "{} of {}", named.len(), whole.len());

    let mut conn = pool.acquire().await.unwrap();
    // As a program of before this limit stores it, headers as deep as they came included.
    let older: i64 = sqlx::query_scalar(
        "INSERT INTO inbox.rejected (consumer, digest, reason, detail, routing_key, properties, body)
         VALUES ('limits', 'older', 'malformed', 'older', '', $1::json, 'whole') RETURNING id",
    )
    .bind(deep())
    .fetch_one(&pool)
    .await
    .unwrap();
    let shown = rejected::message(&mut conn, "limits", older, false).await.unwrap().unwrap();
    assert_eq!((shown.bytes, shown.kept_bytes, shown.properties.is_null()), (5, 5, true));
    let shown = rejected::message(&mut conn, "limits", number, false).await.unwrap().unwrap();
    let long = (i64::try_from(messages[0].body.len()).unwrap(), i32::try_from(stored.len()).unwrap());
    assert_eq!((shown.bytes, shown.kept_bytes), long);
}

#[tokio::test]
async fn what_is_rejected_beyond_the_limit_is_counted_and_what_was_kept_before_stays() {
    let world = World::new("limits_rejected").await;
    let mut running =
        world.start_with(Recorder::new("things"), |config| inbox::Config { max_rejected: 3, ..config });
    running.until_consuming().await;
    let reject = async |n: u32| {
        let mut message = event("a", 1, &n.to_string());
        message.properties = message.properties.with_message_id(format!("none {n}").into());
        world.publish(message).await;
    };
    for n in 0..6 {
        reject(n).await;
    }
    // Known before: it is one more of the same.
    reject(1).await;
    // A fork is of another reason, and has a limit of its own.
    world.publish(event("b", 1, "1")).await;
    world.publish(crate::support::forked(event("b", 1, "1"), "b", 1, 60)).await;
    world.publish(event("c", 1, "1")).await;
    world.until_version("c", 1).await;
    until("all were rejected", async || {
        let times: Option<i64> = sqlx::query_scalar("SELECT sum(times)::bigint FROM inbox.rejected")
            .fetch_one(&world.pool)
            .await
            .unwrap();
        times == Some(8)
    })
    .await;
    let rows: Vec<(String, String, i64)> =
        sqlx::query_as("SELECT reason, detail, times FROM inbox.rejected ORDER BY reason, detail, times")
            .fetch_all(&world.pool)
            .await
            .unwrap();
    insta::assert_debug_snapshot!(rows);

    let limits = running.status.wait_for(|status| status.limits.is_some());
    let limits = tokio::time::timeout(DEADLINE, limits).await.unwrap().unwrap().limits.clone();
    insta::assert_snapshot!(limits.unwrap());
    assert!(running.status.borrow().waiting().is_empty(), "it goes on");

    // Whoever lets them go is believed.
    let mut conn = world.pool.acquire().await.unwrap();
    rejected::drop(&mut conn, "things", &rejected::Filter::default()).await.unwrap();
    let gone = running.status.wait_for(|status| status.limits.is_none());
    tokio::time::timeout(DEADLINE, gone).await.unwrap().unwrap();
    reject(9).await;
    until("it is kept again", async || kept(&world.pool).await.len() == 1).await;
    running.stop().await;
}

#[tokio::test]
async fn events_that_wait_for_missing_versions_are_limited_and_the_others_are_applied() {
    let world = World::new("limits_gaps").await;
    let mut running =
        world.start_with(Recorder::new("things"), |config| inbox::Config { max_gaps: 3, ..config });
    running.until_consuming().await;
    for aggregate in ["g1", "g2", "g3"] {
        world.publish(event(aggregate, 2, "1")).await;
    }
    let reached = running.status.wait_for(|status| status.limits.is_some());
    let limits = tokio::time::timeout(DEADLINE, reached).await.unwrap().unwrap().limits.clone();
    insta::assert_snapshot!(limits.unwrap());

    // Unknown and too early: nothing of them is stored but that they came.
    world.publish(event("g4", 2, "1")).await;
    world.publish(event("g1", 4, "1")).await;
    // These are applied, the first ones of unknown aggregates included.
    world.publish(event("g1", 1, "1")).await;
    world.publish(event("new", 1, "1")).await;
    world.publish(typed("thing.changed", "baseline", 7, "1", &["baseline"])).await;
    world.until_version("baseline", 7).await;
    world.until_version("g1", 2).await;
    let text = tables(&world.pool, "things").await;
    insta::assert_snapshot!(text);
    running.stop().await;
}

#[tokio::test]
async fn the_last_version_of_all_breaks_nothing() {
    let pool = database("limits_version").await;
    let sequencer = Sequencer::new("limits", pool.clone(), Recorder::new("limits"));
    let last = i64::MAX;
    let messages = [
        event("a", last, "1"),
        typed("thing.changed", "b", last - 1, "1", &["baseline"]),
        event("b", last, "1"),
        event("c", last - 1, "1"),
        event("c", 1, "1"),
        typed("thing.deleted", "d", last - 1, "1", &[]),
        event("d", 1, "1"),
        event("d", last - 2, "1"),
        typed("thing.changed", "e", last - 1, "1", &["baseline"]),
    ];
    let outcome = sequencer.apply(&messages).await.unwrap();
    assert_eq!(outcome, Outcome { applied: 4, held: 1, rejected: 2, duplicates: 2, ..Outcome::default() });
    for message in &messages {
        sequencer.apply(std::slice::from_ref(message)).await.unwrap();
        sequencer.attempt(message).await.unwrap();
    }
    // As an older release may have left it.
    sqlx::query("UPDATE inbox.aggregate SET version = $1 WHERE aggregate_id = 'b'")
        .bind(last)
        .execute(&pool)
        .await
        .unwrap();
    sequencer.apply(&messages).await.unwrap();
    let mut conn = pool.acquire().await.unwrap();
    held::groups(&mut conn, "limits", 10).await.unwrap();
    let all = inbox::Redrive { filter: held::Filter::default(), batch: 10, dry_run: false };
    sequencer.redrive(&all, |_| ()).await.unwrap();
    inbox::digest(&mut conn, "limits", 1).await.expect("a sum of such versions is comparable, and no error");
    let text = tables(&pool, "limits").await;
    insta::assert_snapshot!(text);
}

/// Headers that are nested deeper than JSON is read.
fn deep() -> String {
    format!("{{\"deep\": {}{}}}", "[".repeat(200), "]".repeat(200))
}

/// What an older release stored.
async fn nest(pool: &PgPool, aggregate: &str, version: i64) {
    let changed =
        sqlx::query("UPDATE inbox.held SET headers = $1::json WHERE aggregate_id = $2 AND version = $3")
            .bind(deep())
            .bind(aggregate)
            .bind(version)
            .execute(pool)
            .await
            .unwrap();
    assert_eq!(changed.rows_affected(), 1);
}

#[tokio::test]
async fn a_held_event_that_cannot_be_read_stops_its_own_aggregate_alone_and_can_be_skipped() {
    let pool = database("limits_held").await;
    let sequencer = Sequencer::new("limits", pool.clone(), Recorder::new("limits"));
    let early: Vec<_> = [("a", 2), ("a", 3), ("b", 2), ("c", 2)].map(|(of, v)| event(of, v, "1")).into();
    sequencer.apply(&early).await.unwrap();
    nest(&pool, "a", 2).await;
    nest(&pool, "c", 2).await;

    // What they waited for is applied, in a batch, alone, and as what may end its process.
    let outcome =
        sequencer.apply(&[event("a", 1, "1"), event("b", 1, "1"), event("d", 1, "1")]).await.unwrap();
    assert_eq!(outcome.applied, 4);
    assert_eq!(sequencer.attempt(&event("c", 1, "1")).await.unwrap().applied, 1);
    // Once more changes nothing, by whichever way.
    sequencer.apply(&[event("a", 1, "1"), event("a", 2, "1")]).await.unwrap();
    let all = inbox::Redrive { filter: held::Filter::default(), batch: 10, dry_run: false };
    let redriven = sequencer.redrive(&all, |_| ()).await.unwrap();
    assert_eq!((redriven.refused, redriven.applied), (2, 0));
    insta::assert_snapshot!(tables(&pool, "limits").await);

    let mut conn = pool.acquire().await.unwrap();
    let stopped = held::at(&mut conn, "limits", "thing", "a", 2).await.unwrap();
    let shown = held::event(&mut conn, "limits", stopped[0].event_id, true).await.unwrap().unwrap();
    insta::assert_debug_snapshot!((shown.event.error, shown.headers, shown.behind));
    let skip =
        inbox::Skip { event: &stopped[0], by: "me", why: "it cannot be read", batch: 10, dry_run: false };
    let done = sequencer.skip(&skip).await.unwrap();
    assert_eq!((done.to, done.applied, done.held), (3, 1, 0));
}

#[tokio::test]
async fn a_program_that_builds_its_own_envelopes_has_the_same_limits() {
    let pool = database("limits_depth").await;
    let sequencer = Sequencer::new("limits", pool.clone(), Recorder::new("limits"));
    let nested = |levels: usize| {
        (0..levels).fold(AMQPValue::Boolean(true), |within, _| {
            let mut array = FieldArray::default();
            array.push(within);
            AMQPValue::FieldArray(array)
        })
    };
    let with = |aggregate: &str, value: AMQPValue| {
        let mut event = event(aggregate, 2, "1");
        let mut headers = event.properties.headers().clone().unwrap();
        headers.insert("own".into(), value);
        event.properties = event.properties.with_headers(headers);
        event
    };
    let messages = [with("four", nested(4)), with("five", nested(5)), with("deep", nested(200))];
    let outcome = sequencer.apply(&messages).await.unwrap();
    assert_eq!((outcome.held, outcome.rejected), (1, 2));
    // What is stored can be read.
    sequencer.apply(&[event("four", 1, "1")]).await.unwrap();
    insta::assert_snapshot!(tables(&pool, "limits").await);
}
