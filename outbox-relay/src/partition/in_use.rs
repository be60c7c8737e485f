//! The partition that writers fill, and when they begin the next one.

use std::time::Duration;

use sqlx::PgConnection;

use super::LONGEST_KEPT;

/// For so long writers fill a partition, so what is retired at once is about a day of events. Longer where much is kept, so
/// that there are never many partitions, and shorter where little is kept.
const IN_USE: Duration = Duration::from_hours(24);
const SHORTEST_IN_USE: Duration = Duration::from_hours(1);
/// So many partitions are kept at most, apart from those that fill up earlier.
const MOST_KEPT: u32 = 30;
/// Steps of a million positions in which a partition is ended, one after the other; the next round goes on.
const STEPS: usize = 5;

/// How long writers fill a partition, where events are kept for `keep`.
pub(crate) fn in_use_for(keep: Duration) -> Duration {
    IN_USE.min(keep).max(keep / MOST_KEPT).max(SHORTEST_IN_USE)
}

/// The partition that writers fill.
#[derive(Debug, sqlx::FromRow)]
pub(crate) struct InUse {
    pub(crate) name: String,
    /// Writers should begin the next one: this has been in use for long enough, or is the net.
    pub(crate) is_due: bool,
    /// The next one is there.
    pub(crate) has_next: bool,
}

pub(crate) async fn in_use(conn: &mut PgConnection, keep: Option<Duration>) -> sqlx::Result<InUse> {
    sqlx::query_as(
        "SELECT name, next_begins IS NOT NULL AS has_next,
                is_default OR has_events AND coalesce(since < clock_timestamp() - make_interval(secs => $1), false) AS is_due
         FROM outbox.partition_in_use",
    )
    .bind(keep.map(seconds_in_use))
    .fetch_one(conn)
    .await
}

/// Lets writers begin the next partition, when they are in the net or, if events are kept for `keep`, when they have filled
/// this one for long enough. Returns the name of the one that has ended.
pub(crate) async fn begin_next(
    conn: &mut PgConnection,
    keep: Option<Duration>,
) -> sqlx::Result<Option<String>> {
    for _ in 0..STEPS {
        let sql = "SELECT partition, coalesce(has_begun, false)
                   FROM outbox.begin_next_partition(coalesce(clock_timestamp() - make_interval(secs => $1), '-infinity'))";
        let step = sqlx::query_as(sql).bind(keep.map(seconds_in_use)).fetch_one(&mut *conn).await?;
        match step {
            (Some(name), true) => return Ok(Some(name)),
            (Some(_), false) => {}
            // Nothing to do; or another session is at it.
            (None, _) => break,
        }
    }
    Ok(None)
}

/// By the server's clock alone, as the ages are.
fn seconds_in_use(keep: Duration) -> f64 {
    in_use_for(keep).as_secs_f64().min(LONGEST_KEPT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_is_in_use_for_a_day_or_as_keep_says() {
        let hours = |keep: u64| in_use_for(Duration::from_hours(keep)).as_secs() / 3_600;
        let days = [1, 30, 60, 3_650].map(|days| hours(days * 24) / 24);
        assert_eq!((hours(0), hours(6), days), (1, 6, [1, 1, 2, 121]));
    }
}
