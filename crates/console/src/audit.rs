//! Who did what, and why: rows of `outbox.audit`.

use chrono::{DateTime, Utc};
use sqlx::{PgConnection, types::JsonValue};

/// What an operator is about to do.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// The name of the operator's key.
    pub operator: &'a str,
    /// `pause`, `drop`, ...
    pub action: &'a str,
    /// What it is done to.
    pub target: &'a str,
    /// In the operator's words.
    pub why: &'a str,
}

/// A row.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct Row {
    /// When.
    pub at: DateTime<Utc>,
    /// The operator.
    pub operator: String,
    /// What.
    pub action: String,
    /// To what.
    pub target: String,
    /// Why.
    pub why: String,
    /// What was chosen, and how much it was.
    pub detail: JsonValue,
}

/// Adds a row. It is committed before the action, so that there is no change without a row.
pub async fn add(conn: &mut PgConnection, entry: Entry<'_>, detail: JsonValue) -> sqlx::Result<()> {
    let Entry { operator, action, target, why } = entry;
    sqlx::query(
        "INSERT INTO outbox.audit (operator, action, target, why, detail) VALUES ($1, $2, $3, $4, $5)",
    )
    .bind(operator)
    .bind(action)
    .bind(target)
    .bind(why)
    .bind(detail)
    .execute(conn)
    .await
    .map(drop)
}

/// The last rows, the newest first.
pub async fn last(conn: &mut PgConnection, most: i64) -> sqlx::Result<Vec<Row>> {
    sqlx::query_as(
        "SELECT at, operator, action, target, why, detail FROM outbox.audit ORDER BY id DESC LIMIT $1",
    )
    .bind(most)
    .fetch_all(conn)
    .await
}
