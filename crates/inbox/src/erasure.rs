//! Erasing what is left of aggregates that ended, of which very much was held or rejected: step by step, beside
//! consuming. Whoever of the consumers in this database comes first does it.

use std::time::Duration;

use amqp::Backoff;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::handler::describe;

/// A step erases so many rows at most; less after one that failed.
const STEP: i32 = 1_000;
/// How often is looked whether there is something to erase.
const ROUND: Duration = Duration::from_secs(10);
/// Between two steps others get the disk.
const REST: Duration = Duration::from_millis(20);

/// Works off what is noted, until `stop`.
pub(crate) async fn keep(pool: &PgPool, consumer: &str, stop: &CancellationToken) {
    let (mut rows, mut pause, mut backoff) = (STEP, ROUND, Backoff::default());
    while stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_some() {
        // A database that does not answer must not keep the process from ending; it rolls back what it was at.
        let Some(erased) = stop.run_until_cancelled(step(pool, rows)).await else { return };
        match erased {
            // Rows that somebody has locked are all that is left.
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

/// One step; how many rows it erased. None when nothing is noted.
async fn step(pool: &PgPool, rows: i32) -> sqlx::Result<Option<i64>> {
    sqlx::query_scalar("SELECT inbox.erase_step($1)").bind(rows).fetch_one(pool).await
}
