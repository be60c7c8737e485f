//! Wake-up by `LISTEN`. Only a shortcut: polling finds every event without it.

use std::{sync::Arc, time::Duration};

use amqp::Backoff;
use daemon::config::database::Database;
use sqlx::postgres::{PgListener, PgPoolOptions};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

const TIMEOUT: Duration = Duration::from_secs(10);

/// Listens until `stop` and passes every notice on.
pub(crate) async fn listen(
    database: Database,
    wake: Arc<Notify>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let database = database.named("outbox-relay wake-up");
    let pool = database.pool_of(PgPoolOptions::new().max_connections(1).acquire_timeout(TIMEOUT));
    let mut pause = Backoff::default();
    while !stop.is_cancelled() {
        let connected = async {
            let mut listener = PgListener::connect_with(&pool).await?;
            listener.listen(outbox::CHANNEL).await?;
            Ok::<_, sqlx::Error>(listener)
        };
        let Some(connected) = stop.run_until_cancelled(tokio::time::timeout(TIMEOUT, connected)).await else {
            break;
        };
        match connected {
            Ok(Ok(mut listener)) => {
                pause.reset();
                // What came before the LISTEN was not heard.
                wake.notify_one();
                loop {
                    match stop.run_until_cancelled(listener.try_recv()).await {
                        // None: the connection was lost, and notices with it.
                        Some(Ok(Some(_) | None)) => wake.notify_one(),
                        Some(Err(error)) => {
                            tracing::debug!(%error, "not listening; polling goes on");
                            break;
                        }
                        None => return Ok(()),
                    }
                }
            }
            Ok(Err(error)) => tracing::debug!(%error, "cannot listen; polling goes on"),
            Err(_) => tracing::debug!("cannot listen in time; polling goes on"),
        }
        pause.wait(&stop).await;
    }
    Ok(())
}
