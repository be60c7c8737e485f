//! How fast an operation does what it does: what it has done is counted while it runs, and the rate is that between its
//! first and its last progress. So the start of a program does not count, nor what it does at its end.

use std::time::Duration;

use anyhow::Context;
use sqlx::{Connection, PgConnection};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::operation::Count;
use crate::{broker::BrokerConnection, statistics::float};

/// How often it is counted.
const LOOK: Duration = Duration::from_millis(100);

/// The queue that history is replayed to, and that receives what the relay's own rate is measured with.
pub(super) const QUEUE: &str = "history";

/// Counts what is done.
pub(super) enum Counter {
    Rows(PgConnection, &'static str),
    Messages(Box<BrokerConnection>),
}

impl Counter {
    pub(super) async fn open(count: Count, database: &str, broker: &str) -> anyhow::Result<Self> {
        Ok(match count {
            Count::Rows(sql) => Self::Rows(PgConnection::connect(database).await?, sql),
            Count::Messages => Self::Messages(Box::new(BrokerConnection::open(broker).await?)),
        })
    }

    pub(super) async fn now(&mut self) -> anyhow::Result<i64> {
        match self {
            Self::Rows(conn, sql) => sqlx::query_scalar(*sql).fetch_one(conn).await.context(*sql),
            Self::Messages(broker) => broker.waiting(QUEUE).await,
        }
    }

    pub(super) async fn close(self) -> anyhow::Result<()> {
        match self {
            Self::Rows(conn, _) => Ok(conn.close().await?),
            Self::Messages(broker) => broker.close().await,
        }
    }
}

/// What was counted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    begin: i64,
    /// When it had changed for the first time, and for the last time.
    changed: Option<[(Instant, i64); 2]>,
}

impl Pace {
    fn from(begin: i64) -> Self {
        Self { begin, changed: None }
    }

    fn see(&mut self, now: Instant, count: i64) {
        let last = self.changed.map_or(self.begin, |[_, (_, last)]| last);
        if count != last {
            let first = self.changed.map_or((now, count), |[first, _]| first);
            self.changed = Some([first, (now, count)]);
        }
    }

    /// All that was done.
    pub(super) fn done(&self) -> i64 {
        self.changed.map_or(0, |[_, (_, last)]| (last - self.begin).abs())
    }

    /// A second, from the first progress to the last. What was all done between two looks was done in one of them.
    pub(super) fn rate(&self) -> f64 {
        match self.changed {
            None => 0.0,
            Some([(from, first), (to, last)]) if to > from => {
                float((last - first).abs()) / to.duration_since(from).as_secs_f64()
            }
            Some(_) => float(self.done()) / LOOK.as_secs_f64(),
        }
    }
}

/// Counts until `stop` is cancelled, and once more then.
pub(super) async fn watch(mut counter: Counter, stop: CancellationToken) -> anyhow::Result<Pace> {
    let mut pace = Pace::from(counter.now().await?);
    let mut stopped = false;
    while !stopped {
        stopped = stop.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_none();
        pace.see(Instant::now(), counter.now().await?);
    }
    counter.close().await?;
    Ok(pace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_between_the_first_progress_and_the_last() {
        let (begin, mut pace) = (Instant::now(), Pace::from(100));
        let mut see = |seconds, count| {
            pace.see(begin + Duration::from_secs(seconds), count);
            (pace.done(), pace.rate())
        };
        assert_eq!(see(1, 100), (0, 0.0));
        // It began somewhere in between.
        assert_eq!(see(4, 110), (10, 100.0));
        assert_eq!(see(5, 140), (40, 30.0));
        // It has ended.
        assert_eq!(see(60, 140), (40, 30.0));
    }

    #[test]
    fn what_becomes_less_is_done_as_well() {
        let (begin, mut pace) = (Instant::now(), Pace::from(50));
        pace.see(begin, 40);
        pace.see(begin + Duration::from_secs(2), 0);
        assert_eq!((pace.done(), pace.rate()), (50, 20.0));
    }
}
