//! Erasing an aggregate with a long history: nobody reads its content from the commit on, and the rows are rewritten in
//! steps, each of which takes as long as it may, whatever else is being erased.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::time::{Duration, Instant};

use outbox::{Ended, erase, install};
use sqlx::{AssertSqlSafe, Executor, PgPool, postgres::PgPoolOptions};

async fn database(name: &str) -> PgPool {
    let url = devstack::testing::database(name).await;
    // Far less than rewriting a long history takes.
    let options = PgPoolOptions::new().after_connect(|conn, _| {
        Box::pin(async move { conn.execute("SET statement_timeout = '10s'").await.map(drop) })
    });
    let pool = options.connect(&url).await.unwrap();
    install(&mut pool.acquire().await.unwrap(), "test").await.unwrap();
    pool.execute("INSERT INTO outbox.relay (name) VALUES ('default')").await.unwrap();
    pool
}

/// Versions 1 to `versions` of an aggregate, by way of the positions themselves, which is quick.
async fn append(pool: &PgPool, id: &str, versions: i64) {
    let insert = format!(
        "INSERT INTO outbox.event (position, aggregate_type, aggregate_id, version, type, payload, headers)
         SELECT mark + n, 'thing', '{id}', n, 'thing.changed', json_build_object('id', '{id}', 'name', 'Ada ' || n),
                CASE n % 2 WHEN 0 THEN jsonb_build_object('traceparent', '00-1-2-03', 'who', 'Ada') END
         FROM (SELECT last_value AS mark FROM outbox.position) m, generate_series(1, {versions}) n"
    );
    // Filling is not what is limited.
    let mut tx = pool.begin().await.unwrap();
    tx.execute("SET LOCAL statement_timeout = 0").await.unwrap();
    tx.execute(AssertSqlSafe(insert)).await.unwrap();
    tx.execute("SELECT setval('outbox.position', (SELECT max(position) FROM outbox.event))").await.unwrap();
    tx.commit().await.unwrap();
}

/// Ends aggregates at these versions, as their writer does.
async fn end(pool: &PgPool, ended: &[(&str, i64)]) -> u64 {
    let ended: Vec<Ended> = ended
        .iter()
        .map(|(id, version)| Ended {
            aggregate_type: "thing".into(),
            aggregate_id: (*id).to_owned(),
            version: *version,
        })
        .collect();
    let mut tx = pool.begin().await.unwrap();
    let erased = erase(&mut tx, &ended).await.unwrap();
    tx.commit().await.unwrap();
    erased
}

/// One step: whose it was, how many events, and whether nothing is left.
async fn step(pool: &PgPool, most: i64) -> Option<(String, i64, bool)> {
    let step = sqlx::query_as("SELECT aggregate_id, erased, finished FROM outbox.erase_step($1)").bind(most);
    step.fetch_optional(pool).await.unwrap()
}

async fn count(pool: &PgPool, what: &'static str) -> i64 {
    sqlx::query_scalar(what).fetch_one(pool).await.unwrap()
}

const STORED: &str = "SELECT count(*) FROM outbox.event WHERE concat(payload, headers) LIKE '%Ada%'";
const ASIDE: &str = "SELECT count(*) FROM outbox.parked WHERE concat(payload, headers) LIKE '%Ada%'";
const READABLE: &str = "SELECT count(*) FROM outbox.readable WHERE concat(payload, headers) LIKE '%Ada%'";
const READABLE_ASIDE: &str =
    "SELECT count(*) FROM outbox.readable_parked WHERE concat(payload, headers) LIKE '%Ada%'";
const PENDING: &str = "SELECT count(*) FROM outbox.erasure";

