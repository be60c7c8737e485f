use sqlx::PgConnection;

/// A digest of what a consumer has applied of one source, one aggregate type and one bucket. Equal to the row of
/// `outbox.digest` at the source exactly when all versions are equal.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct Digest {
    /// The source with its incarnation.
    pub source: String,
    /// The type of the aggregates.
    pub aggregate_type: String,
    /// The bucket, by a hash of the aggregates' ids: 0 to `buckets - 1`.
    pub bucket: i32,
    /// How many aggregates.
    pub aggregates: i64,
    /// The sum of their last versions, modulo 2^63.
    pub versions: i64,
    /// A hash of all ids and last versions, independent of their order.
    pub hash: i64,
}

/// Computes the digests of what `consumer` has applied, in `buckets` parts for each type. Reads all of its rows in
/// `inbox.aggregate` once.
///
/// ```
/// # async fn example(conn: &mut sqlx::PgConnection) -> sqlx::Result<()> {
/// for digest in inbox::digest(conn, "stock", 1).await? {
///     println!("{}: {} aggregates, hash {:x}", digest.source, digest.aggregates, digest.hash);
/// }
/// # Ok(())
/// # }
/// ```
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
