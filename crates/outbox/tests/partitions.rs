//! Partitions come ahead of the writers and go when nobody needs them, over real PostgreSQL.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::sync::Arc;

use devstack::testing::eventually;
use outbox::install;
use sqlx::{AssertSqlSafe, Executor, PgPool};
use tokio::sync::Barrier;
use tokio_util::sync::CancellationToken;

async fn database() -> PgPool {
    let pool = PgPool::connect(&devstack::testing::database("partitions").await).await.unwrap();
    install(&mut pool.acquire().await.unwrap(), "test").await.unwrap();
    pool
}

const APPEND: &str = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                      VALUES ('thing', 'a', $1, 'thing.changed', '{}') RETURNING tableoid::regclass::text";

/// Of another aggregate: one writer does not wait for the other.
const APPEND_ANOTHER: &str = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                              VALUES ('thing', 'another', 1, 'thing.new', '{}')";

/// Appends, and says where the event went.
async fn append(pool: &PgPool, version: i64) -> String {
    sqlx::query_scalar(APPEND).bind(version).fetch_one(pool).await.unwrap()
}

async fn partitions(pool: &PgPool) -> String {
    let sql =
        "SELECT string_agg(format('%s: %s to %s', name, coalesce(lower::text, '…'), coalesce(upper::text, '…')), E'\n' ORDER BY upper NULLS FIRST)
               FROM outbox.partition";
    sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
}

/// Lets writers begin the next partition, if this one is in use since before then.
async fn begin_next(pool: &PgPool, older_than: &str) -> (Option<String>, Option<bool>) {
    let begin = "SELECT partition, has_begun FROM outbox.begin_next_partition($1::timestamptz)";
    sqlx::query_as(begin).bind(older_than).fetch_one(pool).await.unwrap()
}

async fn number(pool: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
}

/// Why `event_1` is kept; "retired" when it was not.
async fn retire(pool: &PgPool, without_baseline: bool) -> String {
    let retired = sqlx::query("SELECT outbox.retire_partition('event_1', now() - interval '1 day', $1)");
    match retired.bind(without_baseline).execute(pool).await {
        Ok(_) => "retired".to_owned(),
        Err(error) => error.as_database_error().unwrap().message().to_owned(),
    }
}

#[tokio::test]
async fn a_partition_is_added_under_open_writers_and_readers() {
    let pool = database().await;
    let mut writer = pool.begin().await.unwrap();
    writer.execute(APPEND_ANOTHER).await.unwrap();
    let mut reader = pool.begin().await.unwrap();
    reader.execute("SELECT count(*) FROM outbox.event_1").await.unwrap();

    pool.execute("SELECT outbox.add_partition(1000)").await.unwrap();
    pool.execute("SELECT setval('outbox.position', 1000000)").await.unwrap();
    assert_eq!(append(&pool, 1).await, "outbox.event_2");
    writer.commit().await.unwrap();
    reader.commit().await.unwrap();
    insta::assert_snapshot!(partitions(&pool).await, @r"
    event_default: … to …
    event_1: … to 1000001
    event_2: 1000001 to 1001001
    ");
    // With all that the first one has.
    let shape = "SELECT string_agg(format('%s %s', replace(pg_get_indexdef(indexrelid), $1, 'PARTITION'), indisvalid), E'\n'
                                   ORDER BY pg_get_indexdef(indexrelid))
                 FROM pg_index WHERE indrelid = ('outbox.' || $1)::regclass";
    let shape =
        async |name| sqlx::query_scalar::<_, String>(shape).bind(name).fetch_one(&pool).await.unwrap();
    assert_eq!(shape("event_1").await, shape("event_2").await);
    let checks =
        "SELECT count(*) FROM pg_constraint WHERE contype = 'c' AND conrelid = ('outbox.' || $1)::regclass";
    let checks = async |name| sqlx::query_scalar::<_, i64>(checks).bind(name).fetch_one(&pool).await.unwrap();
    assert_eq!(checks("event_1").await, checks("event_2").await);

    // A lock that somebody keeps is given up soon, and nothing is left half-done.
    let mut locked = pool.begin().await.unwrap();
    locked.execute("LOCK TABLE outbox.event_default IN ACCESS SHARE MODE").await.unwrap();
    let error = pool.execute("SELECT outbox.add_partition(1000)").await.unwrap_err();
    assert_eq!(error.as_database_error().unwrap().code().unwrap(), "55P03");
    locked.rollback().await.unwrap();
    // The error was told before its transaction had quite ended, and until then somebody is at it.
    let added = eventually("it is added", async || {
        let sql = "SELECT outbox.add_partition(1000)";
        let added: Option<String> = sqlx::query_scalar(sql).fetch_one(&pool).await.unwrap();
        added.ok_or_else(|| "somebody is at it".to_owned())
    });
    assert_eq!(added.await, "event_3");
}

