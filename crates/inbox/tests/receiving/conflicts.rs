//! The server rolls a transaction back in favour of another one: it is tried again, a bounded number of times, and
//! costs no message a delivery.

use std::sync::atomic::Ordering;

use inbox::{Outcome, Redrive, RedriveError, Sequencer, Skip, held, rejected};
use sqlx::{AssertSqlSafe, Executor, PgPool, postgres::PgPoolOptions};

use crate::support::{Recorder, database, event, until, waiting_for_locks};

/// Statements fail like a deadlock's victim, then like a serialization failure, as often as was asked for. A sequence
/// counts what is rolled back, too.
const CONFLICTS: &str = "
    CREATE SEQUENCE conflicts MINVALUE 0;
    CREATE TABLE wanted (times bigint);
    INSERT INTO wanted VALUES (0);
    CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE n bigint := nextval('conflicts');
    BEGIN
        IF n < (SELECT times FROM wanted) THEN
            RAISE EXCEPTION 'another transaction is preferred'
                USING ERRCODE = CASE n % 2 WHEN 0 THEN '40P01' ELSE '40001' END;
        END IF;
        RETURN NULL;
    END $$";

/// The next statements that write to `table` fail so many times.
async fn prefer_others(pool: &PgPool, table: &str, times: i64) {
    let triggers = if table.is_empty() {
        String::new()
    } else {
        format!(
            "CREATE TRIGGER conflict BEFORE INSERT OR UPDATE OR DELETE ON {table}
             FOR EACH STATEMENT EXECUTE FUNCTION conflict();"
        )
    };
    let sql = format!(
        "DO $$ DECLARE t regclass; BEGIN
             FOR t IN SELECT tgrelid FROM pg_trigger WHERE tgname = 'conflict' LOOP
                 EXECUTE format('DROP TRIGGER conflict ON %s', t);
             END LOOP;
         END $$;
         {triggers} UPDATE wanted SET times = {times}; ALTER SEQUENCE conflicts RESTART"
    );
    pool.execute(AssertSqlSafe(sql)).await.unwrap();
}

/// How often a statement met another transaction's.
async fn met(pool: &PgPool) -> i64 {
    let met = "SELECT CASE WHEN is_called THEN last_value + 1 ELSE 0 END FROM conflicts";
    sqlx::query_scalar(met).fetch_one(pool).await.unwrap()
}

async fn new(name: &'static str) -> (PgPool, Recorder, Sequencer<Recorder>) {
    let pool = database(name).await;
    pool.execute(CONFLICTS).await.unwrap();
    let handler = Recorder::new(name);
    (pool.clone(), handler.clone(), Sequencer::new(name, pool, handler))
}

const ALL: Redrive = Redrive {
    filter: held::Filter { aggregate: None, reason: None, error: None },
    batch: 64,
    dry_run: false,
};

#[tokio::test]
async fn a_transaction_is_tried_again() {
    let (pool, handler, sequencer) = new("conflicts").await;
    // The inbox's own statements, and the handler's.
    for (n, table) in (1..).zip(["inbox.aggregate", "state"]) {
        prefer_others(&pool, table, 3).await;
        let outcome = sequencer.apply(&[event("a", n, "1"), event("b", n, "1")]).await.unwrap();
        assert_eq!(outcome, Outcome { applied: 2, ..Outcome::default() }, "{table}");
        assert!(met(&pool).await > 3, "{table}");
    }
    // An event that is taken alone, in a savepoint, after its batch has failed for another one.
    prefer_others(&pool, "", 0).await;
    let calls = handler.calls.load(Ordering::Relaxed);
    prefer_others(&pool, "state", 2).await;
    let outcome = sequencer.apply(&[event("c", 1, "poison"), event("d", 1, "1")]).await.unwrap();
    assert_eq!(outcome, Outcome { applied: 1, poison: 1, ..Outcome::default() });
    assert!(handler.calls.load(Ordering::Relaxed) > calls + 2);
    // One whose handler may end the process: that it is tried is committed first.
    for (n, table) in (1..).zip(["inbox.held", "state"]) {
        prefer_others(&pool, table, 2).await;
        assert_eq!(sequencer.attempt(&event("e", n, "1")).await.unwrap().applied, 1, "{table}");
    }
    prefer_others(&pool, "", 0).await;
    let left: Vec<(String, i32)> =
        sqlx::query_as("SELECT reason, attempts FROM inbox.held").fetch_all(&pool).await.unwrap();
    assert_eq!(left, [("poison".to_owned(), 1)], "no conflict counts as an attempt");
    let sums: Vec<(String, i64)> =
        sqlx::query_as("SELECT aggregate, sum::bigint FROM state ORDER BY 1").fetch_all(&pool).await.unwrap();
    let sums: Vec<_> = sums.iter().map(|(aggregate, sum)| (aggregate.as_str(), *sum)).collect();
    assert_eq!(sums, [("a", 2), ("b", 2), ("d", 1), ("e", 2)], "nothing took effect twice");
}

