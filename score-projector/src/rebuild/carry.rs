//! Moves rows of the inbox from the live consumer to its successor.

use daemon::progress::Progress;
use outbox::database::again;
use sqlx::{AssertSqlSafe, PgConnection, Postgres, Transaction};

use super::{compare::Comparison, progress::lagging};

/// A chain: its source, the type and the id of its aggregate.
type Key = (String, String, String);

/// Chains that one statement moves before the swap.
const BATCH: i64 = 5_000;

/// Gives the shadow the versions of the aggregates that it does not need, as far as the comparison has remembered them. The
/// shadow has no state of them: of an earlier incarnation because it has not received its events, so that the chain has
/// ended here. Moving them before the swap is right, too: what arrives of them afterwards changes nothing.
///
/// In a dry run they are only forgotten.
async fn chains(
    conn: &mut PgConnection,
    comparison: &Comparison<'_>,
    (after, end): (Option<&Key>, Option<&Key>),
    dry_run: bool,
) -> sqlx::Result<u64> {
    let lagging = lagging(
        "(SELECT * FROM pg_temp.lagging
          WHERE ($3::text IS NULL OR (source, aggregate_type, aggregate_id) > ($3, $4, $5))
            AND ($6::text IS NULL OR (source, aggregate_type, aggregate_id) <= ($6, $7, $8)))",
    );
    let sql = format!(
        "{lagging},
         moved AS MATERIALIZED (SELECT * FROM lagging WHERE excused),
         forgotten AS (
             DELETE FROM pg_temp.lagging l USING moved m
             WHERE (l.source, l.aggregate_type, l.aggregate_id) = (m.source, m.aggregate_type, m.aggregate_id))
         INSERT INTO inbox.aggregate AS a (consumer, source, aggregate_type, aggregate_id, version, last_event_id, recent,
                                           ended)
         SELECT $2, source, aggregate_type, aggregate_id, version, last_event_id, recent, ended OR earlier
         FROM moved WHERE $9
         ORDER BY source, aggregate_type, aggregate_id
         ON CONFLICT (consumer, source, aggregate_type, aggregate_id) DO UPDATE
         SET version = excluded.version, last_event_id = excluded.last_event_id, recent = excluded.recent,
             updated_at = now()
         WHERE a.version < excluded.version"
    );
    let moved = sqlx::query(AssertSqlSafe(sql))
        .bind(comparison.live)
        .bind(comparison.shadow)
        .bind(after.map(|key| &*key.0))
        .bind(after.map(|key| &*key.1))
        .bind(after.map(|key| &*key.2))
        .bind(end.map(|key| &*key.0))
        .bind(end.map(|key| &*key.1))
        .bind(end.map(|key| &*key.2))
        .bind(!dry_run)
        .execute(conn)
        .await?;
    Ok(moved.rows_affected())
}

/// Moves what the shadow does not need before the swap, so that the live model does not stand still for it. A dry run
/// moves nothing.
pub(super) async fn before(
    conn: &mut PgConnection,
    comparison: &Comparison<'_>,
    progress: &Progress,
    dry_run: bool,
) -> sqlx::Result<()> {
    progress.step("moving the versions of ended aggregates", "aggregate");
    let (mut after, mut moved) = (None, 0);
    loop {
        let end: Option<Key> = sqlx::query_as(
            "SELECT source, aggregate_type, aggregate_id FROM pg_temp.lagging
             WHERE $1::text IS NULL OR (source, aggregate_type, aggregate_id) > ($1, $2, $3)
             ORDER BY source, aggregate_type, aggregate_id OFFSET $4 LIMIT 1",
        )
        .bind(after.as_ref().map(|key: &Key| &*key.0))
        .bind(after.as_ref().map(|key: &Key| &*key.1))
        .bind(after.as_ref().map(|key: &Key| &*key.2))
        .bind(BATCH - 1)
        .fetch_optional(&mut *conn)
        .await?;
        let range = (after.as_ref(), end.as_ref());
        moved += again(async || chains(conn, comparison, range, dry_run).await).await?;
        progress.count(moved);
        match end {
            Some(end) => after = Some(end),
            None => return Ok(()),
        }
    }
}

/// Moves the versions of aggregates that the shadow does not need, the newest incarnations of the sources, the live
/// consumer's held events, and its rejected messages. Both consumers must be locked out.
pub(super) async fn over(
    tx: &mut Transaction<'_, Postgres>,
    comparison: &Comparison<'_>,
) -> sqlx::Result<()> {
    let Comparison { live, shadow } = comparison;
    chains(tx, comparison, (None, None), false).await?;
    sources(tx, live, shadow).await?;
    for sql in [
        "UPDATE inbox.held h SET consumer = $2
         WHERE consumer = $1
           AND NOT EXISTS (SELECT FROM inbox.held s
                           WHERE (s.consumer, s.source, s.aggregate_type, s.aggregate_id, s.version)
                               = ($2, h.source, h.aggregate_type, h.aggregate_id, h.version))
           AND NOT EXISTS (SELECT FROM inbox.aggregate s
                           WHERE (s.consumer, s.source, s.aggregate_type, s.aggregate_id)
                               = ($2, h.source, h.aggregate_type, h.aggregate_id) AND s.version >= h.version)",
        "UPDATE inbox.rejected r SET consumer = $2
         WHERE consumer = $1
           AND NOT EXISTS (SELECT FROM inbox.rejected s WHERE (s.consumer, s.digest) = ($2, r.digest))",
    ] {
        sqlx::query(sql).bind(live).bind(shadow).execute(&mut **tx).await?;
    }
    Ok(())
}

/// Gives the consumer `to` what the consumer `from` knows of the sources. It keeps what is newer.
pub(super) async fn sources(tx: &mut Transaction<'_, Postgres>, from: &str, to: &str) -> sqlx::Result<()> {
    sqlx::query(
        "INSERT INTO inbox.source AS s (consumer, name, incarnation, earlier)
         SELECT $2, name, incarnation, earlier FROM inbox.source WHERE consumer = $1
         ON CONFLICT (consumer, name) DO UPDATE
         SET incarnation = greatest(s.incarnation, excluded.incarnation),
             earlier = ARRAY(SELECT DISTINCT n FROM unnest(s.earlier || s.incarnation || excluded.earlier
                                                           || excluded.incarnation) AS known (n)
                             WHERE n < greatest(s.incarnation, excluded.incarnation) ORDER BY n)",
    )
    .bind(from)
    .bind(to)
    .execute(&mut **tx)
    .await?;
    Ok(())
}
