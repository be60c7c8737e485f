//! Another service in the same database, which writes plain SQL into the outbox: several writers at the same
//! few rows, rolled back now and then, and committed asynchronously, so that a crash of PostgreSQL takes the
//! last commits back. What is published of them must be what stayed.

use std::{sync::Arc, time::Duration};

use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use sqlx::{Connection, Executor, PgConnection};
use tokio_util::sync::CancellationToken;

use super::{
    addresses::Addresses,
    event::{MEMO, NOTE},
};

/// After so many versions, a note is left and another begun.
const VERSIONS: i64 = 200;

/// Makes the table of notes.
pub(crate) async fn prepare(conn: &mut PgConnection) -> anyhow::Result<()> {
    conn.execute(
        "CREATE TABLE public.note (kind text, id text, version bigint NOT NULL, PRIMARY KEY (kind, id))",
    )
    .await?;
    Ok(())
}

/// Writes the next version of a note or a memo, in whatever transaction there is.
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

/// How notes are written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pen {
    /// How many writers there are.
    pub(crate) writers: u64,
    /// How many notes they write to at a time; every other one is a memo.
    pub(crate) notes: u32,
    /// The longest pause between two transactions of a writer, in milliseconds.
    pub(crate) pause: u64,
    /// The longest time that a transaction stays open with its position taken, in milliseconds. Half of them are
    /// short.
    pub(crate) hold: u64,
}

/// The others are short.
const SHORT: u64 = 20;

impl Pen {
    /// Seldom enough that one of them under way at a time is enough.
    pub(crate) const USUAL: Self = Self { writers: 4, notes: 4, pause: 700, hold: 300 };

    /// Writes until `stop`, through whatever happens.
    pub(crate) async fn write(self, addresses: Arc<Addresses>, seed: u64, stop: CancellationToken) {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
        while !stop.is_cancelled() {
            // Crashes end a session's life; the next one begins with what stayed.
            let _crashed = self.session(&addresses, &mut random, &stop).await;
            stop.run_until_cancelled(tokio::time::sleep(Duration::from_millis(100))).await;
        }
    }

    async fn session(
        self,
        addresses: &Addresses,
        random: &mut Xoshiro256PlusPlus,
        stop: &CancellationToken,
    ) -> anyhow::Result<()> {
        let mut conn = addresses.connect("person").await?;
        conn.execute("SET synchronous_commit = off; SET statement_timeout = '10s'").await?;
        let mut life = 0;
        while !stop.is_cancelled() {
            let number = random.random_range(0..self.notes);
            let kind = if number % 2 == 0 { NOTE } else { MEMO };
            let mut tx = conn.begin().await?;
            let version = write(&mut tx, kind, &format!("{number}-{life}")).await?;
            // The position is taken: meanwhile it is a gap.
            let hold = if random.random() { self.hold } else { SHORT.min(self.hold) };
            tokio::time::sleep(Duration::from_millis(random.random_range(0..hold))).await;
            if random.random_ratio(1, 8) {
                tx.rollback().await?;
            } else {
                tx.commit().await?;
            }
            if version >= VERSIONS {
                life += 1;
            }
            tokio::time::sleep(Duration::from_millis(random.random_range(0..self.pause))).await;
        }
        conn.close().await?;
        Ok(())
    }
}
