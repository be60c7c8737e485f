//! What a consumer remembers of its sources: under races, of a database of before, and by an index.

use inbox::{Envelope, Outcome, Sequencer};
use lapin::types::AMQPValue;
use sqlx::PgPool;

use crate::{
    incarnations::{Case, NEW, baseline, named, new},
    support::{event, until, waiting_for_locks},
};

/// The transaction that applies an event of the earlier one and the one that takes the newer one wait for each other.
#[tokio::test]
async fn nothing_of_an_earlier_incarnation_is_applied_after_a_newer_one() {
    let case = Case::new("incarnation_race").await;
    case.apply(&[event("a", 1, "1"), event("b", 1, "1")]).await;
    let other = Sequencer::new(case.consumer, case.pool.clone(), case.handler.clone());
    let mut holder = case.pool.begin().await.unwrap();
    sqlx::raw_sql("SELECT pg_advisory_xact_lock(1)").execute(&mut *holder).await.unwrap();
    let waiting = async |sessions: i64| {
        until("they wait", async || waiting_for_locks(&case.pool).await == sessions).await;
    };
    let (locked, begun) = ([event("a", 2, "locked"), event("c", 1, "1000")], [new(baseline("c", 2, "7"))]);
    let raise = async {
        // The first one has locks, and its handler is at work.
        waiting(1).await;
        case.apply(&begun).await
    };
    let release = async {
        waiting(2).await;
        holder.commit().await.unwrap();
    };
    let (first, second, ()) = tokio::join!(other.apply(&locked), raise, release);
    assert_eq!((first.unwrap().applied, second.applied), (2, 1));
    assert_eq!(case.state().await, named(&[("a", 1), ("b", 1), ("c", 7)]));
    assert_eq!(other.apply(&[event("a", 3, "1000")]).await.unwrap().superseded, 1);
}

#[tokio::test]
async fn many_consumers_take_a_newer_incarnation_once() {
    let case = Case::new("incarnation_many").await;
    let all: Vec<Envelope> = (0..20).map(|n| event(&n.to_string(), 1, "1")).collect();
    case.apply(&all).await;
    let consumers = [0; 4].map(|_| Sequencer::new(case.consumer, case.pool.clone(), case.handler.clone()));
    let batch = |n: usize| -> Vec<Envelope> {
        (0..5).map(|i| new(baseline(&(n * 5 + i).to_string(), 4, "40"))).collect()
    };
    let batches = [0, 1, 2, 3].map(batch);
    let work = consumers.iter().zip(&batches).map(|(consumer, batch)| consumer.apply(batch));
    for outcome in futures_util::future::join_all(work).await {
        assert_eq!(outcome.unwrap().applied, 5);
    }
    assert_eq!(case.sources().await, [("things".to_owned(), NEW, vec![1])]);
    assert_eq!(case.left_behind().await, []);
}

