//! Answers that are kept, so that a retry gets the first one again.

use std::time::Duration;

use sqlx::{
    FromRow, PgConnection, PgPool, Postgres,
    postgres::{PgArguments, PgRow},
    query::QueryAs,
};
use tokio_util::sync::CancellationToken;

use super::{Refused, StoreError, Written, bounded, describe};

/// How long an answer is kept at least, in PostgreSQL's words.
const KEPT: &str = "24 hours";
/// How often those that are older are looked for; the first time soon.
const INTERVAL: Duration = Duration::from_mins(1);
const SOON: Duration = Duration::from_secs(2);
/// How many of them are removed at a time.
const BATCH: i64 = 1000;

/// By the digest of the key, under which a kept answer stays when its person is deleted, emptied. A person whose items
/// are still being removed has no cpf, and their answers are as good as emptied.
pub(super) const FIND: &str = "
SELECT kept.route = '' OR person.cpf IS NULL AS spent, kept.request = $4 AS same, kept.location, kept.etag, kept.body
FROM person.idempotency kept LEFT JOIN person.person ON person.id = kept.person_id
WHERE person.key_digest(kept.caller, kept.route, kept.key) = person.key_digest($1, $2, $3)";

/// By the index on the age. Whoever is being erased just now is left to that.
pub(super) const REMOVE: &str = "
DELETE FROM person.idempotency WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM person.idempotency
    WHERE created_at < now() - $1::interval ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED))";

/// What a new record's body says, with the id and the version still to come.
pub const CREATED: &str = "{\"message\":\"created\",\"id\":\"{id}\",\"version\":{version}}\n";

/// The key of a request, and what it is the key of.
#[derive(Clone, Debug)]
pub struct Keyed {
    /// Whose key.
    pub caller: String,
    /// The path.
    pub route: String,
    /// The key.
    pub key: String,
    /// SHA-256 of the body.
    pub request: Vec<u8>,
}

/// The answer to a request that created something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Where the record is.
    pub location: String,
    /// The state that contains it.
    pub etag: String,
    /// The body.
    pub body: String,
}

/// What became of a request to create something.
#[derive(Clone, Debug)]
pub enum Added {
    /// It is stored.
    Stored(Written),
    /// It was stored before, under the same key, and this was the answer.
    Before(Answer),
    /// It is not.
    Refused(Refused),
}

impl Keyed {
    /// The answer that is kept under the key, if there is one.
    pub(super) async fn find(
        keyed: Option<&Self>,
        conn: &mut PgConnection,
    ) -> Result<Option<Added>, StoreError> {
        let Some(Self { caller, route, key, request }) = keyed else { return Ok(None) };
        let find = sqlx::query_as(FIND).bind(caller).bind(route).bind(key).bind(request);
        let kept: Option<(bool, bool, String, String, String)> =
            bounded(find.fetch_optional(conn)).await.map_err(StoreError::of_a_read)?;
        Ok(kept.map(|(spent, same, location, etag, body)| match (spent, same) {
            (true, _) => Added::Refused(Refused::KeySpent),
            (false, true) => Added::Before(Answer { location, etag, body }),
            (false, false) => Added::Refused(Refused::KeyReused),
        }))
    }

    /// The answer that is kept under the key by now, or else `otherwise`: whoever had the key at the same time
    /// has stored it while this request waited.
    pub(super) async fn find_or(
        keyed: Option<&Self>,
        conn: &mut PgConnection,
        otherwise: Result<Added, StoreError>,
    ) -> Result<Added, StoreError> {
        match Self::find(keyed, conn).await? {
            Some(kept) => Ok(kept),
            None => otherwise,
        }
    }

    /// Binds caller, route, key, request, location and body.
    pub(super) fn bind<'q, O: for<'r> FromRow<'r, PgRow>>(
        keyed: Option<&Self>,
        query: QueryAs<'q, Postgres, O, PgArguments>,
        location: String,
    ) -> QueryAs<'q, Postgres, O, PgArguments> {
        let keyed = keyed.cloned();
        query
            .bind(keyed.as_ref().map(|k| k.caller.clone()))
            .bind(keyed.as_ref().map(|k| k.route.clone()))
            .bind(keyed.as_ref().map(|k| k.key.clone()))
            .bind(keyed.map(|k| k.request))
            .bind(location)
            .bind(CREATED)
    }
}

/// Removes what is older than a day, until `stop`.
pub async fn clean(pool: PgPool, stop: CancellationToken) {
    let mut pause = SOON;
    while stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_some() {
        pause = INTERVAL;
        let Some(removed) = stop.run_until_cancelled(remove_old(&pool)).await else { return };
        match removed {
            Ok(0) => {}
            Ok(removed) => tracing::info!(removed, "kept answers were removed"),
            Err(error) => tracing::warn!(error = describe(&error), "kept answers could not be removed"),
        }
    }
}

/// Removes what is older than a day, batch by batch. Returns how many it were.
pub async fn remove_old(pool: &PgPool) -> sqlx::Result<u64> {
    let mut removed = 0;
    loop {
        let batch = sqlx::query(REMOVE).bind(KEPT).bind(BATCH).execute(pool).await?.rows_affected();
        removed += batch;
        if batch < BATCH.unsigned_abs() {
            return Ok(removed);
        }
    }
}
