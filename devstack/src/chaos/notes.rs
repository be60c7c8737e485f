//! Another service in the same database, which writes plain SQL into the outbox: several writers at the same
//! few rows, rolled back now and then, and committed asynchronously, so that a crash of PostgreSQL takes the
//! last commits back. What is published of them must be what stayed.

use std::{sync::Arc, time::Duration};

use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use sqlx::{Connection, Executor, PgConnection};
use tokio_util::sync::CancellationToken;

use super::field::Addresses;

/// The aggregate type, and what the types of its events begin with.
pub(crate) const NOTE: &str = "note";
/// How many notes are written to at a time.
const NOTES: u32 = 3;
/// After so many versions, a note is left and another begun.
const VERSIONS: i64 = 200;

/// Makes the table of notes.
pub(crate) async fn prepare(conn: &mut PgConnection) -> anyhow::Result<()> {
    conn.execute("CREATE TABLE public.note (id text PRIMARY KEY, version bigint NOT NULL)").await?;
    Ok(())
}

/// Writes the next version of a note, in whatever transaction there is.
pub(crate) async fn write(conn: &mut PgConnection, id: &str) -> sqlx::Result<i64> {
    sqlx::query_scalar(
        "WITH note AS (
             INSERT INTO public.note AS n (id, version) VALUES ($1, 1)
             ON CONFLICT (id) DO UPDATE SET version = n.version + 1 RETURNING id, version
         )
         INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
         SELECT 'note', id, version, CASE WHEN version = 1 THEN 'note.new' ELSE 'note.changed' END,
                json_build_object('id', id, 'text', 'version ' || version)
         FROM note RETURNING version",
    )
    .bind(id)
    .fetch_one(conn)
    .await
}

/// Writes until `stop`, `pace` milliseconds between two commits at most, and through whatever happens.
pub(crate) async fn writer(addresses: Arc<Addresses>, seed: u64, pace: u64, stop: CancellationToken) {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    while !stop.is_cancelled() {
        // Crashes end a session's life; the next one begins with what stayed.
        let _crashed = session(&addresses, &mut random, pace, &stop).await;
        stop.run_until_cancelled(tokio::time::sleep(Duration::from_millis(100))).await;
    }
}

async fn session(
    addresses: &Addresses,
    random: &mut Xoshiro256PlusPlus,
    pace: u64,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let mut conn = addresses.connect("person").await?;
    conn.execute("SET synchronous_commit = off; SET statement_timeout = '10s'").await?;
    let mut life = 0;
    while !stop.is_cancelled() {
        let note = format!("{}-{life}", random.random_range(0..NOTES));
        let mut tx = conn.begin().await?;
        let version = write(&mut tx, &note).await?;
        // The position is taken: meanwhile it is a gap.
        tokio::time::sleep(Duration::from_millis(random.random_range(0..20))).await;
        if random.random_ratio(1, 8) {
            tx.rollback().await?;
        } else {
            tx.commit().await?;
        }
        if version >= VERSIONS {
            life += 1;
        }
        tokio::time::sleep(Duration::from_millis(random.random_range(0..pace))).await;
    }
    conn.close().await?;
    Ok(())
}