#[tokio::test]
async fn a_long_history_is_erased_for_readers_at_once_and_in_steps_where_it_lies() {
    let pool = database("erasure_long").await;
    append(&pool, "long", 7_000).await;
    append(&pool, "another", 10).await;
    let aside = "INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, payload,
                                            headers, created_at, reason, detail)
                 SELECT 'default', position, id, aggregate_type, aggregate_id, version, type, payload, headers, created_at,
                        'unroutable', 'no queue takes it'
                 FROM outbox.event";
    pool.execute(aside).await.unwrap();

    assert_eq!(end(&pool, &[("long", 7_000)]).await, 2_000);
    // The last one is the deletion's version, and not below it.
    assert_eq!((count(&pool, READABLE).await, count(&pool, READABLE_ASIDE).await), (11, 11));
    assert_eq!(count(&pool, STORED).await, 5_010, "the rows are not rewritten yet");
    let read = "SELECT string_agg(payload || ' ' || headers, ', ' ORDER BY position) FROM outbox.readable
                WHERE version IN (1, 6000) AND aggregate_id = 'long'";
    let read: String = sqlx::query_scalar(read).fetch_one(&pool).await.unwrap();
    let (whole, traced) = (r#"{"erased": true}"#, r#"{"erased": true, "traceparent": "00-1-2-03"}"#);
    let expected = [whole, traced].map(|headers| format!(r#"{{"id":"long","erased":true}} {headers}"#));
    assert_eq!(read, expected.join(", "));

    let (mut steps, mut erased) = (0, 0);
    while let Some((_, events, _)) = step(&pool, 500).await {
        assert!(events <= 500);
        (steps, erased) = (steps + 1, erased + events);
    }
    assert_eq!(erased, 4_999);
    assert!(steps > 20, "in {steps} steps");
    for what in [STORED, ASIDE, READABLE, READABLE_ASIDE] {
        assert_eq!(count(&pool, what).await, 11, "{what}");
    }
    let chain = "SELECT count(*) FROM outbox.event WHERE aggregate_id = 'long'";
    assert_eq!((count(&pool, chain).await, count(&pool, PENDING).await), (7_000, 0));
}

#[tokio::test]
async fn erasures_take_turns_so_that_a_short_one_is_not_behind_long_ones() {
    let pool = database("erasure_turns").await;
    for id in ["long-1", "long-2"] {
        append(&pool, id, 12_000).await;
        end(&pool, &[(id, 12_000)]).await;
    }
    append(&pool, "short", 2_100).await;
    end(&pool, &[("short", 2_101)]).await;
    let mut turns = Vec::new();
    for _ in 0..6 {
        turns.push(step(&pool, 1_000).await.unwrap());
    }
    let finished = turns.iter().position(|(id, _, finished)| id == "short" && *finished);
    assert!(finished.is_some(), "{turns:?}");
    // A worker that is at one of them keeps nobody from the others.
    let mut busy = pool.begin().await.unwrap();
    let taken: String = sqlx::query_scalar("SELECT aggregate_id FROM outbox.erase_step(1)")
        .fetch_one(&mut *busy)
        .await
        .unwrap();
    let (other, ..) = step(&pool, 1_000).await.unwrap();
    assert_ne!(taken, other);
    let before = count(&pool, STORED).await;
    busy.rollback().await.unwrap();
    assert_eq!(count(&pool, STORED).await, before, "who is killed in a step has done nothing");
}

/// What an aggregate may be like, and what must not be erased with it.
#[tokio::test]
async fn what_is_erased_is_what_lay_below_the_end_when_it_was_asked() {
    let pool = database("erasure_bounds").await;
    // Versions far apart, the last of which there is: as an outbox from before the chains may have them.
    let sparse =
        "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, previous_id)
                  SELECT 'thing', 'sparse', v, 'thing.changed', '{\"name\": \"Ada\"}', gen_random_uuid()
                  FROM unnest(ARRAY[3, 1700000000000, 9223372036854775805]) v";
    pool.execute(sparse).await.unwrap();
    assert_eq!(end(&pool, &[("sparse", 9_223_372_036_854_775_806)]).await, 3);
    // A row of before the checks on times.
    append(&pool, "odd", 3).await;
    for sql in [
        "ALTER TABLE outbox.event DROP CONSTRAINT event_rules",
        "UPDATE outbox.event SET created_at = 'infinity' WHERE aggregate_id = 'odd' AND version = 2",
        "ALTER TABLE outbox.event ADD CONSTRAINT event_rules CHECK (outbox.is_event(position, aggregate_type, aggregate_id,
             version, type, payload, headers, created_at)) NOT VALID",
    ] {
        pool.execute(sql).await.unwrap();
    }
    assert_eq!(end(&pool, &[("odd", 4)]).await, 3);
    assert_eq!(count(&pool, STORED).await, 0);

    // A key that is used again, while its former events are still being erased. With versions from 1, as before the chains.
    append(&pool, "again", 5_000).await;
    assert_eq!(end(&pool, &[("again", 5_001)]).await, 2_000);
    let next = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, previous_id)
                SELECT 'thing', 'again', n, 'thing.new', '{\"name\": \"Ada II\"}', gen_random_uuid() FROM generate_series(1, 10) n";
    // In a partition of its own, as after some time.
    pool.execute("SELECT outbox.add_partition(1000)").await.unwrap();
    pool.execute("SELECT setval('outbox.position', 1000000)").await.unwrap();
    pool.execute(next).await.unwrap();
    assert_eq!(count(&pool, READABLE).await, 10);
    while step(&pool, 1_000).await.is_some() {}
    assert_eq!((count(&pool, STORED).await, count(&pool, READABLE).await), (10, 10));
    // Ended again while nothing is pending, with many others: each has its place in the work.
    for n in 0..5 {
        append(&pool, &format!("many-{n}"), 900).await;
    }
    let ended: Vec<(String, i64)> = (0..5).map(|n| (format!("many-{n}"), 901)).collect();
    let ended: Vec<(&str, i64)> = ended.iter().map(|(id, version)| (&**id, *version)).collect();
    assert_eq!(end(&pool, &ended).await, 2_000);
    assert_eq!((count(&pool, READABLE).await, count(&pool, PENDING).await), (10, 3));
    while step(&pool, 1_000).await.is_some() {}
    assert_eq!(count(&pool, STORED).await, 10);
}

