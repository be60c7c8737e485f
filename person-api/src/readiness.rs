//! Whether the database answers and its schemas are the ones that this program was built for.

use std::time::Duration;

use service::{
    config::database::{SchemaError, check, wait_until_current},
    health::Part,
};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::{schema, store};

/// How often to look. One read of two tables that have a handful of rows.
const INTERVAL: Duration = Duration::from_secs(2);
/// How long one look may take.
const TIMEOUT: Duration = Duration::from_secs(4);

/// Waits until the schemas are current, and fails when waiting would not help; then keeps the readiness
/// true to what it sees, until `stop`.
pub(crate) async fn watch(pool: PgPool, part: Part, stop: CancellationToken) -> anyhow::Result<()> {
    let schemas = schema::needed();
    let waiting = |error: &sqlx::Error| part.waiting(reason(error));
    if !wait_until_current(&pool, &schemas, &stop, waiting).await? {
        return Ok(());
    }
    part.ready();
    while stop.run_until_cancelled(tokio::time::sleep(INTERVAL)).await.is_some() {
        let look = async { check(&mut *pool.acquire().await?, &schemas).await };
        match tokio::time::timeout(TIMEOUT, look).await {
            Ok(Ok(())) => part.ready(),
            Ok(Err(SchemaError::Database(error))) => part.waiting(reason(&error)),
            Ok(Err(error)) => part.waiting(error.to_string()),
            Err(_) => part.waiting("the database does not answer in time"),
        }
    }
    Ok(())
}

fn reason(error: &sqlx::Error) -> String {
    format!("the database does not answer: {}", store::describe(error))
}
