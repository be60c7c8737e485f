//! How far the shadow is, in numbers. One pass over the chains of both consumers counts them, and takes a few of those that
//! the shadow has not reached. What is said of these holds for all, so the model and its rows are not read.

use serde::Serialize;
use sqlx::{AssertSqlSafe, PgConnection};

use super::{compare::Comparison, progress::lagging};

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
    /// `level`, `excused` and `behind` are estimates, from some of the aggregates that are not level. None behind is exact.
    pub(super) estimated: bool,
    /// A few of the aggregates behind.
    pub(super) examples: Vec<String>,
}

/// A chain that the shadow has not reached.
#[derive(Debug, sqlx::FromRow)]
struct Chain {
    source: String,
    aggregate_type: String,
    aggregate_id: String,
    /// The shadow's version.
    shadow: i64,
    /// The live one.
    version: i64,
    excused: bool,
}

/// One look at all chains.
#[derive(Debug)]
pub(super) struct Look {
    aggregates: i64,
    /// Those that the shadow does not need, as far as the pass has counted them itself.
    excused: i64,
    /// The others that the shadow had not reached.
    lagging: i64,
    /// How many of these were taken.
    taken: i64,
    /// Those of them that it still had not reached when they were looked at, in the order of their ids.
    chains: Vec<Chain>,
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
/// The shadow has not reached the chain.
const LAGS: &str = "l.version > coalesce(s.version, 0)";
/// It need not.
const EXCUSE: &str = "WHEN e.source IS NOT NULL OR coalesce(s.version, 0) = 0 AND p.id IS NULL THEN -1";

impl Look {
    /// Looks at the chains. What is lagging is counted in 4,096 parts by its id, and of each part one chain is taken: of
    /// few, all or nearly all. With `excuses`, those that the shadow does not need are left out of them; that reads the
    /// persons as well.
    pub(super) async fn at(
        conn: &mut PgConnection,
        comparison: &Comparison<'_>,
        excuses: bool,
    ) -> sqlx::Result<Self> {
        // The hash table of a million rows.
        sqlx::raw_sql("SET work_mem = '64MB'").execute(&mut *conn).await?;
        let (excuse, more) = if excuses { (EXCUSE, EXCUSES) } else { ("", "") };
        let sql = format!(
            "SELECT CASE WHEN NOT {LAGS} THEN NULL {excuse} ELSE hashtext(l.aggregate_id) & 4095 END AS part, count(*),
                    min(ARRAY[l.source, l.aggregate_type, l.aggregate_id]) FILTER (WHERE {LAGS})
             {BOTH} {more}
             WHERE l.consumer = $1 AND l.version > 0 GROUP BY part"
        );
        let parts: Vec<(Option<i32>, i64, Option<Vec<String>>)> = sqlx::query_as(AssertSqlSafe(sql))
            .bind(comparison.live)
            .bind(comparison.shadow)
            .fetch_all(&mut *conn)
            .await?;
        let mut look = Self { aggregates: 0, excused: 0, lagging: 0, taken: 0, chains: Vec::new() };
        let mut keys: [Vec<String>; 3] = Default::default();
        for (part, count, key) in parts {
            look.aggregates += count;
            match part {
                None => {}
                Some(-1) => look.excused += count,
                Some(_) => {
                    look.lagging += count;
                    look.taken += 1;
                    for (column, value) in keys.iter_mut().zip(key.unwrap_or_default()) {
                        column.push(value);
                    }
                }
            }
        }
        let taken = lagging(
            "(SELECT * FROM unnest($3::text[], $4::text[], $5::text[]) AS k (source, aggregate_type, aggregate_id))",
        );
        let sql = format!(
            "{taken} SELECT source, aggregate_type, aggregate_id, shadow, version, excused FROM lagging
             ORDER BY aggregate_id"
        );
        let [sources, types, ids] = keys;
        look.chains = sqlx::query_as(AssertSqlSafe(sql))
            .bind(comparison.live)
            .bind(comparison.shadow)
            .bind(sources)
            .bind(types)
            .bind(ids)
            .fetch_all(conn)
            .await?;
        Ok(look)
    }

    fn behind(&self) -> impl Iterator<Item = &Chain> {
        self.chains.iter().filter(|chain| !chain.excused)
    }

    /// How many of those that were taken are behind.
    pub(super) fn sample(&self) -> usize {
        self.behind().count()
    }

    /// All aggregates behind were taken.
    pub(super) fn is_whole(&self) -> bool {
        self.taken == self.lagging
    }

    /// What this says of all aggregates.
    pub(super) fn counts(&self) -> Counts {
        let behind = self.of_all(self.sample());
        // What was not taken may be behind.
        let behind = if self.is_whole() { behind } else { behind.max(1) };
        let excused = self.excused + self.of_all(self.chains.len() - self.sample());
        let examples = self.behind().take(5).map(|chain| {
            let Chain { source, aggregate_type, aggregate_id, shadow, version, .. } = chain;
            format!("{source} {aggregate_type}/{aggregate_id}: version {shadow} of {version}")
        });
        Counts {
            aggregates: self.aggregates,
            level: self.aggregates - excused - behind,
            excused,
            behind,
            estimated: !self.is_whole(),
            examples: examples.collect(),
        }
    }

    /// So many of those that were taken, for all that are lagging.
    pub(super) fn of_all(&self, taken: usize) -> i64 {
        let taken = i64::try_from(taken).unwrap_or(i64::MAX);
        if self.is_whole() {
            return taken;
        }
        let estimate = i128::from(self.lagging) * i128::from(taken) / i128::from(self.taken.max(1));
        i64::try_from(estimate).unwrap_or(i64::MAX)
    }

    /// Looks again at those that were taken: leaves out whom the shadow has reached since, at the version that the live
    /// model had at the look.
    pub(super) async fn again(&mut self, conn: &mut PgConnection, shadow: &str) -> sqlx::Result<()> {
        let column = |pick: fn(&Chain) -> &str| -> Vec<&str> { self.chains.iter().map(pick).collect() };
        let versions: Vec<i64> = self.chains.iter().map(|chain| chain.version).collect();
        let reached: Vec<bool> = sqlx::query_scalar(
            "SELECT coalesce(s.version, 0) >= k.version
             FROM unnest($2::text[], $3::text[], $4::text[], $5::bigint[])
                      WITH ORDINALITY AS k (source, aggregate_type, aggregate_id, version, n)
                  LEFT JOIN LATERAL (SELECT version FROM inbox.aggregate
                                     WHERE (consumer, source, aggregate_type, aggregate_id)
                                         = ($1, k.source, k.aggregate_type, k.aggregate_id) OFFSET 0) s ON true
             ORDER BY k.n",
        )
        .bind(shadow)
        .bind(column(|chain| &chain.source))
        .bind(column(|chain| &chain.aggregate_type))
        .bind(column(|chain| &chain.aggregate_id))
        .bind(versions)
        .fetch_all(conn)
        .await?;
        let mut reached = reached.into_iter();
        self.chains.retain(|_| !reached.next().unwrap_or(false));
        Ok(())
    }
}
