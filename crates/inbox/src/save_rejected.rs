//! Stores messages that cannot be applied, as many as may be stored.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    slice,
};

use serde_json::json;
use sqlx::{Postgres, Transaction};

use crate::{
    Event,
    chain::{FOLLOWS_ANOTHER, Key},
    ledger::Ledger,
    rejection::{NOT_KEPT, Rejection},
    stored_message::StoredMessage,
};

/// A message that cannot be applied.
pub(crate) struct RejectedMessage<'a> {
    pub(crate) stored: Cow<'a, StoredMessage<'a>>,
    /// The event in it, when it is one.
    pub(crate) event: Option<&'a Event>,
    pub(crate) reason: Rejection,
    pub(crate) detail: String,
}

impl<'a> RejectedMessage<'a> {
    /// An event that was held, and turned out to be a suspected fork when its turn came.
    pub(crate) fn forked(event: &'a Event) -> Self {
        let (reason, detail) = (Rejection::Fork, FOLLOWS_ANOTHER.to_owned());
        let stored = Cow::Owned(StoredMessage::of_held(event, reason));
        Self { stored, event: Some(event), reason, detail }
    }
}

impl Ledger<'_> {
    /// Stores a held event as a suspected fork instead. The event with its version may still come.
    pub(crate) async fn reject_held(
        &mut self,
        tx: &mut Transaction<'_, Postgres>,
        forked: &RejectedMessage<'_>,
        most: u32,
    ) -> sqlx::Result<()> {
        self.reject(tx, slice::from_ref(forked), most).await?;
        let Some(event) = forked.event else { return Ok(()) };
        sqlx::query(
            "DELETE FROM inbox.held
             WHERE (consumer, source, aggregate_type, aggregate_id, version) = ($1, $2, $3, $4, $5)",
        )
        .bind(self.consumer)
        .bind(&event.source)
        .bind(&event.aggregate_type)
        .bind(&event.aggregate_id)
        .bind(event.version)
        .execute(&mut **tx)
        .await?;
        self.chain(&Key::from(event))?.held.remove(&event.version);
        Ok(())
    }

    /// Stores messages that cannot be applied. A redelivery is counted, not stored again. Above `most` messages for a
    /// reason, further ones are only counted, in one row.
    pub(crate) async fn reject(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        rejected: &[RejectedMessage<'_>],
        most: u32,
    ) -> sqlx::Result<()> {
        if rejected.is_empty() {
            return Ok(());
        }
        let mut quota = self.quota(tx, rejected, most).await?;
        let overflow: Vec<StoredMessage<'static>> =
            rejected.iter().map(|r| StoredMessage::overflow(r.reason)).collect();
        let rows: Vec<(&StoredMessage<'_>, &str, &str)> = rejected
            .iter()
            .zip(&overflow)
            .map(|(r, overflow)| {
                let detail = if quota.take(r) { r.detail.as_str() } else { NOT_KEPT };
                let stored = if detail == NOT_KEPT { overflow } else { &*r.stored };
                (stored, r.reason.as_str(), detail)
            })
            .collect();
        // In the order of the digest, like every lock; grouped, because one statement may not meet a
        // row of its own.
        sqlx::query(
            "INSERT INTO inbox.rejected AS r
                    (consumer, digest, reason, detail, routing_key, properties, body, bytes, about, times)
             SELECT DISTINCT ON (digest) $1, digest, k.reason, k.detail, k.routing_key, k.properties::json,
                    k.body, k.bytes, ARRAY(SELECT json_array_elements_text(k.about::json)),
                    count(*) OVER (PARTITION BY digest)
             FROM unnest($2::bytea[], $3::text[], $4::text[], $5::text[], $6::text[], $7::bytea[], $8::bigint[],
                         $9::text[])
                  WITH ORDINALITY AS k (digest, reason, detail, routing_key, properties, body, bytes, about, n)
             ORDER BY digest, k.n
             ON CONFLICT (consumer, digest) DO UPDATE SET times = r.times + excluded.times, last_at = now()",
        )
        .bind(self.consumer)
        .bind(rows.iter().map(|(stored, ..)| stored.digest.as_slice()).collect::<Vec<_>>())
        .bind(rows.iter().map(|(_, reason, _)| *reason).collect::<Vec<_>>())
        .bind(rows.iter().map(|(.., detail)| *detail).collect::<Vec<_>>())
        .bind(rows.iter().map(|(stored, ..)| stored.routing_key.as_str()).collect::<Vec<_>>())
        .bind(rows.iter().map(|(stored, ..)| stored.properties.as_str()).collect::<Vec<_>>())
        .bind(rows.iter().map(|(stored, ..)| stored.body).collect::<Vec<_>>())
        .bind(rows.iter().map(|(stored, ..)| stored.bytes).collect::<Vec<_>>())
        .bind(rows.iter().map(|(stored, ..)| json!(stored.identifiers).to_string()).collect::<Vec<_>>())
        .execute(&mut **tx)
        .await?;
        Ok(())
    }

    /// How many messages may still be stored, with at most `most` for each reason; 0 for no limit.
    async fn quota(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        rejected: &[RejectedMessage<'_>],
        most: u32,
    ) -> sqlx::Result<Quota> {
        if most == 0 {
            return Ok(Quota { left: None, known: BTreeSet::new() });
        }
        let reasons: BTreeSet<&str> = rejected.iter().map(|r| r.reason.as_str()).collect();
        let kept: Vec<(String, i64)> = sqlx::query_as(
            "SELECT reason, (SELECT count(*) FROM (SELECT FROM inbox.rejected
                                                   WHERE consumer = $1 AND reason = r.reason LIMIT $3) AS counted)
             FROM unnest($2::text[]) AS r (reason)",
        )
        .bind(self.consumer)
        .bind(reasons.into_iter().collect::<Vec<_>>())
        .bind(i64::from(most))
        .fetch_all(&mut **tx)
        .await?;
        let known: Vec<Vec<u8>> =
            sqlx::query_scalar("SELECT digest FROM inbox.rejected WHERE consumer = $1 AND digest = ANY ($2)")
                .bind(self.consumer)
                .bind(rejected.iter().map(|r| r.stored.digest.as_slice()).collect::<Vec<_>>())
                .fetch_all(&mut **tx)
                .await?;
        let left = kept.into_iter().map(|(reason, count)| (reason, i64::from(most) - count)).collect();
        Ok(Quota { left: Some(left), known: known.into_iter().collect() })
    }
}

/// How many messages may still be stored.
struct Quota {
    /// How many of each reason; None for any number.
    left: Option<BTreeMap<String, i64>>,
    /// The digests of those that are stored.
    known: BTreeSet<Vec<u8>>,
}

impl Quota {
    fn take(&mut self, rejected: &RejectedMessage<'_>) -> bool {
        let Some(left) = self.left.as_mut().and_then(|left| left.get_mut(rejected.reason.as_str())) else {
            return true;
        };
        if self.known.contains(&rejected.stored.digest) {
            return true;
        }
        let taken = *left > 0;
        if taken {
            *left -= 1;
            self.known.insert(rejected.stored.digest.clone());
        }
        taken
    }
}
