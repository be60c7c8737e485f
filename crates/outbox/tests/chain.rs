//! The outbox owns the chains: whatever does not continue one is its writer's error, over real PostgreSQL.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::{
    borrow::Cow,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use devstack::testing::until;
use outbox::{install, migrator};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, PgPool};
use uuid::Uuid;

/// A database with the outbox of the source `shop`, and the pool of a role that may only write.
async fn database(name: &str) -> (PgPool, PgPool) {
    let url = devstack::testing::database(name).await;
    let pool = PgPool::connect(&url).await.unwrap();
    install(&mut pool.acquire().await.unwrap(), "shop").await.unwrap();
    (pool.clone(), writer(&url, &pool).await)
}

async fn writer(url: &str, pool: &PgPool) -> PgPool {
    let role = format!("writer_{}", Uuid::now_v7().simple());
    for sql in [
        format!("CREATE ROLE {role} LOGIN PASSWORD 'wr1ter'"),
        format!("SELECT outbox.grant_writer('{role}')"),
    ] {
        pool.execute(AssertSqlSafe(sql)).await.unwrap();
    }
    let options: sqlx::postgres::PgConnectOptions = url.parse().unwrap();
    PgPool::connect_with(options.username(&role).password("wr1ter")).await.unwrap()
}

/// An INSERT of a list of `aggregate version` or `aggregate version type`; `_` stands for a space in an id.
fn insert(events: &str) -> String {
    let rows: Vec<String> = events
        .split(", ")
        .map(|event| {
            let mut words = event.split(' ');
            let (id, version) = (words.next().unwrap().replace('_', " "), words.next().unwrap());
            format!("('order', '{id}', {version}, 'order.{}', '{{}}')", words.next().unwrap_or("changed"))
        })
        .collect();
    format!(
        "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload) VALUES {}",
        rows.join(", ")
    )
}

/// What becomes of it: `taken`, or the error's code, words and hint.
async fn said(db: &mut PgConnection, sql: String) -> String {
    match db.execute(AssertSqlSafe(sql)).await {
        Ok(_) => "taken".to_owned(),
        Err(error) => {
            let error = error.into_database_error().unwrap();
            let error = error.downcast_ref::<sqlx::postgres::PgDatabaseError>();
            format!("{} {}\n  {}", error.code(), error.message(), error.hint().unwrap_or_default())
        }
    }
}

/// Each aggregate's stored events, which are chains, as `id versions`; fails where one is none: a version, a position or
/// an id does not follow the one before it, or the chain does not end with the last one.
async fn chains(pool: &PgPool) -> String {
    let broken: Vec<String> = sqlx::query_scalar(
        "SELECT format('%s/%s %s', e.aggregate_type, e.aggregate_id, e.version)
         FROM (SELECT e.*, lag(e.id) OVER w AS before, lag(e.version) OVER w AS version_before, lead(e.id) OVER w AS next
               FROM outbox.event e
               WINDOW w AS (PARTITION BY e.aggregate_type, e.aggregate_id ORDER BY e.position)) AS e
         LEFT JOIN outbox.aggregate a ON (a.aggregate_type, a.aggregate_id) = (e.aggregate_type, e.aggregate_id)
         WHERE e.before IS NOT NULL AND (e.version <> e.version_before + 1 OR e.previous_id <> e.before)
            OR e.previous_id IS NULL
            OR e.next IS NULL AND (a.version, a.last_event_id, a.last_position) IS DISTINCT FROM (e.version, e.id, e.position)",
    )
    .fetch_all(pool)
    .await
    .unwrap();
    assert!(broken.is_empty(), "{broken:?}");
    sqlx::query_scalar(
        "SELECT coalesce(string_agg(concat_ws(' ', id, versions, state), ', ' ORDER BY id), '')
         FROM (SELECT a.aggregate_id AS id, string_agg(e.version::text, '-' ORDER BY e.position) AS versions, a.state
               FROM outbox.aggregate a LEFT JOIN outbox.event e USING (aggregate_type, aggregate_id)
               GROUP BY a.aggregate_id, a.state) AS c",
    )
    .fetch_one(pool)
    .await
    .unwrap()
}

