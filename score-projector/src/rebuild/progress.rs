//! The progress of the shadow: compares the inbox's versions of both models.

use serde::Serialize;
use sqlx::{AssertSqlSafe, PgConnection};

use super::compare::Comparison;

/// The chains of the live consumer that the shadow has not reached, as far as they are remembered (`{range}`: in a part of
/// the key). `excused` are those that
/// the shadow does not need, and whose row it takes over:
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
    FROM (SELECT * FROM pg_temp.lagging {range}) g
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

/// Reads the remembered chains in a part of the key.
pub(super) fn lagging(range: &str) -> String {
    LAGGING.replace("{range}", range)
}

/// Counts of aggregates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Counts {
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

/// The aggregates behind, of those that are remembered.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub(super) struct Behind {
    pub(super) behind: i64,
    pub(super) examples: Vec<String>,
}

/// How many of the remembered chains the shadow still has to reach.
pub(super) async fn behind(conn: &mut PgConnection, comparison: &Comparison<'_>) -> sqlx::Result<Behind> {
    let lagging = lagging("");
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

/// The rows of both consumers. A hash join of everything: by index, a million rows take longer.
const BOTH: &str = "
FROM inbox.aggregate l
     LEFT JOIN inbox.aggregate s ON s.consumer = $2 AND (s.source, s.aggregate_type, s.aggregate_id)
                                                      = (l.source, l.aggregate_type, l.aggregate_id)";
/// And what excuses the shadow.
const EXCUSES: &str = "
     LEFT JOIN inbox.earlier_source e ON e.consumer = $1 AND e.source = l.source
     LEFT JOIN score.person p ON p.id::text = l.aggregate_id";
/// Of the live consumer's chains that have begun.
const BEGUN: &str = "WHERE l.consumer = $1 AND l.version > 0";
/// The shadow has not reached the chain.
const LAGS: &str = "l.version > coalesce(s.version, 0)";
/// It need not.
const EXCUSED: &str = "(e.source IS NOT NULL OR coalesce(s.version, 0) = 0 AND p.id IS NULL)";
/// How many of the aggregates behind give the rate.
const SAMPLE: i64 = 2_000;

/// Counts the live consumer's aggregates. One pass over the rows of both consumers, and another one with the persons where
/// the shadow has not reached all of them.
pub(super) async fn count(conn: &mut PgConnection, comparison: &Comparison<'_>) -> sqlx::Result<Counts> {
    // The hash table of a million rows.
    sqlx::raw_sql("SET work_mem = '64MB'").execute(&mut *conn).await?;
    let all = format!("SELECT count(*), count(*) FILTER (WHERE NOT {LAGS}) {BOTH} {BEGUN}");
    let (aggregates, level): (i64, i64) = sqlx::query_as(AssertSqlSafe(all))
        .bind(comparison.live)
        .bind(comparison.shadow)
        .fetch_one(&mut *conn)
        .await?;
    if level == aggregates {
        return Ok(Counts { aggregates, level, excused: 0, behind: 0, examples: Vec::new() });
    }
    let lagging = format!(
        "SELECT count(*), count(*) FILTER (WHERE NOT {LAGS}), count(*) FILTER (WHERE {LAGS} AND {EXCUSED})
         {BOTH} {EXCUSES} {BEGUN}"
    );
    let (aggregates, level, excused): (i64, i64, i64) = sqlx::query_as(AssertSqlSafe(lagging))
        .bind(comparison.live)
        .bind(comparison.shadow)
        .fetch_one(conn)
        .await?;
    Ok(Counts { aggregates, level, excused, behind: aggregates - level - excused, examples: Vec::new() })
}

/// Some of the aggregates behind: their sources, types and ids, the shadow's versions, and the live ones.
pub(super) type Sample = Vec<(String, String, String, i64, i64)>;

/// One of them, for people.
pub(super) fn example((source, type_, id, shadow, live): &(String, String, String, i64, i64)) -> String {
    format!("{source} {type_}/{id}: version {shadow} of {live}")
}

/// A sample of the aggregates behind, of whom there are about `behind`, in the order of their ids.
pub(super) async fn sample(
    conn: &mut PgConnection,
    comparison: &Comparison<'_>,
    behind: i64,
) -> sqlx::Result<Sample> {
    let sql = format!(
        "SELECT l.source, l.aggregate_type, l.aggregate_id, coalesce(s.version, 0), l.version
         {BOTH} {EXCUSES} {BEGUN}
           AND {LAGS} AND NOT {EXCUSED} AND abs(hashtext(l.aggregate_id)::bigint) % $3 = 0
         ORDER BY l.aggregate_id LIMIT 2 * {SAMPLE}"
    );
    sqlx::query_as(AssertSqlSafe(sql))
        .bind(comparison.live)
        .bind(comparison.shadow)
        .bind((behind / SAMPLE).max(1))
        .fetch_all(conn)
        .await
}

/// The share of a sample that the shadow has reached since, from 0 to 1.
pub(super) async fn reached(
    conn: &mut PgConnection,
    comparison: &Comparison<'_>,
    sample: &Sample,
) -> sqlx::Result<f64> {
    let column = |pick: fn(&(String, String, String, i64, i64)) -> &str| -> Vec<&str> {
        sample.iter().map(pick).collect()
    };
    let versions: Vec<i64> = sample.iter().map(|(.., version)| *version).collect();
    let reached: i64 = sqlx::query_scalar(
        "SELECT count(*)
         FROM unnest($2::text[], $3::text[], $4::text[], $5::bigint[]) AS k (source, aggregate_type, aggregate_id, version)
              CROSS JOIN LATERAL (SELECT version FROM inbox.aggregate
                                  WHERE (consumer, source, aggregate_type, aggregate_id)
                                      = ($1, k.source, k.aggregate_type, k.aggregate_id) OFFSET 0) s
         WHERE s.version >= k.version",
    )
    .bind(comparison.shadow)
    .bind(column(|row| &row.0))
    .bind(column(|row| &row.1))
    .bind(column(|row| &row.2))
    .bind(versions)
    .fetch_one(conn)
    .await?;
    #[expect(clippy::cast_precision_loss, reason = "a rate is no exact number")]
    Ok(if sample.is_empty() { 0.0 } else { reached as f64 / sample.len() as f64 })
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
