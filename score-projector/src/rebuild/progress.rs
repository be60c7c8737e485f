//! The progress of the shadow: compares the inbox's versions of both models.

use serde::Serialize;
use sqlx::PgConnection;

/// Every aggregate of the live model, with the shadow's version. `excused` are those that the shadow does not need, and
/// whose row it takes over:
///
/// - the chain of an earlier incarnation than the newest one of its source, also of an aggregate that the newest one has
///   not begun: the source has lost it, and neither history nor baselines have it;
/// - an aggregate that has ended in the live model and that the shadow has not received. Neither model has rows of it; a
///   replay of pruned history and baselines of all persons leave it out.
pub(super) const COMPARED: &str = r"
WITH compared AS (
    SELECT l.source, l.aggregate_type, l.aggregate_id, l.version, l.last_event_id, l.recent, l.ended,
           coalesce(s.version, 0) AS shadow,
           e.source IS NOT NULL OR coalesce(s.version, 0) = 0 AND p.id IS NULL AS excused,
           e.source IS NOT NULL AS earlier
    FROM inbox.aggregate l
         LEFT JOIN inbox.earlier_source e ON e.consumer = $1 AND e.source = l.source
         LEFT JOIN inbox.aggregate s
             ON s.consumer = $2 AND (s.source, s.aggregate_type, s.aggregate_id)
                                  = (l.source, l.aggregate_type, l.aggregate_id)
         LEFT JOIN score.person p ON p.id::text = l.aggregate_id
    WHERE l.consumer = $1 AND l.version > 0
)";

/// Counts of aggregates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, sqlx::FromRow)]
pub(super) struct Progress {
    /// Aggregates of the live model.
    pub(super) aggregates: i64,
    /// Those at the same or a higher version in the shadow.
    pub(super) level: i64,
    /// Those that the shadow does not need.
    pub(super) excused: i64,
    /// Those at a lower version in the shadow.
    pub(super) behind: i64,
    /// A few of the aggregates behind.
    pub(super) examples: Vec<String>,
}

/// Compares the versions of both consumers in the inbox, in one snapshot.
pub(super) async fn progress(conn: &mut PgConnection, live: &str, shadow: &str) -> sqlx::Result<Progress> {
    let sql = format!(
        "{COMPARED}
         SELECT count(*) AS aggregates,
                count(*) FILTER (WHERE shadow >= version) AS level,
                count(*) FILTER (WHERE shadow < version AND excused) AS excused,
                count(*) FILTER (WHERE shadow < version AND NOT excused) AS behind,
                ARRAY(SELECT format('%s %s/%s: version %s of %s',
                                    source, aggregate_type, aggregate_id, shadow, version)
                      FROM compared WHERE shadow < version AND NOT excused
                      ORDER BY aggregate_id LIMIT 5) AS examples
         FROM compared"
    );
    sqlx::query_as(sqlx::AssertSqlSafe(sql)).bind(live).bind(shadow).fetch_one(conn).await
}

/// The number of held events with a reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, sqlx::FromRow)]
pub(super) struct HeldCount {
    pub(super) reason: String,
    pub(super) events: i64,
}

/// Counts the consumer's held events by reason.
pub(super) async fn held(conn: &mut PgConnection, consumer: &str) -> sqlx::Result<Vec<HeldCount>> {
    sqlx::query_as(
        "SELECT reason, count(*) AS events FROM inbox.held WHERE consumer = $1 GROUP BY reason ORDER BY reason",
    )
    .bind(consumer)
    .fetch_all(conn)
    .await
}
