use std::borrow::Cow;

use sqlx::{Postgres, Transaction};

use crate::prepare;

/// An aggregate that ends, and whose content is to go.
#[derive(Clone, Debug)]
pub struct Ended {
    /// What kind of thing it is.
    pub aggregate_type: Cow<'static, str>,
    /// Which one.
    pub aggregate_id: String,
    /// The version of its end: the content of all events below goes.
    pub version: i64,
}

/// Erases what the outbox holds of aggregates that end in this transaction, published or not: bodies become
/// `{"id", "erased": true}`, headers say `erased`, and positions, versions and types stay. Returns how many
/// events that were. Takes the same time however many partitions' worth of others there are.
///
/// Of an aggregate with more than some thousand events the rest is only noted, in `outbox.erasure`: readers of
/// `outbox.readable` get the erased form at once, and a running relay rewrites the rows step by step.
///
/// The aggregates must be locked before, by an earlier statement: nobody appends to them any more then. To [`publish`] the
/// end locks it.
///
/// [`publish`]: crate::publish()
pub async fn erase(tx: &mut Transaction<'_, Postgres>, ended: &[Ended]) -> sqlx::Result<u64> {
    if ended.is_empty() {
        return Ok(0);
    }
    let erased: i64 = sqlx::query_scalar("SELECT outbox.erase($1, $2, $3)")
        .bind(ended.iter().map(|e| e.aggregate_type.as_ref()).collect::<Vec<&str>>())
        .bind(ended.iter().map(|e| e.aggregate_id.as_str()).collect::<Vec<_>>())
        .bind(ended.iter().map(|e| e.version).collect::<Vec<_>>())
        .persistent(prepare::by_name(tx))
        .fetch_one(&mut **tx)
        .await?;
    Ok(erased.unsigned_abs())
}
