use sqlx::{Connection, PgConnection};

/// Whether a statement on the caller's connection is prepared by name, for the next use: if the caller's own are. A caller
/// behind a pooler in transaction mode that knows no prepared statements sends each query with `persistent(false)`, and a
/// name would be another client's there, whatever the capacity of the connection's cache is.
pub(crate) fn by_name(conn: &PgConnection) -> bool {
    conn.cached_statements_size() > 0
}