#[tokio::test]
async fn what_fell_into_the_net_stays_there_and_the_next_partition_begins_above() {
    let pool = database().await;
    pool.execute("SELECT setval('outbox.position', 1000000)").await.unwrap();
    assert_eq!(append(&pool, 1).await, "outbox.event_default");
    pool.execute("SELECT outbox.add_partition(1000)").await.unwrap();
    assert_eq!(append(&pool, 2).await, "outbox.event_default");
    insta::assert_snapshot!(partitions(&pool).await, @r"
    event_default: … to …
    event_1: … to 1000001
    event_2: 1001001 to 1002001
    ");
    // Writers need not fill it until there.
    assert_eq!(begin_next(&pool, "-infinity").await, (Some("event_default".to_owned()), Some(true)));
    assert_eq!(append(&pool, 3).await, "outbox.event_2");
    assert_eq!(begin_next(&pool, "-infinity").await, (None, None));
    // The net is emptied like any other.
    pool.execute("INSERT INTO outbox.relay (name, low_water, high) VALUES ('default', 1001001, 1001001)")
        .await
        .unwrap();
    let retire = "SELECT outbox.retire_partition('event_default', now() + interval '1 day', true)";
    pool.execute(retire).await.unwrap();
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM outbox.event").fetch_one(&pool).await.unwrap();
    assert_eq!(left, 1);
}

/// Every reason to keep a partition, each taken away in its turn.
#[tokio::test]
async fn a_partition_is_retired_when_nobody_needs_it() {
    let pool = database().await;
    append(&pool, 1).await;
    pool.execute("SELECT outbox.add_partition(1000)").await.unwrap();
    let mut said = vec![("nothing else was done", retire(&pool, false).await)];
    for (step, sql) in [
        ("the next one is in use", "SELECT setval('outbox.position', 1000000)"),
        ("a relay", "INSERT INTO outbox.relay (name) VALUES ('default'), ('other')"),
        ("one has settled", "UPDATE outbox.relay SET low_water = 1000000, high = 1000000 WHERE name = 'default'"),
        (
            "both have, and one set it aside",
            "UPDATE outbox.relay SET low_water = 1000000, high = 1000000;
             INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, payload, created_at, reason, detail)
             SELECT 'default', position, id, aggregate_type, aggregate_id, version, type, payload, created_at, 'unroutable', 'x' FROM outbox.event",
        ),
        (
            "it is replayed",
            "DELETE FROM outbox.parked;
             INSERT INTO outbox.replay (id, next_position, to_position, target, started_by)
             VALUES ('00000000-0000-7000-8000-000000000000', 1, 10, 'queue', 'somebody')",
        ),
        ("the replay died", "UPDATE outbox.replay SET heartbeat_at = now() - interval '2 minutes'"),
        (
            // What a writer says of its events' age tells nothing: one of 2019, imported, is at the end.
            "its writers say that it is old",
            "UPDATE outbox.event SET created_at = '2019-01-01Z'",
        ),
        ("it is old", "SELECT outbox.why_kept('event_1', 'infinity', true);
                       UPDATE outbox.partition_age SET full_since = now() - interval '2 days'"),
    ] {
        pool.execute(sql).await.unwrap();
        said.push((step, retire(&pool, false).await));
    }
    let said: Vec<String> = said
        .into_iter()
        .map(|(step, answer)| format!("{step}: {}", answer.split(" since 20").next().unwrap()))
        .collect();
    let said = said.join("\n");
    insta::assert_snapshot!(said);

    // A newer event does not tell the whole state, a baseline does.
    append(&pool, 2).await;
    assert!(retire(&pool, false).await.contains("neither a baseline"));
    let baseline = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers)
                    VALUES ('thing', 'a', 3, 'thing.baseline', '{}', '{\"baseline\": true}')";
    pool.execute(baseline).await.unwrap();
    assert_eq!(retire(&pool, false).await, "retired");
    assert_eq!(retire(&pool, false).await, "event_1 is kept: it is empty");
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM outbox.event").fetch_one(&pool).await.unwrap();
    assert_eq!(left, 2);

    // An empty one can go, one that holds something cannot.
    let drop = async |name| {
        let dropped = pool.execute(AssertSqlSafe(format!("SELECT outbox.drop_partition('{name}')"))).await;
        dropped.map_or_else(|e| e.as_database_error().unwrap().message().to_owned(), |_| "dropped".to_owned())
    };
    assert_eq!(drop("event_2").await, "event_2 was not retired");
    assert_eq!(drop("event_default").await, "event_default is no partition that could be dropped");
    assert_eq!(drop("event_1").await, "dropped");
    assert_eq!(append(&pool, 4).await, "outbox.event_2");
}

