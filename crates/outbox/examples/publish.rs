//! A service that publishes its orders with `outbox::publish`.
//!
//! ```sh
//! psql "$DATABASE_URL" -f docs/examples/sql/orders.sql
//! DATABASE_URL=postgres://… publish
//! ```
//!
//! Each function is one transaction: first the rows, then the event. `docs/examples/rust` says what it needs.

use std::env;

use outbox::{AppendError, Event, Waker};
use serde::Serialize;
use sqlx::{PgPool, Postgres, Transaction};
use tokio_util::sync::CancellationToken;

type Error = Box<dyn std::error::Error>;

#[derive(Serialize)]
struct Line {
    item: String,
    price: i64,
}

/// The body: the whole order, so that a subscriber need not ask for more.
#[derive(Serialize)]
struct Order {
    id: i64,
    status: String,
    total: i64,
    lines: Vec<Line>,
}

/// Publishes an order as it is. Its lock comes before its lines are read: another transaction may add one meanwhile.
async fn publish(
    tx: &mut Transaction<'_, Postgres>,
    type_: &'static str,
    id: i64,
) -> Result<(), AppendError> {
    outbox::lock(tx, "order", &id.to_string()).await?;
    let status = sqlx::query_scalar("SELECT status FROM orders WHERE id = $1");
    let status = status.bind(id).fetch_one(&mut **tx).await?;
    let lines = sqlx::query_as("SELECT item, price FROM order_line WHERE order_id = $1 ORDER BY id");
    let lines: Vec<(String, i64)> = lines.bind(id).fetch_all(&mut **tx).await?;
    let lines: Vec<Line> = lines.into_iter().map(|(item, price)| Line { item, price }).collect();
    let body = Order { id, status, total: lines.iter().map(|line| line.price).sum(), lines };
    outbox::publish(tx, Event::new(type_, "order", id.to_string(), &body)).await?;
    Ok(())
}

async fn add_line(tx: &mut Transaction<'_, Postgres>, id: i64, item: &str, price: i64) -> sqlx::Result<()> {
    let insert = sqlx::query("INSERT INTO order_line (order_id, item, price) VALUES ($1, $2, $3)");
    insert.bind(id).bind(item).bind(price).execute(&mut **tx).await?;
    Ok(())
}

async fn place(pool: &PgPool, item: &str, price: i64) -> Result<i64, Error> {
    let mut tx = pool.begin().await?;
    let insert = sqlx::query_scalar("INSERT INTO orders DEFAULT VALUES RETURNING id");
    let id = insert.fetch_one(&mut *tx).await?;
    add_line(&mut tx, id, item, price).await?;
    publish(&mut tx, "order.new", id).await?;
    tx.commit().await?;
    Ok(id)
}

async fn add(pool: &PgPool, id: i64, item: &str, price: i64) -> Result<(), Error> {
    let mut tx = pool.begin().await?;
    add_line(&mut tx, id, item, price).await?;
    publish(&mut tx, "order.changed", id).await?;
    tx.commit().await?;
    Ok(())
}

/// A transaction that the business refuses: dropped without a commit, it is rolled back, and its event is never published.
async fn refused(pool: &PgPool, id: i64) -> Result<(), Error> {
    let mut tx = pool.begin().await?;
    sqlx::query("UPDATE orders SET status = 'lost' WHERE id = $1").bind(id).execute(&mut *tx).await?;
    publish(&mut tx, "order.changed", id).await?;
    Ok(())
}

async fn delete(pool: &PgPool, id: i64) -> Result<(), Error> {
    let mut tx = pool.begin().await?;
    sqlx::query("DELETE FROM orders WHERE id = $1").bind(id).execute(&mut *tx).await?;
    let body = serde_json::json!({"id": id.to_string()});
    outbox::publish(&mut tx, Event::new("order.deleted", "order", id.to_string(), &body)).await?;
    tx.commit().await?;
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let pool = PgPool::connect(&env::var("DATABASE_URL")?).await?;
    // Wakes the relay after each commit. Without it, events leave up to a second later.
    let (waker, stop) = (Waker::default(), CancellationToken::new());
    let notices = tokio::spawn(waker.clone().run(pool.clone(), stop.clone()));
    let id = place(&pool, "pen", 700).await?;
    waker.wake();
    add(&pool, id, "ink", 300).await?;
    refused(&pool, id).await?;
    delete(&pool, place(&pool, "paper", 500).await?).await?;
    waker.wake();
    stop.cancel();
    notices.await?;
    Ok(())
}
