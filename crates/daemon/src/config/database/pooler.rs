//! Whether there is a pooler that does not keep one session for one connection. What is set and prepared on a
//! session is lost there, or is another client's.

use sqlx::{AssertSqlSafe, PgConnection, Row};
use uuid::Uuid;

/// Whether the statements of `a` reach other sessions than its own. It marks its session; while `b` has a transaction
/// open, whose session is certain, the mark must be at `a` and nowhere else. Without prepared statements, which
/// would fail first.
pub async fn shared(a: &mut PgConnection, b: &mut PgConnection) -> sqlx::Result<bool> {
    let mark = Uuid::new_v4().simple().to_string();
    set(a, &mark).await?;
    sqlx::raw_sql("BEGIN").execute(&mut *b).await?;
    // In this order: a pooler with one session would let `a` wait for it.
    let shared = read(b).await? == mark || read(a).await? != mark;
    sqlx::raw_sql("ROLLBACK").execute(b).await?;
    set(a, "").await?;
    Ok(shared)
}

async fn set(conn: &mut PgConnection, mark: &str) -> sqlx::Result<()> {
    sqlx::raw_sql(AssertSqlSafe(format!("SELECT set_config('service.mark', '{mark}', false)")))
        .execute(conn)
        .await?;
    Ok(())
}

async fn read(conn: &mut PgConnection) -> sqlx::Result<String> {
    let row =
        sqlx::raw_sql("SELECT coalesce(current_setting('service.mark', true), '')").fetch_one(conn).await?;
    row.try_get(0)
}
