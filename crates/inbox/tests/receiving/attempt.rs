//! Events whose handler ends the process. A process that dies is a call that is dropped: its connection
//! goes, and nothing of it is told to anybody.

use std::{future::Future, sync::atomic::Ordering};

use inbox::{Outcome, Sequencer};
use sqlx::PgPool;

use crate::support::{Recorder, database, event, tables, until};

fn replica(consumer: &str, pool: &PgPool) -> (Sequencer<Recorder>, Recorder) {
    let handler = Recorder::new(consumer);
    (Sequencer::new(consumer, pool.clone(), handler.clone()), handler)
}

/// Dies when the handler is at work.
async fn die(handler: &Recorder, call: impl Future) {
    tokio::select! {
        _ = call => panic!("the handler came back"),
        () = handler.hanging.notified() => {}
    }
}

async fn held(pool: &PgPool) -> Vec<(i64, String, i32)> {
    sqlx::query_as("SELECT version, reason, attempts FROM inbox.held ORDER BY aggregate_id, version")
        .fetch_all(pool)
        .await
        .unwrap()
}

fn trying(attempts: i32) -> Vec<(i64, String, i32)> {
    vec![(1, "trying".to_owned(), attempts)]
}

#[tokio::test]
async fn an_event_that_ends_the_process_is_held_after_three_attempts() {
    let pool = database("killer").await;
    let killer = event("a", 1, "hang");
    let (first, handler) = replica("killer", &pool);
    die(&handler, first.attempt(&killer)).await;
    assert_eq!(held(&pool).await, trying(1));

    // A batch does not touch it: it is taken alone, and that is an attempt, too.
    let (second, handler) = replica("killer", &pool);
    let batch = [event("b", 1, ""), killer.clone(), event("a", 2, "")];
    die(&handler, second.apply(&batch)).await;
    assert_eq!(held(&pool).await, trying(2));
    assert_eq!(handler.calls.load(Ordering::Relaxed), 2, "b, then the killer alone");

    // Two at once: one has it, the other waits for the chain's lock and counts nothing.
    let (third, handler) = replica("killer", &pool);
    let (other, untouched) = replica("killer", &pool);
    {
        let mut at_work = std::pin::pin!(third.attempt(&killer));
        die(&handler, at_work.as_mut()).await;
        let mut waits = std::pin::pin!(other.attempt(&killer));
        let waiting = until("the other waits for a lock", async || {
            let sql = "SELECT count(*) FROM pg_stat_activity
                       WHERE datname = current_database() AND wait_event_type = 'Lock'";
            sqlx::query_scalar::<_, i64>(sql).fetch_one(&pool).await.unwrap() == 1
        });
        tokio::select! {
            outcome = waits.as_mut() => panic!("it did not wait: {outcome:?}"),
            () = waiting => {}
        }
        assert_eq!(held(&pool).await, trying(3));
    }
    assert_eq!(untouched.calls.load(Ordering::Relaxed), 0);

    let (last, untouched) = replica("killer", &pool);
    let outcome = last.attempt(&killer).await.unwrap();
    assert_eq!(outcome, Outcome { poison: 1, ..Outcome::default() });
    assert_eq!(untouched.calls.load(Ordering::Relaxed), 0, "it is not called again");
    assert_eq!(last.apply(&[event("a", 2, ""), killer]).await.unwrap().duplicates, 1);
    insta::assert_snapshot!("killer", tables(&pool, "killer").await);
}

#[tokio::test]
async fn one_that_was_held_is_found_as_well() {
    let pool = database("held_killer").await;
    let (first, handler) = replica("held_killer", &pool);
    first.apply(&[event("a", 2, "hang"), event("a", 3, "")]).await.unwrap();
    // It is delivered no more; its filler is.
    let filler = event("a", 1, "");
    for _ in 1..=3 {
        die(&handler, first.attempt(&filler)).await;
    }
    let outcome = first.attempt(&filler).await.unwrap();
    assert_eq!(outcome, Outcome { duplicates: 1, poison: 1, ..Outcome::default() });
    insta::assert_snapshot!("held_killer", tables(&pool, "held_killer").await);
}

#[tokio::test]
async fn what_comes_back_is_no_attempt_or_counts_once() {
    let pool = database("came_back").await;
    let (sequencer, handler) = replica("came_back", &pool);
    let passes = event("a", 1, "transient");
    for _ in 0..4 {
        let interrupted = sequencer.attempt(&passes).await.unwrap_err();
        assert_eq!((interrupted.refused, held(&pool).await), (false, vec![]));
    }

    // The database is in no state to be told, and this process remembers.
    let deaf = "CREATE FUNCTION deaf() RETURNS trigger LANGUAGE plpgsql AS
                    $$BEGIN RAISE EXCEPTION USING ERRCODE = '57014'; END$$;
                CREATE TRIGGER deaf BEFORE DELETE ON inbox.held FOR EACH ROW EXECUTE FUNCTION deaf();
                CREATE TRIGGER deaf_too BEFORE UPDATE ON inbox.held
                    FOR EACH ROW WHEN (new.attempts < old.attempts) EXECUTE FUNCTION deaf()";
    sqlx::raw_sql(deaf).execute(&pool).await.unwrap();
    for _ in 0..4 {
        sequencer.attempt(&passes).await.unwrap_err();
        assert_eq!(held(&pool).await, trying(1));
    }
    sqlx::raw_sql("DROP FUNCTION deaf CASCADE").execute(&pool).await.unwrap();
    handler.passed.store(true, Ordering::Relaxed);
    let applied = sequencer.attempt(&passes).await.unwrap();
    assert_eq!((applied.applied, held(&pool).await), (1, vec![]));

    let applied = sequencer.attempt(&event("a", 2, "")).await.unwrap();
    assert_eq!((applied.applied, held(&pool).await), (1, vec![]));

    // Refused at the first attempt: one attempt.
    let refused = sequencer.attempt(&event("a", 3, "poison")).await.unwrap();
    assert_eq!((refused.poison, held(&pool).await), (1, vec![(3, "poison".to_owned(), 1)]));
}
