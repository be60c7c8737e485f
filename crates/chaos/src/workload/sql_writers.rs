//! Another service in the same database, which inserts into the outbox with plain SQL. Several writers change the same
//! few rows. Some transactions are rolled back, and all are committed asynchronously, so a crash of PostgreSQL loses the
//! last commits. Exactly what is stored in the end must have been published.

use std::{sync::Arc, time::Duration};

use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use sqlx::{Connection, Executor, PgConnection};
use tokio_util::sync::CancellationToken;

use crate::{
    addresses::Addresses,
    barrier::Barrier,
    event::{MEMO, NOTE},
    history::History,
};

/// After so many versions, a writer goes on with another note.
const VERSIONS: i64 = 200;

/// Creates the table of notes.
pub(crate) async fn prepare(conn: &mut PgConnection) -> anyhow::Result<()> {
    conn.execute(
        "CREATE TABLE public.note (kind text, id text, version bigint NOT NULL, PRIMARY KEY (kind, id))",
    )
    .await?;
    Ok(())
}

/// Writes the next version of a note or a memo, and returns it.
pub(crate) async fn write(conn: &mut PgConnection, kind: &str, id: &str) -> sqlx::Result<i64> {
    sqlx::query_scalar(
        "WITH note AS (
             INSERT INTO public.note AS n (kind, id, version) VALUES ($1, $2, 1)
             ON CONFLICT (kind, id) DO UPDATE SET version = n.version + 1 RETURNING kind, id, version
         )
         INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
         SELECT kind, id, version, CASE WHEN version = 1 THEN 'note.new' ELSE 'note.changed' END,
                json_build_object('id', id, 'text', 'version ' || version)
         FROM note RETURNING version",
    )
    .bind(kind)
    .bind(id)
    .fetch_one(conn)
    .await
}

/// How these writers work.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SqlWriters {
    pub(crate) writers: u64,
    /// How many notes they write to at a time. Every other one is a memo.
    pub(crate) notes: u32,
    /// The longest pause between two transactions of a writer, in milliseconds.
    pub(crate) pause: u64,
    /// How long half of the transactions stay open after they have taken a position, at most, in milliseconds.
    pub(crate) hold: u64,
}

/// The same of the other half.
const SHORT: u64 = 20;

impl SqlWriters {
    /// Seldom enough that a note rarely has two events in flight.
    pub(crate) const USUAL: Self = Self { writers: 4, notes: 4, pause: 700, hold: 300 };

    /// Writes until `stop`, and connects again after each crash.
    pub(crate) async fn write(
        self,
        (addresses, barrier): (Arc<Addresses>, Arc<Barrier>),
        seed: u64,
        stop: CancellationToken,
    ) {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
        while !stop.is_cancelled() {
            // A crash ends the session. The next one begins with what is stored.
            let _crashed = self.session((&addresses, &barrier), &mut random, &stop).await;
            if barrier.is_closed() {
                barrier.finished().await;
                // They keep nothing in memory.
                barrier.resolved(History::default()).await;
            }
            stop.run_until_cancelled(tokio::time::sleep(Duration::from_millis(100))).await;
        }
    }

    async fn session(
        self,
        (addresses, barrier): (&Addresses, &Barrier),
        random: &mut Xoshiro256PlusPlus,
        stop: &CancellationToken,
    ) -> anyhow::Result<()> {
        let mut conn = addresses.connect("person").await?;
        conn.execute("SET synchronous_commit = off; SET statement_timeout = '10s'").await?;
        let mut generation = 0;
        while !stop.is_cancelled() && !barrier.is_closed() {
            let number = random.random_range(0..self.notes);
            let kind = if number % 2 == 0 { NOTE } else { MEMO };
            let mut tx = conn.begin().await?;
            let version = write(&mut tx, kind, &format!("{number}-{generation}")).await?;
            // The position is taken and not committed: the relay sees a gap.
            let hold = if random.random() { self.hold } else { SHORT.min(self.hold) };
            tokio::time::sleep(Duration::from_millis(random.random_range(0..hold))).await;
            if random.random_ratio(1, 8) {
                tx.rollback().await?;
            } else {
                tx.commit().await?;
            }
            if version >= VERSIONS {
                generation += 1;
            }
            tokio::time::sleep(Duration::from_millis(random.random_range(0..self.pause))).await;
        }
        conn.close().await?;
        Ok(())
    }
}
