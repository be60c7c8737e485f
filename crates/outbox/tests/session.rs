//! Which connection a session has, and that nobody else is without one because of it.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

use std::time::Duration;

use devstack::testing::Place;
use outbox::database::Session;
use sqlx::{PgConnection, PgPool, postgres::PgPoolOptions};
use tokio::time::{sleep, timeout};

const LIMIT: Duration = devstack::testing::DEADLINE;

/// A database of its own, with at most `connections`.
async fn pool(connections: u32) -> PgPool {
    let url = Place::around().database("session").await;
    let options = PgPoolOptions::new().max_connections(connections).acquire_timeout(LIMIT);
    options.connect(&url).await.unwrap()
}

async fn backend(conn: &mut PgConnection) -> i32 {
    sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(conn).await.unwrap()
}

/// Takes the session, asks who serves it, and keeps it.
async fn used(session: &Session) -> i32 {
    let mut conn = session.take().await.unwrap();
    let backend = backend(&mut conn).await;
    session.keep(conn);
    backend
}

/// Waits until it is so.
async fn until(so: impl Fn() -> bool) {
    let wait = async {
        while !so() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(LIMIT, wait).await.unwrap();
}

#[tokio::test]
async fn one_backend_serves_one_task() {
    let pool = pool(5).await;
    let session = Session::of(pool.clone());
    // Others come and go, so the pool has several.
    let others = [pool.acquire().await.unwrap(), pool.acquire().await.unwrap()];
    let first = used(&session).await;
    drop(others);
    for _ in 0..20 {
        assert_eq!(used(&session).await, first);
    }
    // Two at a time need two.
    let (mut one, mut other) = (session.take().await.unwrap(), session.take().await.unwrap());
    assert_eq!(backend(&mut one).await, first);
    assert_ne!(backend(&mut other).await, first);
}

#[tokio::test]
async fn the_last_connection_of_a_pool_is_not_kept() {
    let pool = pool(1).await;
    let session = Session::of(pool.clone());
    let busy = tokio::spawn(async move {
        loop {
            used(&session).await;
            sleep(Duration::from_millis(5)).await;
        }
    });
    for _ in 0..10 {
        pool.acquire().await.expect("others have their turn");
    }
    busy.abort();
}

#[tokio::test]
async fn what_is_not_used_any_more_is_given_back() {
    let pool = pool(2).await;
    let session = Session::of(pool.clone());
    used(&session).await;
    timeout(LIMIT, pool.close()).await.expect("all connections are back");
    assert!(session.take().await.is_err());

    let pool = self::pool(2).await;
    let session = Session::of(pool.clone());
    used(&session).await;
    assert_eq!(pool.num_idle(), 0);
    until(|| pool.num_idle() == 1).await;
}

#[tokio::test]
async fn one_that_has_ended_meanwhile_is_replaced() {
    let pool = pool(2).await;
    let session = Session::of(pool.clone());
    let first = used(&session).await;
    sqlx::query("SELECT pg_terminate_backend($1)").bind(first).execute(&pool).await.unwrap();
    // Given back unused, where the pool finds that it has ended.
    until(|| pool.size() == 1).await;
    assert_ne!(used(&session).await, first);
}