#[tokio::test]
async fn three_hundred_thousand_events_keep_nobody_waiting() {
    let pool = database("erasure_huge").await;
    append(&pool, "huge", 300_000).await;
    append(&pool, "another", 1).await;
    // Within the limit of a statement, which rewriting all of it exceeds.
    assert_eq!(end(&pool, &[("huge", 300_001)]).await, 2_000);
    let newest =
        "SELECT count(*) FROM (SELECT payload FROM outbox.readable WHERE position > 250000 ORDER BY position
                                        LIMIT 1000) r WHERE payload::text LIKE '%Ada%'";
    assert_eq!(count(&pool, newest).await, 0);
    // The last steps cost what the first ones did: some of them, with everything in between skipped.
    pool.execute("UPDATE outbox.erasure SET done_version = 297500").await.unwrap();
    let end = Instant::now() + Duration::from_mins(2);
    while step(&pool, 1_000).await.is_some() {
        assert!(Instant::now() < end, "the erasure ends");
    }
    let left = "SELECT count(*) FROM outbox.event WHERE version > 297500 AND payload::text LIKE '%Ada%'";
    assert_eq!((count(&pool, left).await, count(&pool, PENDING).await), (0, 0));
}

/// ANALYZE keeps values of rows beyond the rows' end, unless it is told not to.
#[tokio::test]
async fn the_server_keeps_no_samples_of_headers() {
    let pool = database("erasure_samples").await;
    pool.execute("SELECT outbox.add_partition(1000)").await.unwrap();
    pool.execute("SELECT outbox.keep_no_samples()").await.unwrap();
    append(&pool, "a", 100).await;
    pool.execute("SELECT setval('outbox.position', 1000000)").await.unwrap();
    append(&pool, "b", 100).await;
    pool.execute(
        "INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, payload, headers,
                                    created_at, reason, detail)
         SELECT 'default', position, id, aggregate_type, aggregate_id, version, type, payload, headers, created_at,
                'unroutable', 'no queue takes it' FROM outbox.event",
    )
    .await
    .unwrap();
    pool.execute("ANALYZE").await.unwrap();
    let samples = "SELECT count(*) FROM pg_stats s WHERE schemaname = 'outbox' AND s::text LIKE '%Ada%'";
    assert_eq!(count(&pool, samples).await, 0);
    let columns = "SELECT count(*) FROM pg_stats WHERE schemaname = 'outbox' AND tablename = 'event_1'";
    assert!(count(&pool, columns).await > 3, "it samples the rest");
}
