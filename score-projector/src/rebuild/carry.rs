//! Moves rows of the inbox from the live consumer to its successor.

use sqlx::{AssertSqlSafe, Postgres, Transaction};

use super::progress::COMPARED;

/// Moves the versions of aggregates that the shadow does not need, the newest incarnations of the sources, the live
/// consumer's held events, and its rejected messages. Both consumers must be locked out.
///
/// The shadow has no state of an aggregate of an earlier incarnation whose events it has not received. So its chain has
/// ended here.
pub(super) async fn over(tx: &mut Transaction<'_, Postgres>, live: &str, shadow: &str) -> sqlx::Result<()> {
    let chains = format!(
        "{COMPARED}
         INSERT INTO inbox.aggregate AS a (consumer, source, aggregate_type, aggregate_id, version, last_event_id, recent,
                                           ended)
         SELECT $2, source, aggregate_type, aggregate_id, version, last_event_id, recent, ended OR earlier
         FROM compared WHERE shadow < version AND excused
         ON CONFLICT (consumer, source, aggregate_type, aggregate_id) DO UPDATE
         SET version = excluded.version, last_event_id = excluded.last_event_id, recent = excluded.recent,
             updated_at = now()
         WHERE a.version < excluded.version"
    );
    sqlx::query(AssertSqlSafe(chains)).bind(live).bind(shadow).execute(&mut **tx).await?;
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
