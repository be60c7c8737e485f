//! Whether the database answers, has what this program needs, and stores what it is given.

use std::time::Duration;

use daemon::{config::database::SchemaError, health::Part};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::{schema, store::writes::Writes};

/// How often to look. One read of two tables that have a handful of rows, and of the catalog's caches.
const INTERVAL: Duration = Duration::from_secs(2);
/// How long one look may take.
const TIMEOUT: Duration = Duration::from_secs(6);

/// Waits until the database is as needed, and fails when waiting would not help; then keeps the readiness true to
/// what it sees, until `stop`. Where a write was refused because the server cannot store anything, it is ready
/// again once a trial succeeds.
pub(crate) async fn watch(
    pool: PgPool,
    part: Part,
    writes: Writes,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let needs = schema::needs();
    if !needs.wait(&pool, &stop, |reason| part.waiting(reason)).await? {
        return Ok(());
    }
    part.ready();
    while stop.run_until_cancelled(tokio::time::sleep(INTERVAL)).await.is_some() {
        let look = async {
            let mut conn = pool.acquire().await?;
            needs.check(&mut conn).await?;
            if writes.refused().is_some() {
                writes.try_again(&mut conn).await?;
            }
            Ok::<_, SchemaError>(())
        };
        match tokio::time::timeout(TIMEOUT, look).await {
            Ok(Ok(())) => part.ready(),
            Ok(Err(error)) => part.waiting(error.to_string()),
            Err(_) => part.waiting("the database does not answer in time"),
        }
    }
    Ok(())
}
