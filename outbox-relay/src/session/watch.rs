//! What a relay's metrics say of the database, whoever leads.

use std::time::{Duration, Instant};

use sqlx::PgConnection;

use super::{SessionError, within_timeout};
use crate::series::{Series, number};

/// How often.
const INTERVAL: Duration = Duration::from_secs(5);
/// The view counts events up to here. Beyond it, positions are counted, which are a few more.
const MAX_COUNT: i64 = 10_000;

/// By the views of the schema: a few entries of an index, and at most 20,000 of them with a backlog.
const WATCH: &str = "\
WITH relay AS MATERIALIZED (
    SELECT open_events + new_events AS events, open_positions, high, low_water, oldest_created_at, paused_at,
           heartbeat_age_seconds
    FROM outbox.relay_status WHERE name = $1)
SELECT r.events, r.open_positions, r.high, r.low_water, r.paused_at IS NOT NULL AS is_paused,
       coalesce(r.heartbeat_age_seconds, 0) AS heartbeat_age,
       CASE WHEN isfinite(r.oldest_created_at)
            THEN greatest(extract(epoch FROM statement_timestamp() - r.oldest_created_at), 0)::float8
            ELSE 0 END AS backlog_age,
       o.last_position, greatest(coalesce(o.partitions_end, o.last_position + 1) - o.last_position - 1, 0) AS ahead
FROM relay r CROSS JOIN outbox.overview o";

#[derive(sqlx::FromRow)]
struct Watched {
    events: i64,
    open_positions: i64,
    high: i64,
    low_water: i64,
    is_paused: bool,
    heartbeat_age: f64,
    backlog_age: f64,
    last_position: i64,
    ahead: i64,
}

/// Looks every few seconds.
#[derive(Debug)]
pub struct Watch {
    series: Series,
    relay: String,
    at: Instant,
}

impl Watch {
    /// Of the relay called `relay`. The first look is due at once.
    pub fn new(series: Series, relay: &str) -> Self {
        Self { series, relay: relay.to_owned(), at: Instant::now() }
    }

    /// Looks, if it is time to.
    pub(super) async fn look_if_due(&mut self, conn: &mut PgConnection) -> Result<(), SessionError> {
        if self.at > Instant::now() {
            return Ok(());
        }
        self.at = Instant::now() + INTERVAL;
        let look = sqlx::query_as(WATCH).bind(&self.relay).fetch_optional(conn);
        let watched: Option<Watched> = within_timeout(look).await?;
        if let Some(watched) = watched {
            watched.show(&self.series);
        }
        Ok(())
    }
}

impl Watched {
    fn show(&self, series: &Series) {
        let positions = self.last_position - self.high + self.open_positions;
        let backlog = if self.events <= MAX_COUNT { self.events } else { positions.max(self.events) };
        series.backlog.set(number(backlog));
        series.backlog_age.set(if backlog > 0 { self.backlog_age } else { 0.0 });
        series.heartbeat_age.set(self.heartbeat_age);
        series.paused.set(if self.is_paused { 1.0 } else { 0.0 });
        series.low_water.set(number(self.low_water));
        series.high.set(number(self.high));
        series.last_position.set(number(self.last_position));
        series.partitions_ahead.set(number(self.ahead));
    }
}
