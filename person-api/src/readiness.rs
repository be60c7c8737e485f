//! Whether the database responds, has what this program needs, and can store something.

use std::time::Duration;

use daemon::{config::database::SchemaError, health::Part};
use tokio_util::sync::CancellationToken;

use crate::{
    schema,
    store::{Connections, write_health::WriteHealth},
};

/// How often to look. One read of two tables that have a handful of rows, and of the catalog's caches.
const INTERVAL: Duration = Duration::from_secs(2);
/// How long one look may take.
const TIMEOUT: Duration = Duration::from_secs(6);

/// Waits until the database has what the program needs, and fails when waiting would not help. Then keeps the readiness
/// up to date until `stop`. After a write that the server could not store, the program is ready again once a trial
/// succeeds.
pub(crate) async fn watch(
    connections: Connections,
    part: Part,
    writes: WriteHealth,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let (needs, database) = (schema::needs(), connections.database());
    if !needs.wait(database, connections.pool(), &stop, |reason| part.waiting(reason)).await? {
        return Ok(());
    }
    part.ready();
    while stop.run_until_cancelled(tokio::time::sleep(INTERVAL)).await.is_some() {
        let look = async {
            let mut conn = connections.acquire().await?;
            needs.check_of(database, &mut conn).await?;
            if writes.failure().is_some() {
                writes.try_write(&mut conn).await?;
            }
            Ok::<_, SchemaError>(())
        };
        match tokio::time::timeout(TIMEOUT, look).await {
            Ok(Ok(())) => part.ready(),
            Ok(Err(error)) => part.waiting(error.to_string()),
            Err(_) => part.waiting("the database does not respond in time"),
        }
    }
    Ok(())
}
