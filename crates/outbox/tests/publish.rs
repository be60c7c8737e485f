//! The promises of `outbox.publish` and `outbox.lock`, over real PostgreSQL: which versions, in which order, with which
//! bodies, by whom.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use devstack::testing::until;
use outbox::{
    AppendError, Event, NewEvent, Published, append, database::Failure, install, lock, lock_all, migrator,
    publish, publish_all,
};
use serde::Serialize;
use serde_json::{Value, json, value::RawValue};
use sqlx::{
    AssertSqlSafe, Connection, PgConnection, PgPool, Postgres, Transaction, postgres::PgDatabaseError,
};
use tokio::{sync::Barrier, time::timeout};
use uuid::Uuid;

const LIMIT: Duration = devstack::testing::DEADLINE;

/// Orders with lines, and the function that reads an order's body. The order has no version and no row to lock.
const SHOP: &str = "CREATE SCHEMA shop;
    CREATE TABLE shop.line (order_id bigint, writer int, amount int);
    CREATE FUNCTION shop.order_body(bigint) RETURNS json LANGUAGE sql STABLE
        RETURN (SELECT json_build_object('id', $1, 'lines', count(*), 'amount', coalesce(sum(amount), 0))
                FROM shop.line WHERE order_id = $1)";

/// A database with the outbox of the source `test`, and a shop.
async fn database() -> PgPool {
    let pool = PgPool::connect(&devstack::testing::database("publish").await).await.unwrap();
    install(&mut pool.acquire().await.unwrap(), "test").await.unwrap();
    execute(&pool, SHOP).await;
    pool
}

async fn execute(pool: &PgPool, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(pool).await.unwrap();
}

async fn texts(pool: &PgPool, sql: &'static str) -> Vec<String> {
    sqlx::query_scalar(sql).fetch_all(pool).await.unwrap()
}

async fn count(pool: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
}

/// Takes a role that belongs to the whole server; whichever test process comes first makes it.
async fn as_role(pool: &PgPool, role: &str, grants: &str) -> PgConnection {
    let sql = format!(
        "DO $$ BEGIN CREATE ROLE {role}; EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$; {grants}"
    );
    execute(pool, &sql).await;
    let mut conn = pool.acquire().await.unwrap().detach();
    sqlx::query(AssertSqlSafe(format!("SET ROLE {role}"))).execute(&mut conn).await.unwrap();
    conn
}

/// Runs each statement alone, and says what the server said: the code, the words, the advice.
async fn said(conn: &mut PgConnection, statements: &[&str]) -> String {
    let mut all = Vec::new();
    for sql in statements {
        let answer = match sqlx::query(AssertSqlSafe((*sql).to_owned())).execute(&mut *conn).await {
            Ok(_) => "done".to_owned(),
            Err(error) => words(&error),
        };
        all.push(format!("{}\n  {answer}", sql.split_whitespace().collect::<Vec<_>>().join(" ")));
    }
    all.join("\n")
}

fn words(error: &sqlx::Error) -> String {
    let Some(db) = error.as_database_error() else { panic!("{error}") };
    let hint = db.try_downcast_ref::<PgDatabaseError>().unwrap().hint();
    let hint = hint.map_or_else(String::new, |hint| format!("\n  {hint}"));
    format!("{} {}{hint}", db.code().unwrap(), db.message())
}

fn new_event(version: i64) -> NewEvent {
    NewEvent {
        id: Uuid::now_v7(),
        aggregate_type: "order".into(),
        aggregate_id: "1".to_owned(),
        version,
        type_: "order.changed".into(),
        payload: RawValue::from_string("{}".to_owned()).unwrap(),
        headers: None,
    }
}

/// An event of an order that says which one of its statement it is.
fn nth(order: &str, n: usize) -> Event {
    Event::new("order.changed", "order", order, &json!({ "n": n }))
}

/// Every aggregate's versions are 1 to n, rise with the positions, and each event names the one before it; the chain names
/// the last one.
async fn chains_are_whole(pool: &PgPool) {
    let wrong = texts(
        pool,
        "SELECT e.aggregate_id || ' ' || e.version FROM (
             SELECT *, row_number() OVER by_position AS n, lag(id) OVER by_position AS before,
                    lead(id) OVER by_position IS NULL AS is_last
             FROM outbox.event WINDOW by_position AS (PARTITION BY aggregate_type, aggregate_id ORDER BY position)) e
         JOIN outbox.aggregate a USING (aggregate_type, aggregate_id)
         WHERE e.version <> e.n OR e.previous_id <> coalesce(e.before, '00000000-0000-0000-0000-000000000000')
            OR e.is_last AND (a.version, a.last_event_id, a.last_position) <> (e.version, e.id, e.position)",
    )
    .await;
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[derive(Serialize)]
struct Order {
    id: i64,
    status: String,
}