/// Whose last word is that they are gone need no baseline; and it can be given up on.
#[tokio::test]
async fn deleted_aggregates_need_no_baseline() {
    let pool = database().await;
    append(&pool, 1).await;
    let deleted = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                   VALUES ('thing', 'a', 2, 'thing.deleted', '{}'), ('thing', 'b', 1, 'thing.new', '{}')";
    pool.execute(deleted).await.unwrap();
    pool.execute(
        "SELECT outbox.add_partition(1000);
         SELECT setval('outbox.position', 1000000);
         SELECT outbox.why_kept('event_1', 'infinity', true);
         UPDATE outbox.partition_age SET full_since = now() - interval '2 days';
         INSERT INTO outbox.relay (name, low_water, high) VALUES ('default', 1000000, 1000000)",
    )
    .await
    .unwrap();
    assert!(retire(&pool, false).await.contains("of thing/b, for one"));
    assert_eq!(retire(&pool, true).await, "retired");
}

/// What is old enough ends whoever writes and reads, at once, and no event is refused or goes into the net.
#[tokio::test]
async fn writers_begin_the_next_partition_under_open_writers_and_readers() {
    let pool = database().await;
    pool.execute(
        "SELECT outbox.add_partition(1000000), outbox.add_partition(1000);
         INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
         SELECT 'thing', 'of before', n, 'thing.changed', '{}' FROM generate_series(1, 5000) n;
         UPDATE outbox.source SET since = now() - interval '2 days'",
    )
    .await
    .unwrap();
    let mut writer = pool.begin().await.unwrap();
    writer.execute(APPEND_ANOTHER).await.unwrap();
    let mut reader = pool.begin().await.unwrap();
    reader.execute("SELECT count(*) FROM outbox.event").await.unwrap();
    let (stop, began) = (CancellationToken::new(), Arc::new(Barrier::new(5)));
    let writers: Vec<_> = (0..4)
        .map(|n| {
            let (pool, stop, began) = (pool.clone(), stop.clone(), Arc::clone(&began));
            tokio::spawn(async move {
                let sql = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                           VALUES ('thing', $1, $2, 'thing.changed', '{}')";
                let mut version = 0;
                while !stop.is_cancelled() {
                    version += 1;
                    sqlx::query(sql).bind(format!("b{n}")).bind(version).execute(&pool).await.unwrap();
                    if version == 10 {
                        began.wait().await;
                    }
                }
                version
            })
        })
        .collect();
    began.wait().await;
    let age = "SELECT (now() - interval '1 day')::text";
    let age: String = sqlx::query_scalar(age).fetch_one(&pool).await.unwrap();
    assert_eq!(begin_next(&pool, &age).await, (Some("event_1".to_owned()), Some(true)));
    assert_eq!(append(&pool, 1).await, "outbox.event_2");
    // It is in use since now.
    assert_eq!(begin_next(&pool, &age).await, (None, None));
    writer.execute("SELECT outbox.publish('other.changed', 'other', 'c', '{}'::json)").await.unwrap();
    writer.commit().await.unwrap();
    reader.commit().await.unwrap();
    stop.cancel();
    let mut events = 5_000 + 2;
    for writer in writers {
        events += writer.await.unwrap();
    }
    assert_eq!(number(&pool, "SELECT count(*) FROM outbox.event").await, events + 1);
    assert_eq!(number(&pool, "SELECT count(*) FROM outbox.event_default").await, 0);
    // It is used from its beginning on.
    let last = number(&pool, "SELECT max(position) FROM outbox.event_2").await;
    assert!(last < 1_020_000.max(1_000_000 + 2 * events), "{last}");
    let noted = "SELECT count(*) FROM outbox.partition_age
                 WHERE name = 'event_1' AND last_position = 1000000 AND full_since > now() - interval '1 hour'";
    assert_eq!(number(&pool, noted).await, 1);
}

