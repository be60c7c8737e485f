//! The progress of the shadow: compares the inbox's versions of both models.

use serde::Serialize;
use sqlx::{AssertSqlSafe, PgConnection};

use super::compare::Comparison;

/// Of some chains of the live consumer, those that the shadow has not reached. `excused` are those that the shadow does not
/// need, and whose row it takes over:
///
/// - the chain of an earlier incarnation than the newest one of its source, also of an aggregate that the newest one has
///   not begun: the source has lost it, and neither history nor baselines have it;
/// - an aggregate that has ended in the live model and that the shadow has not received. Neither model has rows of it; a
///   replay of pruned history and baselines of all persons leave it out.
const LAGGING: &str = r"
WITH lagging AS MATERIALIZED (
    SELECT g.source, g.aggregate_type, g.aggregate_id, l.version, l.last_event_id, l.recent, l.ended,
           coalesce(s.version, 0) AS shadow,
           e.source IS NOT NULL OR coalesce(s.version, 0) = 0 AND p.id IS NULL AS excused,
           e.source IS NOT NULL AS earlier
    FROM {chains} g
         CROSS JOIN LATERAL (SELECT version, last_event_id, recent, ended FROM inbox.aggregate
                             WHERE (consumer, source, aggregate_type, aggregate_id)
                                 = ($1, g.source, g.aggregate_type, g.aggregate_id) OFFSET 0) l
         LEFT JOIN LATERAL (SELECT version FROM inbox.aggregate
                            WHERE (consumer, source, aggregate_type, aggregate_id)
                                = ($2, g.source, g.aggregate_type, g.aggregate_id) OFFSET 0) s ON true
         LEFT JOIN inbox.earlier_source e ON e.consumer = $1 AND e.source = g.source
         LEFT JOIN LATERAL (SELECT id FROM score.person
                            WHERE id = CASE WHEN g.aggregate_id ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
                                            THEN g.aggregate_id::uuid END OFFSET 0) p ON true
    WHERE l.version > coalesce(s.version, 0))";

/// Reads some chains: a table, or a subquery.
pub(super) fn lagging(chains: &str) -> String {
    LAGGING.replace("{chains}", chains)
}

/// The aggregates behind, of those that are remembered.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub(super) struct Behind {
    pub(super) behind: i64,
    pub(super) examples: Vec<String>,
}

/// How many of the remembered chains the shadow still has to reach.
pub(super) async fn behind(conn: &mut PgConnection, comparison: &Comparison<'_>) -> sqlx::Result<Behind> {
    let lagging = lagging("pg_temp.lagging");
    let sql = format!(
        "{lagging}
         SELECT count(*) FILTER (WHERE NOT excused) AS behind,
                ARRAY(SELECT format('%s %s/%s: version %s of %s',
                                    source, aggregate_type, aggregate_id, shadow, version)
                      FROM lagging WHERE NOT excused ORDER BY aggregate_id LIMIT 5) AS examples
         FROM lagging"
    );
    sqlx::query_as(AssertSqlSafe(sql)).bind(comparison.live).bind(comparison.shadow).fetch_one(conn).await
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