#[tokio::test]
async fn an_event_needs_no_version_and_no_row() {
    let pool = database().await;
    let order = Order { id: 7, status: "paid".to_owned() };
    let owned = format!("order.{}", order.status);
    let id = Uuid::now_v7();
    let mut tx = pool.begin().await.unwrap();
    let first =
        publish(&mut tx, Event::new("order.new", "order", order.id.to_string(), &order)).await.unwrap();
    // Names that are made at run time, and bytes as they are written.
    let bytes = RawValue::from_string(r#"{ "a" : 1.10,"a":123456789012345.6789 }"#.to_owned()).unwrap();
    let event = Event::new(owned, "order".to_owned(), "7", &bytes).id(id).header("tenant", "north");
    let second = publish(&mut tx, event.header("baseline", true)).await.unwrap();
    let function = Event::reading("order.changed", "order", "7", "shop.order_body");
    let third = publish(&mut tx, function).await.unwrap();
    assert_eq!(
        count(&pool, "SELECT count(*) FROM outbox.event").await,
        0,
        "nobody sees it before the commit"
    );
    tx.commit().await.unwrap();
    assert_eq!(second, Published { id, version: 2 });
    let stored: Vec<(Uuid, i64)> = sqlx::query_as("SELECT id, version FROM outbox.event ORDER BY position")
        .fetch_all(&pool)
        .await
        .unwrap();
    assert_eq!(stored, [first, second, third].map(|published| (published.id, published.version)));
    let rows = texts(
        &pool,
        "SELECT concat_ws(' | ', position, type, aggregate_type, aggregate_id, version, payload, headers)
         FROM outbox.event ORDER BY position",
    )
    .await;
    insta::assert_snapshot!(rows.join("\n"));
    chains_are_whole(&pool).await;
}

#[tokio::test]
async fn versions_rise_with_positions_in_one_statement() {
    let pool = database().await;
    // Their aggregates are in no order, and come again.
    let events: Vec<Event> = (0..300).map(|n| nth(["b", "a", "c"][n % 3], n)).collect();
    let mut tx = pool.begin().await.unwrap();
    assert_eq!(publish_all(&mut tx, &[]).await.unwrap(), []);
    let published = publish_all(&mut tx, &events).await.unwrap();
    tx.commit().await.unwrap();
    let stored: Vec<(Uuid, i64, i64)> =
        sqlx::query_as("SELECT id, version, (payload ->> 'n')::bigint FROM outbox.event ORDER BY position")
            .fetch_all(&pool)
            .await
            .unwrap();
    let sent: Vec<(Uuid, i64, i64)> =
        published.iter().zip(0..).map(|(published, n)| (published.id, n / 3 + 1, n)).collect();
    assert_eq!(stored, sent);
    assert!(published.iter().zip(0..).all(|(published, n)| published.version == n / 3 + 1));
    execute(
        &pool,
        "SELECT outbox.publish('order.changed', 'order', 'd', to_json(n)) FROM generate_series(1, 300) n;
         SELECT outbox.publish('order.changed', 'order', n::text, '{}') FROM generate_series(1, 300) n;
         -- One id begins like another: the place of its last row is not mistaken for the other's.
         SELECT outbox.publish('order.changed', 'order', id, '{}'), outbox.lock('order', id)
         FROM unnest('{x,\"x (0,1)\",x,\"x (0,1)\",x y,x}'::text[]) id",
    )
    .await;
    chains_are_whole(&pool).await;
}

/// The end of an aggregate, and a key that comes again.
#[tokio::test]
async fn an_aggregate_that_comes_again_goes_on() {
    let pool = database().await;
    execute(
        &pool,
        "SELECT outbox.publish('order.new', 'order', '1', '{}');
         SELECT outbox.publish('order.deleted', 'order', '1', '{\"id\": 1}')",
    )
    .await;
    let chain = "SELECT version || ' ' || state FROM outbox.aggregate";
    assert_eq!(texts(&pool, chain).await, ["2 ended"]);
    execute(&pool, "SELECT outbox.publish('order.new', 'order', '1', '{}')").await;
    assert_eq!(texts(&pool, chain).await, ["3 live"]);
    chains_are_whole(&pool).await;
}

/// A transaction of a writer.
async fn write(tx: &mut Transaction<'_, Postgres>, writer: usize, step: usize) -> Result<bool, AppendError> {
    let order = (writer * 7 + step * 3) % 4;
    let other = (order + 1 + step % 3) % 4;
    let line = async |tx: &mut Transaction<'_, Postgres>, order: usize| {
        sqlx::query("INSERT INTO shop.line VALUES ($1, $2, $3)")
            .bind(i64::try_from(order).unwrap())
            .bind(i32::try_from(writer).unwrap())
            .bind(i32::try_from(step).unwrap())
            .execute(&mut **tx)
            .await
    };
    let event = |order: usize| Event::reading("order.changed", "order", order.to_string(), "shop.order_body");
    line(tx, order).await?;
    if step.is_multiple_of(4) {
        let mut savepoint = tx.begin().await?;
        line(&mut savepoint, order).await?;
        publish(&mut savepoint, event(order)).await?;
        savepoint.rollback().await?;
    }
    if step.is_multiple_of(3) {
        line(tx, other).await?;
        publish_all(tx, &[event(order), event(other), event(order)]).await?;
    } else {
        publish(tx, event(order)).await?;
    }
    Ok(step % 5 != 2)
}