#[tokio::test]
async fn what_never_succeeds_ends() {
    let (pool, _, sequencer) = new("conflicts_for_ever").await;
    sequencer.apply(&[event("a", 1, "poison"), event("b", 1, "1")]).await.unwrap();
    prefer_others(&pool, "inbox.aggregate", 1_000).await;
    let interrupted = sequencer.apply(&[event("b", 2, "1"), event("c", 1, "1")]).await.unwrap_err();
    // It passes, so the messages are given back, all of them.
    assert_eq!((interrupted.settled, interrupted.refused), (0, false), "{interrupted}");
    assert!(interrupted.reason.contains("another one and was rolled back"), "{interrupted}");
    assert_eq!(met(&pool).await, 6);
    prefer_others(&pool, "inbox.aggregate", 1_000).await;
    let not_done = sequencer.redrive(&ALL, |_| ()).await.unwrap_err();
    assert!(
        matches!(&not_done, RedriveError::Conflict(_)) && not_done.to_string().contains("6 times"),
        "{not_done}"
    );
    assert_eq!(met(&pool).await, 6);
}

#[tokio::test]
async fn what_is_done_by_hand_is_tried_again() {
    let (pool, handler, sequencer) = new("conflicts_by_hand").await;
    let batch = [event("a", 1, "broken"), event("a", 2, "1"), event("b", 1, "poison"), event("b", 2, "1")];
    sequencer.apply(&batch).await.unwrap();
    handler.passed.store(true, Ordering::Relaxed);
    let a = held::Filter { aggregate: Some(("thing".to_owned(), "a".to_owned())), ..ALL.filter };
    prefer_others(&pool, "state", 3).await;
    let redriven = sequencer.redrive(&Redrive { filter: a, ..ALL }, |_| ()).await.unwrap();
    assert_eq!((redriven.applied, redriven.refused), (2, 0));
    assert!(met(&pool).await > 3);

    let mut conn = pool.acquire().await.unwrap();
    let stopped = held::at(&mut conn, "conflicts_by_hand", "thing", "b", 1).await.unwrap();
    prefer_others(&pool, "inbox.skipped", 3).await;
    let skip = Skip { event: &stopped[0], by: "me", why: "a test", batch: 64, dry_run: false };
    assert_eq!(sequencer.skip(&skip).await.unwrap().to, 2);
    assert!(met(&pool).await > 3);

    prefer_others(&pool, "", 0).await;
    let mut none = event("c", 1, "1");
    none.properties = lapin::BasicProperties::default();
    sequencer.apply(&[none]).await.unwrap();
    prefer_others(&pool, "inbox.rejected", 3).await;
    let dropped = rejected::drop(&mut conn, "conflicts_by_hand", &rejected::Filter::default()).await;
    assert_eq!(dropped.unwrap(), 1);
    assert!(met(&pool).await > 3);
}

/// Not only what looks like one: two transactions that wait for each other, and ours is the victim.
#[tokio::test]
async fn the_victim_of_a_real_deadlock_is_tried_again() {
    let (pool, handler, _) = new("deadlock").await;
    // The one that looks first is the victim. Time enough for the other one to come, on a busy machine as well.
    let patient = pool.connect_options();
    let patient = (*patient).clone().options([("deadlock_timeout", "5s")]);
    let patient = PgPoolOptions::new().max_connections(8).connect_with(patient).await.unwrap();
    let sequencer = Sequencer::new("deadlock", patient, handler);
    let batch = |version| [event("a", version, "1"), event("b", version, "1")];
    sequencer.apply(&batch(1)).await.unwrap();
    let mut other = pool.begin().await.unwrap();
    other.execute("SET LOCAL deadlock_timeout = '1min'").await.unwrap();
    let lock = |aggregate: &str| {
        AssertSqlSafe(format!("SELECT FROM inbox.aggregate WHERE aggregate_id = '{aggregate}' FOR UPDATE"))
    };
    other.execute(lock("b")).await.unwrap();
    let circle = async {
        until("it has a and waits for b", async || waiting_for_locks(&pool).await == 1).await;
        // An error, if it were the victim.
        other.execute(lock("a")).await.unwrap();
        other.commit().await.unwrap();
    };
    let batch = batch(2);
    let (applied, ()) = tokio::join!(sequencer.apply(&batch), circle);
    assert_eq!(applied.unwrap(), Outcome { applied: 2, ..Outcome::default() });
    let deadlocks: i64 =
        sqlx::query_scalar("SELECT count(*) FROM state WHERE sum = 2").fetch_one(&pool).await.unwrap();
    assert_eq!(deadlocks, 2);
}