#[tokio::test]
async fn each_mistake_is_its_writers_error() {
    let (pool, writer) = database("chain_mistakes").await;
    pool.execute("SELECT outbox.add_partition(1000)").await.unwrap();
    let mut db = writer.acquire().await.unwrap();
    let mut told = Vec::new();
    for (what, events) in [
        ("begun", "a 1 new, a 2"),
        ("skipped", "a 4"),
        ("repeated", "a 2"),
        ("repeated in one statement", "a 3, a 3"),
        ("reborn", "a 1 new"),
        ("begun in the middle", "b 2"),
        ("two chains at once", "a 3, b 1 new, a 4"),
        ("one of two skips", "b 2, a 6"),
        ("ended", "a 5 deleted"),
        ("reborn after its end", "a 1 new"),
        ("goes on after its end", "a 6 new"),
    ] {
        told.push(format!("{what}: {events}: {}", said(&mut db, insert(events)).await));
    }
    // In the next partition, whose own index has nothing of it.
    pool.execute("SELECT setval('outbox.position', 1000000)").await.unwrap();
    for (what, events) in [
        ("repeated across partitions", "a 6"),
        ("reborn across partitions", "b 1 new"),
        ("goes on across partitions", "a 7, b 2"),
    ] {
        told.push(format!("{what}: {events}: {}", said(&mut db, insert(events)).await));
    }
    // After retention.
    pool.execute("TRUNCATE outbox.event_1").await.unwrap();
    for (what, events) in
        [("reborn after retention", "a 1 new"), ("skipped after retention", "b 4"), ("goes on", "b 3")]
    {
        told.push(format!("{what}: {events}: {}", said(&mut db, insert(events)).await));
    }
    let forged =
        insert("b 9").replace("payload)", "payload, previous_id)").replace("'{}')", "'{}', outbox.uuid7())");
    told.push(format!("with a predecessor of its own: {}", said(&mut db, forged).await));
    told.push(format!(
        "the chain by hand: {}",
        said(&mut db, "DELETE FROM outbox.aggregate".to_owned()).await
    ));
    insta::assert_snapshot!(told.join("\n"));
    insta::assert_snapshot!(chains(&pool).await, @"a 7 live, b 2-3 live");
}

/// As object-relational mappers write, and what else there is besides an INSERT.
#[tokio::test]
async fn every_way_to_insert_continues_the_chain() {
    let (pool, writer) = database("chain_ways").await;
    let mut db = writer.acquire().await.unwrap();
    let returned: (Uuid, i64, Uuid) =
        sqlx::query_as(AssertSqlSafe(insert("a 1 new") + " RETURNING id, version, previous_id"))
            .fetch_one(&mut *db)
            .await
            .unwrap();
    assert_eq!((returned.1, returned.2), (1, Uuid::nil()));
    let next: Uuid = sqlx::query_scalar(AssertSqlSafe(insert("a 2") + " RETURNING previous_id"))
        .fetch_one(&mut *db)
        .await
        .unwrap();
    assert_eq!(next, returned.0, "each event names the one before it");
    let mut copy = db
        .copy_in_raw("COPY outbox.event (aggregate_type, aggregate_id, version, type, payload) FROM STDIN")
        .await
        .unwrap();
    copy.send("order\ta\t3\torder.changed\t{}\norder\tb\t1\torder.new\t{}\n".as_bytes()).await.unwrap();
    copy.finish().await.unwrap();
    let mut copy = db
        .copy_in_raw("COPY outbox.event (aggregate_type, aggregate_id, version, type, payload) FROM STDIN")
        .await
        .unwrap();
    copy.send("order\ta\t5\torder.changed\t{}\n".as_bytes()).await.unwrap();
    let refused = copy.finish().await.unwrap_err();
    assert_eq!(refused.as_database_error().unwrap().message(), "the next version of order/a is 4, and not 5");
    // A superuser that only copies.
    let mut copies = pool.acquire().await.unwrap();
    copies.execute("SET session_replication_role = replica").await.unwrap();
    assert_eq!(said(&mut copies, insert("a 4")).await, "taken");
    assert!(said(&mut copies, insert("a 6")).await.contains("is 5, and not 6"));
    copies.execute("RESET session_replication_role").await.unwrap();
    // One id begins like another: the place of its last row is not mistaken for the other's.
    db.execute("BEGIN").await.unwrap();
    for events in ["x 1", "x_(0,1) 1", "x 2", "x_(0,1) 2", "x_y 1", "x 3", "a 5"] {
        assert_eq!(said(&mut db, insert(events)).await, "taken", "{events}");
    }
    db.execute("COMMIT").await.unwrap();
    insta::assert_snapshot!(chains(&pool).await, @"a 1-2-3-4-5 live, b 1 live, x 1-2-3 live, x (0,1) 1-2 live, x y 1 live");
}

