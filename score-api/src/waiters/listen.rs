//! Wake-ups by `LISTEN`. They are only faster: polling finds everything without them.

use std::{sync::PoisonError, time::Duration};

use daemon::{backoff, config::database::Database};
use sqlx::postgres::{PgListener, PgPoolOptions};
use tokio::time::{Instant, sleep};

use super::Waiters;

/// The channel on which the projector notifies after its commits.
const CHANNEL: &str = "score_model";

const TIMEOUT: Duration = Duration::from_secs(10);

/// Between attempts to listen, the first and the longest pause.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

impl Waiters {
    /// Listens until the process shuts down, over its own connection.
    pub(crate) async fn listen(self, database: Database) {
        let listen = async {
            let pool = database.pool_of(PgPoolOptions::new().max_connections(1).acquire_timeout(TIMEOUT));
            let mut pauses = backoff(PAUSE.0, PAUSE.1);
            loop {
                match tokio::time::timeout(TIMEOUT, connect(&pool)).await {
                    Ok(Ok(listener)) => {
                        pauses = backoff(PAUSE.0, PAUSE.1);
                        let error = self.pass_on(listener).await;
                        tracing::debug!(%error, "not listening; polling goes on");
                    }
                    Ok(Err(error)) => tracing::debug!(%error, "cannot listen; polling goes on"),
                    Err(_) => tracing::debug!("cannot listen in time; polling goes on"),
                }
                sleep(pauses.next().unwrap_or(PAUSE.1)).await;
            }
        };
        self.0.ending.run_until_cancelled(listen).await;
    }

    /// Forwards notices until the connection fails.
    async fn pass_on(&self, mut listener: PgListener) -> sqlx::Error {
        // What came before the LISTEN was not heard.
        self.0.applied.notify_one();
        loop {
            match listener.try_recv().await {
                Ok(Some(_)) => {
                    *self.0.last_notice.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
                }
                // The connection was lost, and notices with it.
                Ok(None) => {}
                Err(error) => return error,
            }
            self.0.applied.notify_one();
        }
    }
}

async fn connect(pool: &sqlx::PgPool) -> sqlx::Result<PgListener> {
    let mut listener = PgListener::connect_with(pool).await?;
    listener.listen(CHANNEL).await?;
    Ok(listener)
}
