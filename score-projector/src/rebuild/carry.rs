//! Moves rows of the inbox from the live consumer to its successor.

use sqlx::{AssertSqlSafe, Postgres, Transaction};

use super::progress::COMPARED;

/// Moves the versions of aggregates that the shadow does not need, the live consumer's held events, and its rejected
/// messages. Both consumers must be locked out.
pub(super) async fn over(tx: &mut Transaction<'_, Postgres>, live: &str, shadow: &str) -> sqlx::Result<()> {
    let chains = format!(
        "{COMPARED}
         INSERT INTO inbox.aggregate AS a (consumer, source, aggregate_type, aggregate_id, version, last_event_id)
         SELECT $2, source, aggregate_type, aggregate_id, version, last_event_id
         FROM compared WHERE shadow < version AND excused
         ON CONFLICT (consumer, source, aggregate_type, aggregate_id) DO UPDATE
         SET version = excluded.version, last_event_id = excluded.last_event_id, updated_at = now()
         WHERE a.version < excluded.version"
    );
    sqlx::query(AssertSqlSafe(chains)).bind(live).bind(shadow).execute(&mut **tx).await?;
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