/// Writers that begin the first chains of two types wait for nobody.
#[tokio::test]
async fn the_first_events_of_types_do_not_wait_for_each_other() {
    let (pool, writer) = database("chain_types").await;
    let (mut one, mut other) = (writer.begin().await.unwrap(), writer.begin().await.unwrap());
    let another = |sql: String| sql.replace("'order'", "'invoice'");
    for (db, id) in [(&mut one, "a"), (&mut other, "b")] {
        db.execute("SET LOCAL lock_timeout = '1s'").await.unwrap();
        assert_eq!(said(db, insert(&format!("{id} 1"))).await, "taken");
    }
    assert_eq!(said(&mut other, another(insert("b 1"))).await, "taken");
    assert_eq!(said(&mut one, another(insert("a 1"))).await, "taken");
    other.rollback().await.unwrap();
    one.commit().await.unwrap();
    assert_eq!(said(&mut writer.acquire().await.unwrap(), insert("b 1")).await, "taken");
    let types: Vec<(String, String)> =
        sqlx::query_as("SELECT aggregate_type, numbered_by FROM outbox.aggregate_type ORDER BY 1")
            .fetch_all(&pool)
            .await
            .unwrap();
    assert_eq!(types, [("invoice".into(), "writer".into()), ("order".into(), "writer".into())]);
}