#[tokio::test]
async fn a_source_that_is_spelled_wrong_is_no_event() {
    let case = Case::new("incarnation_malformed").await;
    let spelled = |source: &str| {
        let mut envelope = event("a", 1, source);
        envelope.properties = envelope.properties.with_app_id(source.into());
        envelope
    };
    let with = |name: &str, value: AMQPValue| {
        let mut envelope = event("a", 1, name);
        let mut headers = envelope.properties.headers().clone().unwrap();
        headers.insert(name.into(), value);
        envelope.properties = envelope.properties.with_headers(headers);
        envelope
    };
    let text = AMQPValue::LongString("true".into());
    let wrong = [
        spelled("things~1"),
        spelled("things~02"),
        spelled("things~two"),
        with("chain_start", text.clone()),
        with("source_parent", text),
        with("source_parent", AMQPValue::LongLongInt(0)),
    ];
    assert_eq!(case.apply(&wrong).await, Outcome { rejected: 6, ..Outcome::default() });
    let mut digits = with("source_parent", AMQPValue::LongString("1".into()));
    digits.properties = digits.properties.with_app_id("things~2".into());
    assert_eq!(
        case.apply(&[event("b", 1, ""), digits]).await.applied,
        2,
        "clients without integers send digits"
    );
    let details: Vec<String> = sqlx::query_scalar("SELECT DISTINCT detail FROM inbox.rejected ORDER BY 1")
        .fetch_all(&case.pool)
        .await
        .unwrap();
    insta::assert_snapshot!(details.join("\n"), @"
    app_id is not a name, or a name, `~` and the number of an incarnation
    chain_start is not a boolean
    source_parent is not an integer from 1 to 2^63 - 1
    ");
}

/// A database of before: the newest incarnation is known by the chains, and what it has begun has ended before.
#[tokio::test]
async fn a_database_of_before_knows_its_incarnations() {
    let url = devstack::testing::database("incarnation_before").await;
    let pool = PgPool::connect(&url).await.unwrap();
    inbox::migrator().run_to(14, &pool).await.unwrap();
    sqlx::raw_sql(
        "INSERT INTO inbox.aggregate (consumer, source, aggregate_type, aggregate_id, version, last_event_id)
         SELECT c, s, 'thing', i, v, CASE WHEN v > 0 THEN gen_random_uuid() END
         FROM (VALUES ('one', 'things', 'a', 3), ('one', 'things', 'b', 3), ('one', 'things', 'c', 3),
                      ('one', 'things~2', 'a', 1), ('one', 'things~2', 'b', 0), ('one', 'things~10', 'd', 1),
                      ('one', 'others', 'a', 9), ('two', 'things', 'a', 3), ('one', 'odd~0', 'a', 1)) AS r (c, s, i, v);
         INSERT INTO inbox.held (consumer, source, aggregate_type, aggregate_id, version, event_id, type, headers,
                                 payload, reason)
         SELECT 'one', 'things', 'thing', i, 5, gen_random_uuid(), 'thing.changed', '{}', '', 'gap'
         FROM unnest(ARRAY['a', 'b']) AS r (i)",
    )
    .execute(&pool)
    .await
    .unwrap();
    inbox::migrator().run(&pool).await.unwrap();
    let rows =
        async |sql: &'static str| -> Vec<String> { sqlx::query_scalar(sql).fetch_all(&pool).await.unwrap() };
    let sources =
        rows("SELECT concat_ws(' ', consumer, name, incarnation, earlier) FROM inbox.source ORDER BY 1")
            .await;
    assert_eq!(sources, ["one others 1 {}", "one things 10 {1,2}", "two things 1 {}"]);
    let ended =
        rows("SELECT concat_ws(' ', consumer, source, aggregate_id) FROM inbox.aggregate WHERE ended").await;
    assert_eq!(ended, ["one things a"]);
    let held = rows("SELECT aggregate_id FROM inbox.held").await;
    assert_eq!(held, ["b"]);
    let left =
        rows("SELECT concat_ws(' ', aggregate_id, incarnation, version) FROM inbox.left_behind ORDER BY 1")
            .await;
    assert_eq!(left, ["a 2 1", "b 1 3", "b 2 0", "c 1 3"]);
}

/// Neither the length of an aggregate's history nor the number of those that have ended matters.
#[tokio::test]
async fn what_is_left_behind_is_found_by_an_index() {
    let case = Case::new("incarnation_index").await;
    case.apply(&[event("a", 1, "")]).await;
    case.apply(&[new(event("b", 1, ""))]).await;
    let fill = "INSERT INTO inbox.aggregate (consumer, source, aggregate_type, aggregate_id, version, last_event_id, ended)
                SELECT 'incarnation_index', s, 'thing', n, 1, gen_random_uuid(), s = 'things' AND n > 5
                FROM unnest(ARRAY['things', 'things~1764426123456']) AS s, generate_series(1, 20000) AS n";
    sqlx::raw_sql(fill).execute(&case.pool).await.unwrap();
    let mut conn = case.pool.acquire().await.unwrap();
    for known in ["SELECT 1", "ANALYZE inbox.aggregate, inbox.source"] {
        sqlx::raw_sql(known).execute(&mut *conn).await.unwrap();
        let reads = "SELECT idx_tup_fetch + seq_tup_read FROM pg_stat_xact_user_tables
                     WHERE relid = 'inbox.aggregate'::regclass";
        let mut tx = sqlx::Connection::begin(&mut *conn).await.unwrap();
        let before: i64 = sqlx::query_scalar(reads).fetch_one(&mut *tx).await.unwrap();
        let count = "SELECT count(*) FROM inbox.some_left_behind('incarnation_index', 10001)";
        let found: i64 = sqlx::query_scalar(count).fetch_one(&mut *tx).await.unwrap();
        let read: i64 = sqlx::query_scalar::<_, i64>(reads).fetch_one(&mut *tx).await.unwrap() - before;
        assert_eq!((found, read), (6, 6), "after {known}");
    }
}