#[tokio::test]
async fn what_does_not_let_writers_begin_the_next_partition() {
    let pool = database().await;
    let nothing = (None, None);
    pool.execute("SELECT outbox.add_partition(1000)").await.unwrap();
    assert_eq!(begin_next(&pool, "infinity").await, nothing, "it has no events");
    append(&pool, 1).await;
    assert_eq!(begin_next(&pool, "2020-01-01Z").await, nothing, "it is too young");
    pool.execute("DROP TABLE outbox.event_2").await.unwrap();
    assert_eq!(begin_next(&pool, "infinity").await, nothing, "there is no next one");
    pool.execute("SELECT outbox.add_partition(1000)").await.unwrap();
    pool.execute("INSERT INTO outbox.relay (name, low_water, high) VALUES ('default', 7, 7)").await.unwrap();
    assert_eq!(begin_next(&pool, "infinity").await, nothing, "the sequence is behind");
    assert_eq!(number(&pool, "SELECT last_value FROM outbox.position").await, 1);
    pool.execute("UPDATE outbox.relay SET low_water = 1, high = 1").await.unwrap();
    let mut another = pool.begin().await.unwrap();
    another.execute("SELECT pg_advisory_xact_lock(1869968482, 2)").await.unwrap();
    assert_eq!(begin_next(&pool, "infinity").await, nothing, "another session is at it");
    another.rollback().await.unwrap();
    assert_eq!(begin_next(&pool, "infinity").await, (Some("event_1".to_owned()), Some(true)));
    assert_eq!(number(&pool, "SELECT last_value FROM outbox.position").await, 1_000_000);
    // Of a very large one, a call leaves out a part.
    pool.execute(
        "DROP TABLE outbox.event_2; SELECT outbox.add_partition(2500000), outbox.add_partition(1000)",
    )
    .await
    .unwrap();
    append(&pool, 2).await;
    for has_begun in [false, false, true] {
        let (name, done) = begin_next(&pool, "infinity").await;
        assert_eq!((name.as_deref(), done), (Some("event_2"), Some(has_begun)));
    }
    assert_eq!(append(&pool, 3).await, "outbox.event_3");
}

/// Writers that have stopped keep nothing: the last event has to be settled, not the positions that were left out.
#[tokio::test]
async fn the_last_partition_of_a_silent_outbox_is_retired() {
    let pool = database().await;
    append(&pool, 1).await;
    pool.execute(
        "SELECT outbox.add_partition(1000); SELECT outbox.begin_next_partition('infinity');
         UPDATE outbox.partition_age SET full_since = now() - interval '2 days';
         INSERT INTO outbox.relay (name) VALUES ('default')",
    )
    .await
    .unwrap();
    assert!(retire(&pool, true).await.contains("only up to position 0, and the last event here is at 1;"));
    pool.execute("UPDATE outbox.relay SET low_water = 1, high = 1").await.unwrap();
    // A writer that took a position before, and is open.
    let mut writer = pool.begin().await.unwrap();
    let late = "INSERT INTO outbox.event (position, aggregate_type, aggregate_id, version, type, payload)
                VALUES (2, 'thing', 'late', 1, 'thing.new', '{}')";
    writer.execute(late).await.unwrap();
    assert!(retire(&pool, true).await.contains("lock timeout"));
    writer.commit().await.unwrap();
    assert!(retire(&pool, true).await.contains("the last event here is at 2;"));
    pool.execute("UPDATE outbox.relay SET low_water = 2, high = 2").await.unwrap();
    assert_eq!(retire(&pool, true).await, "retired");
}

/// What a command explains: in one word, in words, and with some of the aggregates.
#[tokio::test]
async fn what_keeps_a_partition_is_named() {
    let pool = database().await;
    let what = async |most: i32| -> (Option<String>, Vec<String>) {
        let sql = "SELECT kind, aggregates FROM outbox.what_keeps('event_1', now() - interval '1 day', $1)";
        sqlx::query_as(sql).bind(most).fetch_one(&pool).await.unwrap()
    };
    pool.execute(
        "SELECT outbox.add_partition(1000);
         INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
         SELECT 'thing', 'a' || n, 1, 'thing.new', '{}' FROM generate_series(1, 9) n",
    )
    .await
    .unwrap();
    let mut kinds = vec![what(3).await.0];
    for sql in [
        "SELECT outbox.begin_next_partition('infinity')",
        "INSERT INTO outbox.relay (name) VALUES ('default')",
        "UPDATE outbox.relay SET low_water = 9, high = 9",
        "UPDATE outbox.partition_age SET full_since = now() - interval '2 days'",
    ] {
        pool.execute(sql).await.unwrap();
        kinds.push(what(3).await.0);
    }
    let kinds: Vec<String> = kinds.into_iter().flatten().collect();
    assert_eq!(kinds, ["in use", "unread", "unsettled", "young", "lacking"]);
    assert_eq!(what(3).await.1, ["thing/a1", "thing/a2", "thing/a3"]);
    assert_eq!(what(20).await.1.len(), 9);
    pool.execute(
        "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
         SELECT 'thing', 'a' || n, 2, 'thing.deleted', '{}' FROM generate_series(1, 8) n",
    )
    .await
    .unwrap();
    assert_eq!(what(3).await, (Some("lacking".to_owned()), vec!["thing/a9".to_owned()]));
    pool.execute(
        "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
         VALUES ('thing', 'a9', 2, 'thing.deleted', '{}')",
    )
    .await
    .unwrap();
    assert_eq!(what(3).await, (None, vec![]));
}