/// Eight writers, each of them in both isolation levels. Nothing is locked but the chains.
#[tokio::test]
async fn writers_at_once_leave_no_hole_and_no_stale_body() {
    let pool = database().await;
    let writer = async |pool: PgPool, writer: usize| {
        let mut conflicts = 0_u32;
        let mut conn = pool.acquire().await.unwrap();
        for step in 0..40 {
            loop {
                let begin = if (writer + step).is_multiple_of(2) {
                    "BEGIN ISOLATION LEVEL READ COMMITTED"
                } else {
                    "BEGIN ISOLATION LEVEL REPEATABLE READ"
                };
                let mut tx = conn.begin_with(begin).await.unwrap();
                match write(&mut tx, writer, step).await {
                    Ok(true) => tx.commit().await.unwrap(),
                    Ok(false) => tx.rollback().await.unwrap(),
                    Err(error @ AppendError::Conflict(_)) => {
                        // No deadlock: who locks several locks them in order. (But READ COMMITTED meets none at all.)
                        let code = error.database().and_then(|db| db.as_database_error()?.code());
                        assert_eq!(code.as_deref(), Some("40001"), "{error}");
                        assert!(begin.ends_with("REPEATABLE READ"), "{error}");
                        conflicts += 1;
                        continue;
                    }
                    Err(error) => panic!("{error}"),
                }
                break;
            }
        }
        conflicts
    };
    let writers: Vec<_> = (0..8).map(|n| tokio::spawn(writer(pool.clone(), n))).collect();
    let mut conflicts = 0;
    for writer in writers {
        conflicts += timeout(LIMIT, writer).await.unwrap().unwrap();
    }
    assert!(conflicts > 0, "they did not meet");
    chains_are_whole(&pool).await;
    // The position of the last event is the highest, and its body is what is in the table.
    let stale = texts(
        &pool,
        "SELECT e.aggregate_id || ': ' || e.payload || ' is not ' || shop.order_body(e.aggregate_id::bigint)
         FROM outbox.event e JOIN outbox.aggregate a ON a.last_event_id = e.id
         WHERE e.payload::text <> shop.order_body(e.aggregate_id::bigint)::text",
    )
    .await;
    assert!(stale.is_empty(), "{stale:?}");
    assert_eq!(count(&pool, "SELECT count(*) FROM outbox.aggregate").await, 4);
}

