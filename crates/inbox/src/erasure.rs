//! Erases ended aggregates with very many held or rejected messages, step by step, beside consuming. The first consumer
//! in this database that finds the work does it.

use std::time::Duration;

use amqp::Backoff;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::handler::describe;

/// How many rows a step erases at most. Fewer after a step that failed.
const STEP: i32 = 1_000;
/// How often the list of erasures is read.
const ROUND: Duration = Duration::from_secs(10);
/// The pause between two steps, in which other sessions get the disk.
const REST: Duration = Duration::from_millis(20);

/// Works through the list of erasures, until `stop`.
pub(crate) async fn keep(pool: &PgPool, consumer: &str, stop: &CancellationToken) {
    let (mut rows, mut pause, mut backoff) = (STEP, ROUND, Backoff::default());
    while stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_some() {
        // A database that does not respond must not delay the end of the process. It rolls the step back.
        let Some(erased) = stop.run_until_cancelled(step(pool, rows)).await else { return };
        match erased {
            // Only rows that other sessions have locked are left.
            Ok(None | Some(0)) => (rows, pause, backoff) = (STEP, ROUND, Backoff::default()),
            Ok(Some(erased)) => {
                let count = metrics::counter!("inbox_erased_rows_total", "consumer" => consumer.to_owned());
                count.increment(erased.unsigned_abs());
                pause = REST;
            }
            Err(error) => {
                rows = (rows / 4).max(1);
                pause = backoff.step().max(REST);
                tracing::warn!(
                    consumer,
                    error = describe(&error),
                    rows,
                    "what is held of ended aggregates could not be erased; it is tried again in smaller steps"
                );
            }
        }
    }
}

/// Takes one step and returns how many rows it erased. None when the list is empty.
async fn step(pool: &PgPool, rows: i32) -> sqlx::Result<Option<i64>> {
    sqlx::query_scalar("SELECT inbox.erase_step($1)").bind(rows).fetch_one(pool).await
}
