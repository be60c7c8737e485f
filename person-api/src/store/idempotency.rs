//! Stored responses: a retry with the same idempotency key gets the first response again.

use std::time::Duration;

use outbox::database::describe;
use sqlx::{
    FromRow, Postgres,
    postgres::{PgArguments, PgRow},
    query::QueryAs,
};
use tokio_util::sync::CancellationToken;

use super::{
    connection::{Connection, Connections, Store},
    error::StoreError,
    outcome::{AddOutcome, Refusal, StoredResponse},
};
use crate::model::IdempotentRequest;

/// How long a response is stored at least, in PostgreSQL's words.
const RETENTION: &str = "24 hours";
/// How often the program looks for older ones; the first time after [`SOON`].
const INTERVAL: Duration = Duration::from_mins(1);
const SOON: Duration = Duration::from_secs(2);
/// How many of them one statement removes.
const BATCH: i64 = 1000;

/// By the digest of the key: when the person is deleted, the row stays with this digest, and is empty otherwise. A person
/// whose items are still being removed has no cpf, and their stored responses count as emptied.
pub(super) const FIND: &str = "
SELECT stored.route = '' OR person.cpf IS NULL AS spent, stored.request = $4 AS same,
       stored.location, stored.etag, stored.body
FROM person.idempotency stored LEFT JOIN person.person ON person.id = stored.person_id
WHERE person.key_digest(stored.caller, stored.route, stored.key) = person.key_digest($1, $2, $3)";

/// By the index on the age. Rows that a deletion has locked are left to it.
pub(super) const REMOVE: &str = "
DELETE FROM person.idempotency WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM person.idempotency
    WHERE created_at < now() - $1::interval ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED))";

/// The body of the response to a creation. The statement fills in the id and the version.
pub const CREATED: &str = "{\"message\":\"created\",\"id\":\"{id}\",\"version\":{version}}\n";

impl Store {
    /// The response that is stored under the request's key. A retry does not wait for writes about the same person.
    pub(super) async fn find_stored(
        &self,
        idempotent: Option<&IdempotentRequest>,
    ) -> Result<Option<AddOutcome>, StoreError> {
        if idempotent.is_none() {
            return Ok(None);
        }
        find(idempotent, &mut self.acquire().await?).await
    }
}

async fn find(
    idempotent: Option<&IdempotentRequest>,
    conn: &mut Connection,
) -> Result<Option<AddOutcome>, StoreError> {
    let Some(IdempotentRequest { caller, route, key, digest }) = idempotent else { return Ok(None) };
    let find = sqlx::query_as(FIND).bind(caller).bind(route).bind(key).bind(digest);
    let stored: Option<(bool, bool, String, String, String)> =
        conn.fetch_optional("SELECT", "idempotency", find).await.map_err(StoreError::of_a_read)?;
    Ok(stored.map(|(spent, same, location, etag, body)| match (spent, same) {
        (true, _) => AddOutcome::Refused(Refusal::KeySpent),
        (false, true) => AddOutcome::Repeated(StoredResponse { location, etag, body }),
        (false, false) => AddOutcome::Refused(Refusal::KeyReused),
    }))
}

/// The response that is stored under the request's key by now, or else `otherwise`: a request with the same key may have
/// stored it while this one waited.
pub(super) async fn find_or(
    idempotent: Option<&IdempotentRequest>,
    conn: &mut Connection,
    otherwise: Result<AddOutcome, StoreError>,
) -> Result<AddOutcome, StoreError> {
    match find(idempotent, conn).await? {
        Some(earlier) => Ok(earlier),
        None => otherwise,
    }
}

/// Binds caller, route, key, the body's digest, location and response body.
pub(super) fn bind<'q, O: for<'r> FromRow<'r, PgRow>>(
    idempotent: Option<&IdempotentRequest>,
    query: QueryAs<'q, Postgres, O, PgArguments>,
    location: String,
) -> QueryAs<'q, Postgres, O, PgArguments> {
    let idempotent = idempotent.cloned();
    query
        .bind(idempotent.as_ref().map(|request| request.caller.clone()))
        .bind(idempotent.as_ref().map(|request| request.route.clone()))
        .bind(idempotent.as_ref().map(|request| request.key.clone()))
        .bind(idempotent.map(|request| request.digest))
        .bind(location)
        .bind(CREATED)
}

/// Removes stored responses that are older than a day, until `stop`.
pub async fn clean(connections: Connections, stop: CancellationToken) {
    let mut pause = SOON;
    while stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_some() {
        pause = INTERVAL;
        let Some(removed) = stop.run_until_cancelled(remove_old(&connections)).await else { return };
        match removed {
            Ok(0) => {}
            Ok(removed) => tracing::info!(removed, "old stored responses were removed"),
            Err(error) => {
                tracing::warn!(error = describe(&error), "old stored responses could not be removed");
            }
        }
    }
}

/// Removes stored responses that are older than a day, batch by batch. Returns how many.
pub async fn remove_old(connections: &Connections) -> sqlx::Result<u64> {
    let mut removed = 0;
    loop {
        let mut conn = connections.acquire().await?;
        let mut tx = connections.begin(&mut conn).await?;
        let remove = sqlx::query(REMOVE).bind(RETENTION).bind(BATCH).persistent(connections.prepare());
        let batch = remove.execute(&mut *tx).await?.rows_affected();
        tx.commit().await?;
        removed += batch;
        if batch < BATCH.unsigned_abs() {
            return Ok(removed);
        }
    }
}