/// Once the outbox counts a type's versions, a writer that counts by itself is refused, and the other way round.
#[tokio::test]
async fn a_type_is_counted_by_one_side() {
    let (pool, writer) = database("chain_sides").await;
    let mut db = writer.acquire().await.unwrap();
    assert_eq!(said(&mut db, insert("a 1 new")).await, "taken");
    pool.execute("SELECT outbox.number_by('order', 'outbox')").await.unwrap();
    insta::assert_snapshot!(said(&mut db, insert("a 2")).await, @r"
55000 the outbox counts the versions of the type order, and the event of order/a has its own version, 2
  Use outbox.publish, which takes the next version. To let the writers of this type count, the owner of the outbox calls outbox.number_by.
");
    insta::assert_snapshot!(said(&mut db, "SELECT outbox.number_by('order', 'writer')".to_owned()).await, @"42501 permission denied for function number_by");
    let mut owner = pool.acquire().await.unwrap();
    insta::assert_snapshot!(said(&mut owner, "SELECT outbox.number_by('order', 'me')".to_owned()).await, @"22023 the versions of a type are counted by 'outbox' or by 'writer', and not by 'me'");
    pool.execute("SELECT outbox.number_by('order', 'writer')").await.unwrap();
    assert_eq!(said(&mut db, insert("a 2")).await, "taken");
}

/// A writer that takes its position before the aggregate's lock, as a plain INSERT does, may have one below that of an event
/// that was committed meanwhile. It is told to repeat.
#[tokio::test]
async fn positions_rise_with_versions() {
    let (pool, writer) = database("chain_positions").await;
    let mut owner = pool.acquire().await.unwrap();
    assert_eq!(said(&mut owner, insert("a 1 new")).await, "taken");
    // Position 2 is taken, and its event written after those of position 3.
    let late = insert("a 3")
        .replace("(aggregate_type", "(position, aggregate_type")
        .replace("('order'", "(2, 'order'");
    pool.execute("SELECT nextval('outbox.position')").await.unwrap();
    assert_eq!(said(&mut writer.acquire().await.unwrap(), insert("a 2")).await, "taken");
    insta::assert_snapshot!(said(&mut owner, late).await, @r"
40001 version 3 of order/a has position 2, which is not above 3, the position of version 2
  Another transaction wrote an event of the aggregate after this one had taken its position. Repeat the transaction, and lock the aggregate's row before the INSERT. If this fails every time, the sequence outbox.position is behind: run outbox-relay recover --sequence.
");
    // In the one statement, versions against the order of positions.
    let backwards =
        "INSERT INTO outbox.event (position, aggregate_type, aggregate_id, version, type, payload)
                     SELECT 20 - v, 'order', 'a', v, 'order.changed', '{}' FROM generate_series(3, 4) v";
    assert!(said(&mut owner, backwards.to_owned()).await.starts_with("40001"));
    assert_eq!(said(&mut owner, insert("a 3")).await, "taken");
    insta::assert_snapshot!(chains(&pool).await, @"a 1-2-3 live");
}

/// Eight writers at a few aggregates, with and without a row lock of their own, at two levels of isolation, with savepoints
/// and rollbacks: some are told to repeat, and the chains hold.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chains_hold_under_concurrent_writers() {
    let (pool, writer) = database("chain_writers").await;
    // Some lock the chain first and their row then, which deadlocks with the others.
    pool.execute("DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET deadlock_timeout = 10', current_database()); END $$")
        .await
        .unwrap();
    pool.execute(
        "CREATE TABLE item (id text PRIMARY KEY, version bigint NOT NULL); GRANT ALL ON item TO PUBLIC;
                  INSERT INTO item SELECT n::text, 0 FROM generate_series(0, 4) n",
    )
    .await
    .unwrap();
    let writers = (0..8).map(|number: u64| {
        let writer = writer.clone();
        tokio::spawn(async move {
            let mut db = writer.acquire().await.unwrap().detach();
            let (mut taken, mut refused) = (0, 0);
            for round in 0..120_u64 {
                let dice = (number * 7_919 + round * 104_729) % 1_000;
                let id = dice % 5;
                let isolation = if dice.is_multiple_of(3) { "REPEATABLE READ" } else { "READ COMMITTED" };
                let lock = if dice.is_multiple_of(4) { "" } else { "FOR UPDATE" };
                let add = format!(
                    "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                     SELECT 'order', id, version + 1, 'order.changed', '{{}}' FROM item WHERE id = '{id}' {lock}"
                );
                let next = format!("UPDATE item SET version = version + 1 WHERE id = '{id}'");
                let mut steps = vec![format!("BEGIN ISOLATION LEVEL {isolation}")];
                if dice.is_multiple_of(5) {
                    steps.extend(["SAVEPOINT s".into(), add.clone(), next.clone(), "ROLLBACK TO s".into()]);
                }
                steps.extend([add.clone(), next.clone()]);
                if dice.is_multiple_of(7) {
                    steps.extend([add, next]);
                }
                steps.push(if dice.is_multiple_of(11) { "ROLLBACK" } else { "COMMIT" }.to_owned());
                let mut done = true;
                for step in steps {
                    if let Err(error) = db.execute(AssertSqlSafe(step)).await {
                        let error = error.into_database_error().unwrap();
                        let code = error.code().unwrap();
                        assert!(["40001", "40P01", "23505", "23000"].contains(&&*code), "{error}");
                        db.execute("ROLLBACK").await.unwrap();
                        done = false;
                        break;
                    }
                }
                if done { taken += 1 } else { refused += 1 }
            }
            (taken, refused)
        })
    });
    let mut total = (0, 0);
    for writer in writers.collect::<Vec<_>>() {
        let (taken, refused) = writer.await.unwrap();
        total = (total.0 + taken, total.1 + refused);
    }
    assert!(total.0 > 100 && total.1 > 0, "{total:?} were taken and refused");
    chains(&pool).await;
    let behind: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM item i JOIN outbox.aggregate a ON a.aggregate_id = i.id WHERE i.version <> a.version",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(behind, 0);
}

/// The blocks that one transaction touches for so many events of one aggregate.
async fn blocks(pool: &PgPool, id: &str, events: i64) -> i64 {
    let plan: serde_json::Value = sqlx::query_scalar(AssertSqlSafe(format!(
        "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON)
         INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
         SELECT 'order', '{id}', n, 'order.changed', '{{}}' FROM generate_series(1, {events}) n"
    )))
    .fetch_one(pool)
    .await
    .unwrap();
    plan[0]["Plan"]["Shared Hit Blocks"].as_i64().unwrap()
}

/// A transaction may write a long stretch of one chain: each event costs as much as the one before.
#[tokio::test]
async fn a_long_transaction_is_linear() {
    let (pool, _) = database("chain_long").await;
    let (short, long) = (blocks(&pool, "a", 1_000).await, blocks(&pool, "b", 8_000).await);
    assert!(long < 10 * short, "{short} blocks for 1,000 events, {long} for 8,000");
}

/// An installation from before, which has history, is written to while it is brought up to date.
async fn before(name: &str) -> (PgPool, PgPool) {
    let url = devstack::testing::database(name).await;
    let pool = PgPool::connect(&url).await.unwrap();
    let mut migrator = migrator();
    migrator.migrations =
        Cow::Owned(migrator.migrations.iter().filter(|m| m.version < 20).cloned().collect());
    let mut conn = PgConnection::connect(&url).await.unwrap();
    migrator.run(&mut conn).await.unwrap();
    pool.execute("INSERT INTO outbox.source (name) VALUES ('shop')").await.unwrap();
    (pool.clone(), writer(&url, &pool).await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_installed_beside_writers() {
    let (pool, writer) = before("chain_install").await;
    pool.execute("SELECT outbox.add_partition(1000)").await.unwrap();
    pool.execute(
        "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
         SELECT 'order', n % 500, n / 500 + 1, CASE WHEN n = 999 THEN 'order.deleted' ELSE 'order.changed' END, '{}'
         FROM generate_series(0, 999) n;
         SELECT setval('outbox.position', 1000000)",
    )
    .await
    .unwrap();
    let end = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..4)
        .map(|number| {
            let (end, writer) = (end.clone(), writer.clone());
            tokio::spawn(async move {
                let mut version = 0;
                while !end.load(Ordering::Relaxed) {
                    let next = insert(&format!("w{number} {}", version + 1));
                    match writer.execute(AssertSqlSafe(next)).await {
                        Ok(_) => version += 1,
                        Err(error) => panic!("{error}"),
                    }
                }
                version
            })
        })
        .collect();
    let count = async || {
        let sql = "SELECT count(*) FROM outbox.event WHERE aggregate_id LIKE 'w%'";
        sqlx::query_scalar::<_, i64>(sql).fetch_one(&pool).await.unwrap()
    };
    until("the writers are under way", async || count().await > 100).await;
    install(&mut pool.acquire().await.unwrap(), "shop").await.unwrap();
    let before = count().await;
    until("the writers go on", async || count().await > before + 100).await;
    end.store(true, Ordering::Relaxed);
    for (number, writer) in writers.into_iter().enumerate() {
        let version: i64 = writer.await.unwrap();
        let stored: i64 =
            sqlx::query_scalar("SELECT version FROM outbox.aggregate WHERE aggregate_id = 'w' || $1")
                .bind(i64::try_from(number).unwrap())
                .fetch_one(&pool)
                .await
                .unwrap();
        assert_eq!(stored, version);
    }
    let filled: (i64, i64, i64) = sqlx::query_as(
        "SELECT count(*), sum(version)::bigint, count(*) FILTER (WHERE state = 'ended') FROM outbox.aggregate
         WHERE aggregate_id NOT LIKE 'w%'",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(filled, (500, 1_000, 1));
    let refused = said(&mut writer.acquire().await.unwrap(), insert("7 2")).await;
    assert!(refused.contains("the next version of order/7 is 3, and not 2"), "{refused}");
}

/// Where history was retired before the chains began, the first version that comes is believed.
#[tokio::test]
async fn a_chain_whose_history_is_gone_is_taken_up() {
    let (pool, writer) = before("chain_retired").await;
    for sql in [
        "SELECT outbox.add_partition(1000)",
        "SELECT setval('outbox.position', 1000000)",
        "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
         VALUES ('order', 'a', 8, 'order.changed', '{}')",
        "DROP TABLE outbox.event_1",
    ] {
        pool.execute(sql).await.unwrap();
    }
    install(&mut pool.acquire().await.unwrap(), "shop").await.unwrap();
    let mut db = writer.acquire().await.unwrap();
    let mut told = Vec::new();
    for events in ["a 10", "a 9", "b 5", "b 7", "b 6", "c 1"] {
        told.push(format!("{events}: {}", said(&mut db, insert(events)).await.lines().next().unwrap()));
    }
    insta::assert_snapshot!(told.join("\n"), @r"
a 10: 23000 the next version of order/a is 9, and not 10
a 9: taken
b 5: taken
b 7: 23000 the next version of order/b is 6, and not 7
b 6: taken
c 1: taken
");
}

/// What an operator's functions write goes on from the chain, and the next writer goes on from that.
#[tokio::test]
async fn repairs_continue_the_chains() {
    let (pool, writer) = database("chain_repairs").await;
    let mut owner = pool.acquire().await.unwrap();
    let mut db = writer.acquire().await.unwrap();
    assert_eq!(said(&mut db, insert("a 1 new, b 1 new, a 2")).await, "taken");
    owner.execute("SELECT outbox.begin_incarnation(NULL)").await.unwrap();
    owner.execute("UPDATE outbox.source SET from_position = 3").await.unwrap();
    assert_eq!(said(&mut db, insert("b 2")).await, "taken");
    let ended: i64 =
        sqlx::query_scalar("SELECT outbox.end_lost('{order,order,order}', '{a,b,lost}', '{7,1,3}')")
            .fetch_one(&mut *owner)
            .await
            .unwrap();
    assert_eq!(ended, 2, "b has begun anew");
    assert_eq!(said(&mut db, insert("a 9 new, lost 5 new, b 3")).await, "taken");
    // A sequence that stood behind while the next event was written.
    owner
        .execute("INSERT INTO outbox.relay (name, low_water, high) VALUES ('default', 20, 20)")
        .await
        .unwrap();
    assert_eq!(said(&mut db, insert("c 1 new")).await, "taken");
    let (moved, last): (i64, i64) = sqlx::query_as(
        "SELECT m.moved, m.stands_at FROM outbox.event e CROSS JOIN outbox.mend_sequence(e.position) m
             WHERE e.aggregate_id = 'c'",
    )
    .fetch_one(&mut *owner)
    .await
    .unwrap();
    assert_eq!((moved, last), (1, 21));
    let ends: i64 = sqlx::query_scalar("SELECT last_position FROM outbox.aggregate WHERE aggregate_id = 'c'")
        .fetch_one(&mut *owner)
        .await
        .unwrap();
    assert_eq!(ends, 21);
    assert_eq!(said(&mut db, insert("c 2")).await, "taken");
    let sql =
        "SELECT string_agg(concat_ws(' ', position, aggregate_id, version, type), E'\\n' ORDER BY position)
               FROM outbox.event";
    let stored: String = sqlx::query_scalar(sql).fetch_one(&pool).await.unwrap();
    insta::assert_snapshot!(stored, @r"
    1 a 1 order.new
    2 b 1 order.new
    3 a 2 order.changed
    4 b 2 order.changed
    5 a 8 order.deleted
    6 lost 4 order.deleted
    7 a 9 order.new
    8 lost 5 order.new
    9 b 3 order.changed
    21 c 1 order.new
    22 c 2 order.changed
    ");
}
