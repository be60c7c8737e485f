use std::{sync::Arc, time::Duration};

use crate::database::Session;
use sqlx::{AssertSqlSafe, PgPool, SqlSafeStr};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// The channel on which the relay listens for "there may be something new". No payload: the relay
/// reads the table anyway.
pub const CHANNEL: &str = "outbox_event";

/// One notice at most in this time; those in between are folded into the next.
const DEBOUNCE: Duration = Duration::from_millis(1);
/// A notice that takes longer is given up: polling finds the events without it.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Tells the relay, after a commit, that events are waiting.
///
/// `NOTIFY` inside the business transaction would take a lock on the whole server until its commit,
/// so it goes out afterwards, on another connection, folded together. A lost notice costs a moment,
/// never an event.
#[derive(Clone, Debug)]
pub struct Waker {
    channels: &'static [&'static str],
    woken: Arc<Notify>,
}

impl Default for Waker {
    fn default() -> Self {
        Self::on(&[CHANNEL])
    }
}

impl Waker {
    /// A waker whose notices are sent by [`run`](Self::run).
    pub fn new() -> Self {
        Self::default()
    }

    /// The same for others who wait for the same commits and poll behind it.
    pub fn on(channels: &'static [&'static str]) -> Self {
        Self { channels, woken: Arc::default() }
    }

    /// Call after the commit. Never waits and never fails.
    pub fn wake(&self) {
        self.woken.notify_one();
    }

    /// Sends the notices until `stop`.
    pub async fn run(self, pool: PgPool, stop: CancellationToken) {
        let channels = self.channels;
        // Commands, which the server does not plan, and not prepared, since a pooler in transaction mode may lose that.
        let notices: Vec<String> = channels.iter().map(|name| format!("NOTIFY {name}")).collect();
        let notify = AssertSqlSafe(notices.join("; ")).into_sql_str();
        let session = Session::of(pool);
        while stop.run_until_cancelled(self.woken.notified()).await.is_some() {
            let notice = async {
                let mut conn = session.take().await?;
                sqlx::raw_sql(notify.clone()).execute(&mut *conn).await?;
                session.keep(conn);
                Ok::<_, sqlx::Error>(())
            };
            match tokio::time::timeout(TIMEOUT, notice).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(?channels, %error, "nobody was woken; they will poll"),
                Err(_) => tracing::debug!(?channels, "nobody was woken in time; they will poll"),
            }
            stop.run_until_cancelled(tokio::time::sleep(DEBOUNCE)).await;
        }
    }
}