/// What the documents warn of: an argument is evaluated before the lock. A body that is read under it is not stale.
#[tokio::test]
async fn a_body_that_is_read_under_the_lock_has_what_was_waited_for() {
    let pool = database().await;
    execute(&pool, "INSERT INTO shop.line VALUES (1, 0, 1), (2, 0, 1)").await;
    let mut bodies = Vec::new();
    for (order, late) in [
        ("1", "SELECT outbox.publish('order.changed', 'order', '1', (SELECT shop.order_body(1)))"),
        ("2", "SELECT outbox.publish('order.changed', 'order', '2', body => 'shop.order_body')"),
        ("2", "SELECT outbox.publish('order.changed', 'order', '2', body => 'shop.order_body(bigint)')"),
    ] {
        let mut tx = pool.begin().await.unwrap();
        sqlx::query("INSERT INTO shop.line VALUES ($1::bigint, 1, 10)")
            .bind(order)
            .execute(&mut *tx)
            .await
            .unwrap();
        publish(&mut tx, nth(order, 0)).await.unwrap();
        let waiting = {
            let pool = pool.clone();
            tokio::spawn(async move { sqlx::query(late).execute(&pool).await.unwrap() })
        };
        until("it waits for the chain", async || {
            count(&pool, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'").await == 1
        })
        .await;
        tx.commit().await.unwrap();
        timeout(LIMIT, waiting).await.unwrap().unwrap();
        bodies.extend(
            texts(&pool, "SELECT payload::text FROM outbox.event ORDER BY position DESC LIMIT 1").await,
        );
    }
    insta::assert_snapshot!(bodies.join("\n"), @r#"
    {"id" : 1, "lines" : 1, "amount" : 1}
    {"id" : 2, "lines" : 2, "amount" : 11}
    {"id" : 2, "lines" : 3, "amount" : 21}
    "#);
    chains_are_whole(&pool).await;
}

/// A lock without an event counts: who has an older snapshot may not go on with it.
#[tokio::test]
async fn to_lock_is_to_write() {
    let pool = database().await;
    let mut told = Vec::new();
    for order in ["never published", "published"] {
        if order == "published" {
            execute(&pool, "SELECT outbox.publish('order.new', 'order', 'published', '{}')").await;
        } else {
            execute(&pool, "SELECT outbox.lock('order', 'never published')").await;
        }
        let mut old = pool.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ").await.unwrap();
        sqlx::query("SELECT").execute(&mut *old).await.unwrap();
        let mut tx = pool.begin().await.unwrap();
        let version = lock(&mut tx, "order", order).await.unwrap();
        tx.commit().await.unwrap();
        let error = lock(&mut old, "order", order).await.unwrap_err();
        assert!(matches!(error, AppendError::Conflict(_)), "{error}");
        told.push(format!("{order}: version {version}, then {error}"));
    }
    insta::assert_snapshot!(told.join("\n"), @r"
    never published: version 0, then could not serialize access due to concurrent update
    published: version 1, then could not serialize access due to concurrent update
    ");
}

/// Two that lock or publish the same ones in another order do not deadlock; not with the first events of a type either.
#[tokio::test]
async fn many_are_locked_in_one_order() {
    let pool = database().await;
    let together = Arc::new(Barrier::new(3));
    let writer = async |pool: PgPool, together: Arc<Barrier>, order: [&'static str; 2], locks: bool| {
        for n in 0..40 {
            let type_ = format!("order{}", n / 2);
            let event = |id| Event::new("changed", type_.clone(), id, &json!({}));
            together.wait().await;
            let mut tx = pool.begin().await.unwrap();
            if locks {
                lock_all(&mut tx, order.map(|id| (type_.as_str(), id)).into()).await.unwrap();
            }
            publish_all(&mut tx, &order.map(event)).await.unwrap();
            tx.commit().await.unwrap();
        }
    };
    let writers = [(["a", "b"], false), (["b", "a"], false), (["b", "a"], true)];
    let writers =
        writers.map(|(order, locks)| tokio::spawn(writer(pool.clone(), together.clone(), order, locks)));
    for writer in writers {
        timeout(LIMIT, writer).await.unwrap().unwrap();
    }
    chains_are_whole(&pool).await;
}

/// The first events of a type at once: some are inserted, and some aggregates are locked before.
#[tokio::test]
async fn a_type_begins_once() {
    const INSERT: &str = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                          VALUES ($1, 'b', $2, 'changed', '{}')";
    let pool = database().await;
    let together = Arc::new(Barrier::new(2));
    let writer = async |pool: PgPool, together: Arc<Barrier>, first: bool| {
        for n in 0..40 {
            let type_ = format!("item{n}");
            together.wait().await;
            let mut tx = pool.begin().await.unwrap();
            if first {
                let two = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                           VALUES ($1, 'a', 1, 'changed', '{}'), ($1, 'c', 1, 'changed', '{}')";
                sqlx::query(two).bind(&type_).execute(&mut *tx).await.unwrap();
            } else {
                lock(&mut tx, &type_, "b").await.unwrap();
            }
            // In a statement of its own: in the INSERT, the position is taken before the lock.
            let next = sqlx::query_scalar("SELECT outbox.next_version($1, 'b')").bind(&type_);
            let next: i64 = next.fetch_one(&mut *tx).await.unwrap();
            sqlx::query(INSERT).bind(&type_).bind(next).execute(&mut *tx).await.unwrap();
            tx.commit().await.unwrap();
        }
    };
    let writers = [true, false].map(|first| tokio::spawn(writer(pool.clone(), together.clone(), first)));
    for writer in writers {
        timeout(LIMIT, writer).await.unwrap().unwrap();
    }
    chains_are_whole(&pool).await;
}

/// Who locks an aggregate that has no events leaves a row, which says that it has none.
#[tokio::test]
async fn an_aggregate_that_was_only_locked_has_no_events() {
    let pool = database().await;
    let locked = "SELECT concat_ws(' ', outbox.lock('order', id), outbox.lock('order', id)) FROM unnest('{1,2,3}'::text[]) id";
    assert_eq!(texts(&pool, locked).await, ["0 0"; 3]);
    // After a restore: none of them waits for a baseline, and none was begun in this incarnation.
    execute(&pool, "UPDATE outbox.source SET incarnation = 2, parent = 1").await;
    assert_eq!(count(&pool, "SELECT outbox.without_baseline()").await, 0);
    let not_begun = "SELECT aggregate_id FROM outbox.not_begun('{order,order}', '{1,9}') ORDER BY 1";
    assert_eq!(texts(&pool, not_begun).await, ["1", "9"]);
    // A writer's own version, the outbox's, and the end of what a subscriber has from the lost time.
    execute(
        &pool,
        "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
             VALUES ('order', '1', 1, 'order.new', '{}'), ('order', '1', 2, 'order.changed', '{}');
         SELECT outbox.number_by('order', 'outbox');
         SELECT outbox.publish('order.new', 'order', '2', '{}');",
    )
    .await;
    chains_are_whole(&pool).await;
    execute(&pool, "SELECT outbox.end_lost('{order}', '{3}', '{6}')").await;
    let chains =
        "SELECT concat_ws(' ', aggregate_id, version, state) FROM outbox.aggregate ORDER BY aggregate_id";
    assert_eq!(texts(&pool, chains).await, ["1 2 live", "2 1 live", "3 7 ended"]);
}

/// Way 3, with the outbox's help.
#[tokio::test]
async fn the_next_version_is_one_more() {
    let pool = database().await;
    for _ in 0..3 {
        execute(
            &pool,
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
             SELECT 'order', n::text, outbox.next_version('order', n::text), 'order.changed', '{}'
             FROM generate_series(1, 3) n, generate_series(1, 2) ORDER BY n",
        )
        .await;
    }
    chains_are_whole(&pool).await;
    assert_eq!(texts(&pool, "SELECT version::text FROM outbox.aggregate").await, ["6"; 3]);
}

/// Pages of the buffer cache that a statement touches, with all that it calls.
async fn buffers(conn: &mut PgConnection, sql: &str) -> i64 {
    let explain = format!("EXPLAIN (ANALYZE, BUFFERS, TIMING off, FORMAT json) {sql}");
    let plan: Value = sqlx::query_scalar(AssertSqlSafe(explain)).fetch_one(conn).await.unwrap();
    plan[0]["Plan"]["Shared Hit Blocks"].as_i64().unwrap()
}

/// Each leaves a dead row of the chain. Without the place of the last one, the thousandth event would look at a thousand.
#[tokio::test]
async fn the_thousandth_event_of_a_transaction_costs_as_the_first() {
    let pool = database().await;
    let mut tx = pool.begin().await.unwrap();
    let mut all = Vec::new();
    for (way, call) in [
        ("payload", "outbox.publish('order.changed', 'order', 'a', '{}')"),
        ("body", "outbox.publish('order.changed', 'order', 'b', body => 'shop.order_body')"),
        ("lock", "outbox.lock('order', 'a')"),
        ("lock of another type", "outbox.lock('other', 'a')"),
    ] {
        if way == "body" {
            sqlx::query("SELECT outbox.publish('order.new', 'order', '7', '{}')")
                .execute(&mut *tx)
                .await
                .unwrap();
        }
        let call = call.replace("'b'", "'7'");
        let first = buffers(&mut tx, &format!("SELECT count({call}) FROM generate_series(1, 500)")).await;
        buffers(&mut tx, &format!("SELECT count({call}) FROM generate_series(1, 2000)")).await;
        let last = buffers(&mut tx, &format!("SELECT count({call}) FROM generate_series(1, 500)")).await;
        if last > first * 2 {
            all.push(format!("{way}: 500 touched {first} pages, and {last} after 2,500"));
        }
    }
    assert!(all.is_empty(), "{all:?}");
}

/// Each mistake is its writer's error, and says what to do.
#[tokio::test]
async fn each_mistake_is_told() {
    let pool = database().await;
    execute(
        &pool,
        "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
             VALUES ('item', '1', 1, 'item.new', '{}'), ('item', '1', 2, 'item.deleted', '{}');
         SELECT outbox.publish('order.new', 'order', '1', '{}');
         CREATE FUNCTION shop.nothing(text) RETURNS jsonb LANGUAGE sql RETURN NULL::jsonb;
         CREATE FUNCTION shop.no_json(text) RETURNS text LANGUAGE sql RETURN '{}';
         CREATE FUNCTION shop.rows(text) RETURNS SETOF json LANGUAGE sql AS 'SELECT ''{}''::json';
         CREATE FUNCTION shop.two(text, text) RETURNS json LANGUAGE sql RETURN '{}'::json;
         CREATE FUNCTION shop.often(text) RETURNS json LANGUAGE sql RETURN '{}'::json;
         CREATE FUNCTION shop.often(bigint) RETURNS json LANGUAGE sql RETURN '{}'::json;",
    )
    .await;
    let told = said(
        &mut pool.acquire().await.unwrap(),
        &[
            "SELECT outbox.publish(NULL, 'order', '1', '{}')",
            "SELECT outbox.publish('order.changed', NULL, '1', '{}')",
            "SELECT outbox.publish('order.changed', 'order', NULL, '{}')",
            "SELECT outbox.publish('order.changed', 'order', NULL, body => 'shop.order_body')",
            "SELECT outbox.publish('order.changed', 'order', '', '{}')",
            "SELECT outbox.publish('order.changed', 'order', repeat('x', 256), '{}')",
            "SELECT outbox.publish(repeat('x', 256), 'order', '1', '{}')",
            "SELECT outbox.publish('order.changed', 'order', '1')",
            "SELECT outbox.publish('order.changed', 'order', '1', NULL)",
            "SELECT outbox.publish('order.changed', 'order', '1', '{}', body => 'shop.order_body')",
            "SELECT outbox.publish('order.changed', 'order', '1', '{}', '[]')",
            "SELECT outbox.publish('order.changed', 'order', '1', body => 'shop.unknown')",
            "SELECT outbox.publish('order.changed', 'order', '1', body => 'shop.order_body(')",
            "SELECT outbox.publish('order.changed', 'order', '1', body => 'shop.often')",
            "SELECT outbox.publish('order.changed', 'order', '1', body => 'shop.often(text)')",
            "SELECT outbox.publish('order.changed', 'order', '1', body => 'shop.two')",
            "SELECT outbox.publish('order.changed', 'order', '1', body => 'shop.no_json')",
            "SELECT outbox.publish('order.changed', 'order', '1', body => 'shop.rows')",
            "SELECT outbox.publish('order.changed', 'order', '1', body => 'shop.nothing')",
            "SELECT outbox.publish('item.changed', 'item', '1', '{}')",
            "SELECT outbox.publish('item.changed', 'item', '9', '{}')",
            "SELECT outbox.lock('order', NULL)",
            "SELECT outbox.lock('', '1')",
            "SELECT outbox.next_version(repeat('x', 256), '1')",
            // A version is skipped, is repeated, begins again; the other way of counting.
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
             VALUES ('item', '1', 4, 'item.changed', '{}')",
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
             VALUES ('item', '1', 2, 'item.changed', '{}')",
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
             VALUES ('item', '1', 1, 'item.new', '{}')",
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
             VALUES ('item', '2', 2, 'item.new', '{}')",
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
             VALUES ('order', '1', 2, 'order.changed', '{}')",
            "SELECT outbox.number_by('order', 'somebody')",
            "SELECT outbox.number_by(NULL, 'outbox')",
        ],
    )
    .await;
    insta::assert_snapshot!(told);
    assert_eq!(count(&pool, "SELECT count(*) FROM outbox.event").await, 4);
    chains_are_whole(&pool).await;
}

/// Also in one transaction, where the first one is already written, and after a lock.
#[tokio::test]
async fn one_type_is_not_counted_both_ways() {
    let pool = database().await;
    let insert = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                  VALUES ('order', '1', 2, 'order.changed', '{}')";
    let mut tx = pool.begin().await.unwrap();
    publish(&mut tx, nth("1", 0)).await.unwrap();
    lock(&mut tx, "order", "1").await.unwrap();
    let error = append(&mut tx, &[new_event(2)]).await.unwrap_err();
    assert!(matches!(error, AppendError::NotSetUp(_)), "{error}");
    tx.rollback().await.unwrap();
    let mut tx = pool.begin().await.unwrap();
    append(&mut tx, &[new_event(1)]).await.unwrap();
    lock(&mut tx, "order", "1").await.unwrap();
    let error = publish(&mut tx, nth("1", 0)).await.unwrap_err();
    assert!(matches!(error, AppendError::NotSetUp(_)), "{error}");
    tx.rollback().await.unwrap();

    execute(&pool, "SELECT outbox.number_by('order', 'outbox')").await;
    // The change waits for an event that is under way, also if that waits for the chain; the next event comes the other way.
    let mut holder = pool.begin().await.unwrap();
    lock(&mut holder, "order", "1").await.unwrap();
    let later = |sql: &'static str| {
        let pool = pool.clone();
        tokio::spawn(async move { sqlx::query(sql).execute(&pool).await.unwrap() })
    };
    let waiting = "SELECT count(*) FROM pg_stat_activity
                   WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let event = later("SELECT outbox.publish('order.new', 'order', '1', '{}')");
    until("the event waits", async || count(&pool, waiting).await == 1).await;
    let change = later("SELECT outbox.number_by('order', 'writer')");
    until("the change waits, too", async || count(&pool, waiting).await == 2).await;
    holder.commit().await.unwrap();
    for waited in [event, change] {
        timeout(LIMIT, waited).await.unwrap().unwrap();
    }
    execute(&pool, insert).await;
    let mut tx = pool.begin().await.unwrap();
    let error = publish(&mut tx, nth("1", 0)).await.unwrap_err();
    assert!(matches!(error, AppendError::NotSetUp(_)), "{error}");
    tx.rollback().await.unwrap();

    // An event that waits for a change comes after it.
    execute(&pool, "SELECT outbox.number_by('order', 'outbox')").await;
    let mut change = pool.begin().await.unwrap();
    sqlx::query("SELECT outbox.number_by('order', 'writer')").execute(&mut *change).await.unwrap();
    let event = {
        let pool = pool.clone();
        tokio::spawn(async move { publish(&mut pool.begin().await.unwrap(), nth("1", 0)).await })
    };
    until("the event waits for the change", async || count(&pool, waiting).await == 1).await;
    change.commit().await.unwrap();
    let error = timeout(LIMIT, event).await.unwrap().unwrap().unwrap_err();
    assert!(matches!(error, AppendError::NotSetUp(_)), "{error}");
    chains_are_whole(&pool).await;
}

/// What a caller of the crate can act on, in the server's words.
#[tokio::test]
async fn the_errors_of_a_chain_are_told_apart() {
    let pool = database().await;
    let mut tx = pool.begin().await.unwrap();
    append(&mut tx, &[new_event(1), new_event(2)]).await.unwrap();
    tx.commit().await.unwrap();
    let mut told = Vec::new();
    for events in [&[new_event(4)][..], &[new_event(2)]] {
        let error = append(&mut pool.begin().await.unwrap(), events).await.unwrap_err();
        told.push(format!("{}: {error}", kind(&error)));
    }
    let mut first = pool.begin().await.unwrap();
    let mut second = pool.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ").await.unwrap();
    sqlx::query("SELECT").execute(&mut *second).await.unwrap();
    append(&mut first, &[new_event(3)]).await.unwrap();
    first.commit().await.unwrap();
    let unfit = Event::new("order.changed", "order", "1", &BTreeMap::from([((1, 2), 3)]));
    for error in [
        append(&mut second, &[new_event(3)]).await.unwrap_err(),
        publish(&mut pool.begin().await.unwrap(), nth("1", 0)).await.unwrap_err(),
        publish(&mut pool.begin().await.unwrap(), unfit).await.unwrap_err(),
        publish(&mut pool.begin().await.unwrap(), nth("1", 0).header("CC", "queue")).await.unwrap_err(),
        lock(&mut pool.begin().await.unwrap(), "", "1").await.unwrap_err(),
    ] {
        told.push(format!("{}: {error}", kind(&error)));
    }
    // sqlx shows the line of the server's own source, which each release has elsewhere.
    let told = told.iter().map(|text| text.split_once(" at line ").map_or(text.as_str(), |(said, _)| said));
    let told: Vec<String> = told.map(without_ids).collect();
    insta::assert_snapshot!(told.join("\n"));
}

fn kind(error: &AppendError) -> &'static str {
    match error {
        AppendError::Unfit { .. } => "Unfit",
        AppendError::VersionSkipped(_) => "VersionSkipped",
        AppendError::VersionTaken(_) => "VersionTaken",
        AppendError::Conflict(_) => "Conflict",
        AppendError::NotSetUp(_) => "NotSetUp",
        AppendError::Database(_) => "Database",
    }
}

fn without_ids(text: &str) -> String {
    let word = |word: &str| if word.parse::<Uuid>().is_ok() { "ID".to_owned() } else { word.to_owned() };
    text.split(' ').map(word).collect::<Vec<_>>().join(" ")
}

/// Where the sequence is behind, a new event would lie below the last one of its aggregate.
#[tokio::test]
async fn a_sequence_that_is_behind_is_told() {
    let pool = database().await;
    execute(
        &pool,
        "SELECT outbox.publish('order.new', 'order', '1', '{}') FROM generate_series(1, 5);
         ALTER SEQUENCE outbox.position RESTART WITH 2",
    )
    .await;
    let told = said(
        &mut pool.acquire().await.unwrap(),
        &["SELECT outbox.publish('order.changed', 'order', '1', '{}')"],
    )
    .await;
    insta::assert_snapshot!(told, @r"
    SELECT outbox.publish('order.changed', 'order', '1', '{}')
      55000 the next position is 2, and the last event of the aggregate has 5
      The sequence outbox.position is behind: run outbox-relay recover --sequence.
    ");
}

/// An outbox whose history was retired before it kept chains knows of no versions: nothing begins at 1 by mistake.
#[tokio::test]
async fn the_versions_of_retired_history_are_told_to_the_outbox() {
    let pool = database().await;
    execute(
        &pool,
        "UPDATE outbox.source SET adopts_chains = true;
         CREATE TABLE shop.orders (id bigint, version bigint);
         INSERT INTO shop.orders VALUES (1, 7), (2, 3), (3, 0);
         INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
             VALUES ('order', '2', 3, 'order.changed', '{}'), ('order', '4', 9, 'order.changed', '{}');",
    )
    .await;
    let told = said(
        &mut pool.acquire().await.unwrap(),
        &[
            "SELECT outbox.next_version('order', '1')",
            "SELECT outbox.publish('new.new', 'new', '1', '{}')",
            "SELECT outbox.number_by('new', 'outbox')",
            "SELECT outbox.publish('new.new', 'new', '1', '{}')",
            "SELECT outbox.publish('order.changed', 'order', '1', '{}')",
            "SELECT outbox.number_by('order', 'outbox')",
            "SELECT outbox.number_by('order', 'outbox', 'TABLE shop.orders')",
            "SELECT outbox.publish('order.changed', 'order', '1', '{}')",
        ],
    )
    .await;
    let chains = texts(
        &pool,
        "SELECT concat_ws(' ', aggregate_type || '/' || aggregate_id, version, state, last_position) FROM outbox.aggregate
         ORDER BY aggregate_type, aggregate_id",
    )
    .await;
    insta::assert_snapshot!([told, chains.join("\n")].join("\n\n"));
}

/// A writer has what it needs, and no more: also with a body function and with operators of its own.
#[tokio::test]
async fn a_writer_publishes_with_its_own_rights() {
    const GRANTS: &str = "GRANT USAGE ON SCHEMA shop TO";
    let pool = database().await;
    execute(
        &pool,
        "CREATE TABLE shop.secret (id bigint);
         CREATE FUNCTION shop.who(text) RETURNS json LANGUAGE sql RETURN to_json(current_user);
         CREATE FUNCTION shop.of_secret(text) RETURNS json LANGUAGE sql STABLE
             BEGIN ATOMIC SELECT json_agg(id) FROM shop.secret; END;
         CREATE FUNCTION shop.of_outbox(text) RETURNS json LANGUAGE plpgsql AS
             'BEGIN UPDATE outbox.aggregate SET version = 99; RETURN ''{}''; END';
         CREATE FUNCTION shop.evil(text, text) RETURNS boolean LANGUAGE plpgsql AS
             'BEGIN RAISE ''with the rights of %'', current_user; END';
         CREATE FUNCTION shop.evil_join(text, text) RETURNS text LANGUAGE plpgsql AS
             'BEGIN RAISE ''with the rights of %'', current_user; END';
         CREATE OPERATOR shop.= (FUNCTION = shop.evil, LEFTARG = text, RIGHTARG = text);
         CREATE OPERATOR shop.<> (FUNCTION = shop.evil, LEFTARG = text, RIGHTARG = text);
         CREATE OPERATOR shop.|| (FUNCTION = shop.evil_join, LEFTARG = text, RIGHTARG = text);",
    )
    .await;
    let role = "outbox_publish_test";
    let grants = format!("{GRANTS} {role}; SELECT outbox.grant_writer('{role}')");
    let mut writer = as_role(&pool, role, &grants).await;
    let told = said(
        &mut writer,
        &[
            "SELECT outbox.publish('order.new', 'order', '1', '{}')",
            "SELECT outbox.publish('order.changed', 'order', '1', body => 'shop.who')",
            "SELECT outbox.publish('order.changed', 'order', '1', body => 'shop.of_secret')",
            "SELECT outbox.publish('order.changed', 'order', '1', body => 'shop.of_outbox')",
            "SELECT outbox.lock('order', '1')",
            "SELECT outbox.next_version('order', '1')",
            // As object-relational mappers do it.
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
             VALUES ('item', '1', 1, 'item.new', '{}') RETURNING id, version, position, previous_id, created_at",
            "SELECT version, state FROM outbox.aggregate WHERE aggregate_type = 'order' AND aggregate_id = '1'",
            "SELECT numbered_by FROM outbox.aggregate_type",
            "SET search_path = shop, pg_catalog",
            "SELECT outbox.lock('order', '1')",
            "SELECT outbox.next_version('order', '1')",
            "SELECT outbox.publish('order.changed', 'order', '1', '{}')",
            "SELECT outbox.publish('order.changed', 'order', '9', '{}')",
            "SELECT outbox.publish('first.changed', 'first', '1', '{}')",
            "RESET search_path",
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
             VALUES ('item', '1', 2, 'item.new', '{}') RETURNING payload",
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, previous_id)
             VALUES ('item', '1', 2, 'item.new', '{}', gen_random_uuid())",
            "UPDATE outbox.aggregate SET version = 9",
            "INSERT INTO outbox.aggregate_type VALUES ('new', 'writer')",
            "SELECT body_hash FROM outbox.aggregate",
            "SELECT outbox.number_by('order', 'writer')",
            "SELECT outbox.begin_type('new', 'writer')",
            "SELECT outbox.next_position_above(1)",
            "SELECT outbox.check_name('a', 'b', 'c')",
        ],
    )
    .await;
    let who =
        texts(&pool, "SELECT payload::text FROM outbox.event WHERE version = 2 AND aggregate_type = 'order'")
            .await;
    let role = "outbox_stranger_test";
    let mut stranger =
        as_role(&pool, role, &format!("{GRANTS} {role}; GRANT USAGE ON SCHEMA outbox TO {role}")).await;
    let strange = said(
        &mut stranger,
        &[
            "SELECT outbox.publish('order.new', 'order', '1', '{}')",
            "SELECT outbox.publish_next('order', '1', 'order.new', gen_random_uuid(), '{}', NULL)",
            "SELECT outbox.lock('order', '1')",
            "SELECT outbox.next_version('order', '1')",
            "SELECT outbox.read_body('shop.who', 'order', '1')",
            "SELECT outbox.number_by('order', 'writer')",
            "SELECT version FROM outbox.aggregate",
        ],
    )
    .await;
    insta::assert_snapshot!(format!("{told}\n\n{}\n\n{strange}", who.join("\n")));
    chains_are_whole(&pool).await;
}

/// Who may append before an update may publish after it.
#[tokio::test]
async fn the_migration_lets_writers_publish() {
    let pool = PgPool::connect(&devstack::testing::database("publish").await).await.unwrap();
    let mut conn = pool.acquire().await.unwrap();
    sqlx::query("SET standard_conforming_strings = on").execute(&mut *conn).await.unwrap();
    migrator().run_to(20, &mut *conn).await.unwrap();
    let role = "outbox_publish_test";
    drop(as_role(&pool, role, &format!("SELECT outbox.grant_writer('{role}')")).await);
    migrator().run(&mut *conn).await.unwrap();
    install(&mut conn, "test").await.unwrap();
    sqlx::query("SET ROLE outbox_publish_test").execute(&mut *conn).await.unwrap();
    let mut tx = conn.begin().await.unwrap();
    assert_eq!(publish(&mut tx, nth("1", 0)).await.unwrap().version, 1);
    assert_eq!(lock(&mut tx, "order", "1").await.unwrap(), 1);
    tx.commit().await.unwrap();
}

/// What is no conflict of two transactions is no reason to repeat one.
#[tokio::test]
async fn a_conflict_is_what_the_workspace_calls_one() {
    let pool = database().await;
    let mut old = pool.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ").await.unwrap();
    sqlx::query("SELECT").execute(&mut *old).await.unwrap();
    execute(&pool, "SELECT outbox.publish('order.new', 'order', '1', '{}')").await;
    // Its snapshot knows neither the type nor the aggregate.
    let error = publish(&mut old, nth("1", 0)).await.unwrap_err();
    assert_eq!(error.database().map(Failure::of), Some(Failure::Conflict), "{error}");
}

/// A chain whose only version went to one queue alone goes on with a whole state, whoever counts the versions.
#[tokio::test]
async fn a_version_that_one_queue_alone_has_is_followed_by_a_whole_state() {
    let pool = database().await;
    // As outbox.begin_captured leaves them; others have the versions that outbox.number_by was told.
    execute(
        &pool,
        "INSERT INTO outbox.aggregate (aggregate_type, aggregate_id, version, last_event_id, last_position, state)
         SELECT type, id, 1, outbox.uuid7(), 0, 'unknown' FROM unnest('{item,order}'::text[]) type, unnest('{a,b,c}'::text[]) id;
         SELECT outbox.number_by('item', 'writer', 'SELECT ''d'' AS id, 7 AS version');
         SELECT outbox.number_by('order', 'outbox', 'SELECT ''d'' AS id, 7 AS version')",
    )
    .await;
    let mut conn = pool.acquire().await.unwrap();
    let insert = |of: &str, rest: &str| {
        format!(
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, type, payload, version, headers) VALUES ('item', '{of}', {rest})"
        )
    };
    let statements = [
        "SELECT outbox.publish('order.paid', 'order', 'a', '{}')".to_owned(),
        "SELECT outbox.publish('order.paid', 'order', 'a', '{}', '{\"baseline\": false}')".to_owned(),
        "SELECT outbox.publish('order.paid', 'order', 'b', '{}', '{\"baseline\": true}')".to_owned(),
        "SELECT outbox.publish('order.deleted', 'order', 'c', '{}')".to_owned(),
        "SELECT outbox.publish('order.paid', 'order', 'b', '{}')".to_owned(),
        "SELECT outbox.publish('order.paid', 'order', 'd', '{}')".to_owned(),
        insert("a", "'item.changed', '{}', 2, NULL"),
        insert("b", "'item.changed', '{}', 2, '{\"baseline\": true}'"),
        insert("c", "'item.deleted', '{}', 2, NULL"),
        insert("b", "'item.changed', '{}', 3, NULL"),
        insert("d", "'item.changed', '{}', 8, NULL"),
    ];
    let said = said(&mut conn, &statements.each_ref().map(String::as_str)).await;
    insta::assert_snapshot!(said);
    let mut tx = pool.begin().await.unwrap();
    let refused = outbox::publish(&mut tx, Event::new("order.paid", "order", "a", "")).await.unwrap_err();
    assert!(matches!(refused, AppendError::NotSetUp(_)), "{refused}");
}
