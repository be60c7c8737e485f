//! An aggregate whose state only one subscriber has (`backfill --to-queue`): the others can apply what comes afterwards.

use inbox::{Envelope, Outcome, Sequencer};
use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable},
};
use sqlx::{Executor, PgPool};
use uuid::Uuid;

use crate::support::{Recorder, database};

/// A message as the relay publishes it.
fn message(
    id: Uuid,
    type_: &str,
    of: &str,
    version: i64,
    previous: Option<Uuid>,
    is_baseline: bool,
    body: &str,
) -> Envelope {
    let mut headers = FieldTable::default();
    for (name, value) in [("aggregate_type", "order"), ("aggregate_id", of)] {
        headers.insert(name.into(), AMQPValue::LongString(value.into()));
    }
    headers.insert("aggregate_version".into(), AMQPValue::LongLongInt(version));
    if let Some(previous) = previous {
        headers.insert("previous_id".into(), AMQPValue::LongString(previous.to_string().into()));
    }
    if is_baseline {
        headers.insert("baseline".into(), AMQPValue::Boolean(true));
    }
    let properties = BasicProperties::default()
        .with_message_id(id.to_string().into())
        .with_type(type_.into())
        .with_app_id("shop".into())
        .with_timestamp(1_767_225_600)
        .with_headers(headers);
    Envelope { routing_key: type_.to_owned(), properties, body: body.as_bytes().to_vec() }
}

/// Id, type, aggregate, version, the id before, whether it is a baseline, body.
type Row = (Uuid, String, String, i64, Option<Uuid>, bool, String);

/// Everything that the outbox has published, in its order.
async fn published(pool: &PgPool) -> Vec<Envelope> {
    let rows: Vec<Row> = sqlx::query_as(
        "SELECT id, type, aggregate_id, version, nullif(previous_id, '00000000-0000-0000-0000-000000000000'),
                coalesce(headers @> '{\"baseline\": true}', false), payload::text
         FROM outbox.event ORDER BY position",
    )
    .fetch_all(pool)
    .await
    .unwrap();
    rows.iter()
        .map(|(id, type_, of, version, previous, is_baseline, body)| {
            message(*id, type_, of, *version, *previous, *is_baseline, body.trim_matches('"'))
        })
        .collect()
}

#[tokio::test]
async fn what_comes_after_it_is_whole() {
    let pool = database("told_alone").await;
    outbox::install(&mut pool.acquire().await.unwrap(), "shop").await.unwrap();
    for sql in [
        "CREATE TABLE orders (id int PRIMARY KEY, amount int)",
        "INSERT INTO orders SELECT n, 10 * n FROM generate_series(1, 4) n",
        "CREATE FUNCTION order_body(int) RETURNS json STABLE BEGIN ATOMIC
             SELECT to_json(amount) FROM orders WHERE id = $1; END",
        "SELECT outbox.capture('orders', 'order', body => 'public.order_body')",
        // As `backfill --to-queue`.
        "SELECT outbox.begin_states('order', '{1,2,3,4}')",
    ] {
        pool.execute(sql).await.unwrap();
    }
    let mut snapshot = pool.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ").await.unwrap();
    let states: Vec<(String, i64, Uuid, String)> =
        sqlx::query_as("SELECT * FROM outbox.captured_states('order', '{1,2,3,4}')")
            .fetch_all(&mut *snapshot)
            .await
            .unwrap();
    snapshot.commit().await.unwrap();
    let (late, live) = (Recorder::new("late"), Recorder::new("live"));
    let (late, live) =
        (Sequencer::new("late", pool.clone(), late), Sequencer::new("live", pool.clone(), live));
    let states: Vec<Envelope> = states
        .iter()
        .map(|(of, version, id, body)| message(*id, "order.baseline", of, *version, None, true, body))
        .collect();
    assert_eq!(late.apply(&states).await.unwrap(), Outcome { applied: 4, ..Outcome::default() });

    // An event that has not the whole state is refused, and stays so.
    let part = "SELECT outbox.publish('order.paid', 'order', '1', '5')";
    for _ in 0..2 {
        let refused = pool.execute(part).await.unwrap_err().to_string();
        assert!(refused.contains("only one queue has version 1 of order/1"), "{refused}");
    }
    for sql in [
        "SELECT outbox.publish_state('order', '1')",
        part,
        // The writer says that it is whole; an end needs no state; a captured table is published as it is.
        "SELECT outbox.publish('order.paid', 'order', '2', '21', '{\"baseline\": true}')",
        "SELECT outbox.publish('order.deleted', 'order', '3', '\"delete\"')",
        "UPDATE orders SET amount = 41 WHERE id = 4",
        "SELECT outbox.publish('order.paid', 'order', '4', '5')",
    ] {
        pool.execute(sql).await.unwrap();
    }
    let messages = published(&pool).await;
    let all = Outcome { applied: u64::try_from(messages.len()).unwrap(), ..Outcome::default() };
    assert_eq!(live.apply(&messages).await.unwrap(), all);
    assert_eq!(late.apply(&messages).await.unwrap(), all);
    for consumer in ["late", "live"] {
        let state: Vec<String> = sqlx::query_scalar(
            "SELECT concat_ws(' ', aggregate, sum) FROM state WHERE consumer = $1 ORDER BY 1",
        )
        .bind(consumer)
        .fetch_all(&pool)
        .await
        .unwrap();
        assert_eq!(state, ["1 15", "2 21", "4 46"], "{consumer}");
    }
}
