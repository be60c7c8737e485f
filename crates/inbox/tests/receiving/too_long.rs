//! A limit of our own is not taken for a database that is away: what takes too long is tried in smaller parts, and an
//! event that takes too long by itself is held with the reason, while everybody else's go on.

use inbox::{Envelope, Redrive, Sequencer, held::Filter};
use sqlx::{Executor, PgPool, postgres::PgPoolOptions};

use crate::support::{Recorder, database, event, typed};

/// A pool of the same database whose statements may not take as long as the body `too long` asks for. Not so little that
/// a busy machine's would be among them.
async fn limited(pool: &PgPool, limit: &'static str) -> PgPool {
    let options = PgPoolOptions::new()
        .max_connections(8)
        .after_connect(move |conn, _| Box::pin(async move { conn.execute(limit).await.map(drop) }));
    options.connect_with((*pool.connect_options()).clone()).await.unwrap()
}

async fn held(pool: &PgPool) -> Vec<(String, i64, String, String)> {
    sqlx::query_as("SELECT aggregate_id, version, reason, coalesce(error, '') FROM inbox.held ORDER BY 1, 2")
        .fetch_all(pool)
        .await
        .unwrap()
}

const TOO_LONG: &str = "database error 57014 (a statement took longer than statement_timeout allows): the statement was \
                        cancelled, or took longer than statement_timeout";

#[tokio::test]
async fn an_event_that_takes_too_long_is_held_and_nobody_waits_for_it() {
    let pool = database("too_long").await;
    let sequencer =
        Sequencer::new("one", limited(&pool, "SET statement_timeout = '2s'").await, Recorder::new("one"));
    // In a batch, alone, and as one that came back twice.
    let batch: Vec<Envelope> =
        (1..=8).map(|n| event(&n.to_string(), 1, if n == 4 { "too long" } else { "1" })).collect();
    let outcome = sequencer.apply(&batch).await.unwrap();
    assert_eq!((outcome.applied, outcome.poison), (7, 1));
    let outcome = sequencer.apply(&[event("alone", 1, "too long")]).await.unwrap();
    assert_eq!((outcome.applied, outcome.poison), (0, 1));
    let outcome = sequencer.attempt(&event("suspect", 1, "too long")).await.unwrap();
    assert_eq!((outcome.applied, outcome.poison), (0, 1));
    let outcome = sequencer.apply(&[event("4", 2, "1"), event("9", 1, "1")]).await.unwrap();
    assert_eq!((outcome.applied, outcome.held), (1, 1));
    let expected = [
        ("4", 1, "poison", TOO_LONG),
        ("4", 2, "behind", ""),
        ("alone", 1, "poison", TOO_LONG),
        ("suspect", 1, "poison", TOO_LONG),
    ];
    let expected: Vec<_> = expected
        .into_iter()
        .map(|(id, version, why, error)| (id.to_owned(), version, why.to_owned(), error.to_owned()))
        .collect();
    assert_eq!(held(&pool).await, expected);

    // Where the limit is another one, it is applied by hand.
    let patient = Sequencer::new("one", pool.clone(), Recorder::new("one"));
    let redrive = Redrive { filter: Filter::default(), batch: 64, dry_run: false };
    assert_eq!(patient.redrive(&redrive, |_| ()).await.unwrap().applied, 4);
    assert_eq!(held(&pool).await, Vec::new());
}

/// What is only slow together is applied in parts.
#[tokio::test]
async fn a_batch_that_takes_too_long_is_tried_in_smaller_parts() {
    let pool = database("too_long_together").await;
    // A commit's work, which grows with the batch.
    pool.execute(
        "CREATE FUNCTION work() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF (SELECT count(*) FROM applied WHERE xmin::text = pg_current_xact_id()::xid::text) > 4 THEN
                 PERFORM pg_sleep(600);
             END IF;
             RETURN NULL;
         END $$;
         CREATE TRIGGER work AFTER INSERT ON applied FOR EACH ROW EXECUTE FUNCTION work()",
    )
    .await
    .unwrap();
    let sequencer =
        Sequencer::new("one", limited(&pool, "SET statement_timeout = '2s'").await, Recorder::new("one"));
    let batch: Vec<Envelope> = (1..=16).map(|n| event(&n.to_string(), 1, "1")).collect();
    let outcome = sequencer.apply(&batch).await.unwrap();
    assert_eq!((outcome.applied, outcome.poison), (16, 0));
}

/// Waiting for somebody else's lock is no event's fault.
#[tokio::test]
async fn an_aggregate_that_somebody_has_locked_is_waited_for() {
    let pool = database("too_long_locked").await;
    let sequencer =
        Sequencer::new("one", limited(&pool, "SET statement_timeout = '2s'").await, Recorder::new("one"));
    sequencer.apply(&[event("a", 1, "1")]).await.unwrap();
    let mut holder = pool.begin().await.unwrap();
    holder.execute("SELECT FROM inbox.aggregate FOR UPDATE").await.unwrap();
    let interrupted = sequencer.apply(&[event("a", 2, "1")]).await.unwrap_err();
    assert_eq!((interrupted.settled, interrupted.refused), (0, false), "{interrupted}");
    holder.rollback().await.unwrap();
    assert_eq!(held(&pool).await, Vec::new());
    assert_eq!(sequencer.apply(&[event("a", 2, "1")]).await.unwrap().applied, 1);
}

const ERASURES: &str = "SELECT count(*) FROM inbox.erasure";
const ADA: &str = "SELECT count(*) FROM inbox.held WHERE encode(payload, 'escape') LIKE '%Ada%'";

async fn count(pool: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
}

/// The end of an aggregate is applied, however much anybody holds of it.
#[tokio::test]
async fn very_much_that_is_held_is_erased_in_steps() {
    let pool = database("too_long_held").await;
    for consumer in ["one", "replaced"] {
        sqlx::query(
            "INSERT INTO inbox.held (consumer, source, aggregate_type, aggregate_id, version, event_id, type, headers,
                                     payload, reason)
             SELECT $1, 'things', 'thing', 'a', n, gen_random_uuid(), 'thing.changed', '{}', 'Ada', 'gap'
             FROM generate_series(2, 5000) n",
        )
        .bind(consumer)
        .execute(&pool)
        .await
        .unwrap();
    }
    let sequencer = Sequencer::new("one", pool.clone(), Recorder::new("one"));
    let outcome = sequencer
        .apply(&[typed("thing.deleted", "a", 6000, "delete", &[]), event("b", 1, "1")])
        .await
        .unwrap();
    assert_eq!(outcome.applied, 2);
    // Its own are removed, and of the other consumer's some are erased now and the rest is noted.
    assert_eq!((count(&pool, ADA).await, count(&pool, ERASURES).await), (3_999, 1));
    let mut steps = Vec::new();
    let step = async || {
        sqlx::query_scalar::<_, Option<i64>>("SELECT inbox.erase_step(1500)").fetch_one(&pool).await.unwrap()
    };
    while let Some(rows) = step().await {
        steps.push(rows);
    }
    assert_eq!(steps, [1_500, 1_500, 999]);
    assert_eq!((count(&pool, ADA).await, count(&pool, ERASURES).await), (0, 0));
    let places = "SELECT count(*) FROM inbox.held WHERE consumer = 'replaced'";
    assert_eq!(count(&pool, places).await, 4_999, "each keeps its place");
}
