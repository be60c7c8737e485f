//! Rows of the outbox that cannot be read as events are set aside, each by its position, so that the rest goes on.

use std::time::Duration;

use sqlx::{Connection, PgConnection};

use crate::{
    parked::{SetAside, keep_erasures_out},
    row::Unreadable,
};

/// Copies the rows into `outbox.parked` as refused, if `epoch` is still the relay's. What such a
/// row lacks is filled in, so that there is always a copy: an operator can mend it there, and have it tried again.
///
/// Erasures are kept out meanwhile, as for other copies, and waited for no longer than `wait`.
pub async fn set_aside(
    conn: &mut PgConnection,
    relay: &str,
    epoch: i64,
    rows: &[Unreadable],
    wait: Duration,
) -> Result<SetAside, sqlx::Error> {
    let positions: Vec<i64> = rows.iter().map(|row| row.position).collect();
    let reasons: Vec<&str> = rows.iter().map(|row| &*row.reason).collect();
    // Only `created_at` and `headers` are copied as they are: the copy has no other rule for them.
    let sql = "\
        WITH fence AS (SELECT dropped_by_hand FROM outbox.relay WHERE name = $1 AND epoch = $2), \
        parked AS ( \
            INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, payload, \
                                       headers, created_at, previous_id, reason, detail) \
            SELECT $1, e.position, coalesce(e.id, '00000000-0000-0000-0000-000000000000'), \
                   left(coalesce(e.aggregate_type, ''), 255), left(coalesce(e.aggregate_id, ''), 255), \
                   coalesce(e.version, 0), left(coalesce(e.type, ''), 255), coalesce(e.payload, 'null'), e.headers, \
                   coalesce(e.created_at, now()), e.previous_id, 'refused', \
                   'the event at position ' || e.position || ' cannot be published: ' || p.reason \
            FROM unnest($3::bigint[], $4::text[]) AS p (position, reason) \
            JOIN outbox.readable e USING (position) \
            WHERE EXISTS (SELECT FROM fence WHERE NOT dropped_by_hand @> e.position) \
            ORDER BY e.position \
            ON CONFLICT (relay, position) DO NOTHING) \
        SELECT EXISTS (SELECT FROM fence)";
    let mut tx = conn.begin().await?;
    if !keep_erasures_out(&mut tx, wait).await? {
        tx.rollback().await?;
        return Ok(SetAside::Erasing);
    }
    let mine = sqlx::query_scalar(sql)
        .bind(relay)
        .bind(epoch)
        .bind(positions)
        .bind(reasons)
        .fetch_one(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(SetAside::fenced(mine))
}

/// Says once for all of them that rows were set aside.
pub fn report(rows: &[Unreadable]) {
    let Some(Unreadable { position, reason }) = rows.first() else { return };
    tracing::warn!(rows = rows.len(), position, reason, "events that cannot be read were set aside");
}
