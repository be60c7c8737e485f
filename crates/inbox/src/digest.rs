use sqlx::PgConnection;

/// What a consumer has applied of a source, for one type of aggregates and one bucket of them. As
/// `outbox.digest` says of the source: what is equal is the same.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct Digest {
    /// Who publishes.
    pub source: String,
    /// The aggregates' type.
    pub aggregate_type: String,
    /// Which part of them, by a hash of their ids: from 0 up to the number of buckets.
    pub bucket: i32,
    /// How many there are.
    pub aggregates: i64,
    /// The sum of their last versions, modulo 2^63.
    pub versions: i64,
    /// A hash of ids and last versions, in any order.
    pub hash: i64,
}

/// Sums up what `consumer` has applied, divided into `buckets`. One pass over its rows in `inbox.aggregate`.
pub async fn digest(conn: &mut PgConnection, consumer: &str, buckets: i32) -> sqlx::Result<Vec<Digest>> {
    sqlx::query_as(
        "SELECT s.source, d.*
         FROM inbox.sources() s CROSS JOIN LATERAL inbox.digest(s.consumer, s.source, $2) d
         WHERE s.consumer = $1 ORDER BY s.source, d.aggregate_type, d.bucket",
    )
    .bind(consumer)
    .bind(buckets)
    .fetch_all(conn)
    .await
}
