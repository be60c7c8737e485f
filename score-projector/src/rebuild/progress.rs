//! How far the shadow is: the inbox's own account of both models, compared.

use serde::Serialize;
use sqlx::PgConnection;

/// Every aggregate that the live model has something of, and where the shadow stands with it. `excused`
/// are those that the shadow need not hear of, and whose place it takes over as it is:
///
/// - the chain of an earlier incarnation of the source, when live has gone on to a later one;
/// - an aggregate that has ended in the live model and that the shadow has nothing of. Neither model
///   holds anything of it; a replay of pruned history and a baseline of everybody leave it out.
pub(super) const COMPARED: &str = r"
WITH source AS (
    SELECT a.*, regexp_replace(source, '~[0-9]{1,9}$', '') AS name,
           coalesce(substring(source FROM '~([0-9]{1,9})$')::int, 1) AS incarnation
    FROM inbox.aggregate a
    WHERE consumer = $1 AND version > 0
), live AS (
    SELECT s.*, max(incarnation) OVER (PARTITION BY name, aggregate_type, aggregate_id) AS newest FROM source s
), compared AS (
    SELECT l.source, l.aggregate_type, l.aggregate_id, l.version, l.last_event_id,
           coalesce(s.version, 0) AS shadow,
           l.incarnation < l.newest OR coalesce(s.version, 0) = 0 AND p.id IS NULL AS excused
    FROM live l
         LEFT JOIN inbox.aggregate s
             ON s.consumer = $2 AND (s.source, s.aggregate_type, s.aggregate_id)
                                  = (l.source, l.aggregate_type, l.aggregate_id)
         LEFT JOIN score.person p ON p.id::text = l.aggregate_id
)";

/// Counts of aggregates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, sqlx::FromRow)]
pub(super) struct Progress {
    /// That the live model has something of.
    pub(super) aggregates: i64,
    /// Of which the shadow has at least as much.
    pub(super) level: i64,
    /// That the shadow need not hear of.
    pub(super) excused: i64,
    /// Of which the shadow has less.
    pub(super) behind: i64,
    /// A few of those.
    pub(super) examples: Vec<String>,
}

/// Compares both consumers' places in the inbox, in one snapshot.
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

/// Events that a consumer holds, for a reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, sqlx::FromRow)]
pub(super) struct HeldCount {
    pub(super) reason: String,
    pub(super) events: i64,
}

/// What the consumer holds, by reason.
pub(super) async fn held(conn: &mut PgConnection, consumer: &str) -> sqlx::Result<Vec<HeldCount>> {
    sqlx::query_as(
        "SELECT reason, count(*) AS events FROM inbox.held WHERE consumer = $1 GROUP BY reason ORDER BY reason",
    )
    .bind(consumer)
    .fetch_all(conn)
    .await
}
