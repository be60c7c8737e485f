//! Polling: one query for all waiting readers, one at a time.

use std::time::Duration;

use outbox::database::Session;
use sqlx::PgPool;
use tokio::time::{Instant, sleep, sleep_until};

use super::Waiters;
use crate::read_model;

/// The first and the longest pause between two polls without a notice.
const POLL: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// The bounds of the pause after a look, which is as long as the look took. So slow looks use half of one connection at
/// most. The next look serves all readers that arrive during a look.
const PAUSE: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(50));

impl Waiters {
    /// Polls until the process shuts down: at once for the person of a new reader; for all persons after a notice, and
    /// from time to time in any case. Sleeps while no reader waits.
    pub(crate) async fn look(self, pool: PgPool) {
        let session = Session::of(pool);
        let mut pace = POLL.0;
        let mut due = Instant::now();
        loop {
            let idle = self.persons().is_empty();
            let all = tokio::select! {
                biased;
                () = self.0.ending.cancelled() => return,
                () = self.0.applied.notified(), if !idle => {
                    pace = POLL.0;
                    true
                }
                () = sleep_until(due), if !idle => true,
                () = self.0.came.notified() => {
                    pace = POLL.0;
                    due = due.min(Instant::now() + pace);
                    idle
                }
            };
            let began = Instant::now();
            if all {
                due = began + pace;
                pace = (pace * 2).min(POLL.1);
            }
            let look = self.persons().begin(all);
            if !look.persons.is_empty() {
                metrics::counter!("score_api_looks_total").increment(1);
                let read = read_model::versions(&session, &look.persons);
                let Some(found) = self.0.ending.run_until_cancelled(read).await else { return };
                self.persons().end(&look, found);
            }
            let took = began.elapsed();
            if took >= PAUSE.0 {
                self.0.ending.run_until_cancelled(sleep(took.min(PAUSE.1))).await;
            }
        }
    }
}
