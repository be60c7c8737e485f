//! All of the SQL: one row of the read model by its cpf.

use std::{str::FromStr, time::Duration};

use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use service::config::database::Schema;
use sqlx::PgPool;
use uuid::Uuid;

/// How long a read may take, waiting for a connection included. The pool alone would wait longer.
const DEADLINE: Duration = Duration::from_secs(2);

/// Between two lives of a cpf there is no order on the way here, so the older one may still be there
/// when the newer one is; the newest answers.
const NEWEST_LIFE: &str = "SELECT id, version, total, updated_at FROM score.person
WHERE cpf = $1 ORDER BY created_at DESC, id DESC LIMIT 1";

/// The schema `score`, as the score projector's migrations make it.
pub(crate) fn schema() -> Schema {
    let mut migrator = sqlx::migrate!("../migrations/score");
    migrator.dangerous_set_table_name("score.migration");
    migrator.create_schema("score");
    Schema { name: "score", migrator, command: "score-projector migrate" }
}

/// A positive integer of at most 11 digits, as the path brings it. Personal data, so it neither
/// displays nor debugs.
#[derive(Clone, Copy)]
pub(crate) struct Cpf(i64);

impl FromStr for Cpf {
    type Err = ();

    /// Takes 1 to 11 ASCII digits, leading zeros included, and nothing else.
    fn from_str(digits: &str) -> Result<Self, ()> {
        if digits.len() > 11 || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(());
        }
        digits.parse().ok().filter(|number| *number > 0).map(Self).ok_or(())
    }
}

/// A person's score, as the read model has it.
#[derive(Debug, sqlx::FromRow)]
pub(crate) struct Score {
    /// Names the life of the cpf.
    #[sqlx(rename = "id")]
    pub(crate) person_id: Uuid,
    /// The person's version that the score contains.
    pub(crate) version: i64,
    /// The score: an integer that may exceed 64 bits, and 0 without items.
    pub(crate) total: Decimal,
    /// When the projector last wrote it.
    pub(crate) updated_at: DateTime<Utc>,
}

/// Why there is no score, from the caller's point of view.
#[derive(Debug)]
pub(crate) enum ReadError {
    /// The database does not answer in time; another try makes sense.
    Unavailable,
    /// A defect.
    Defect(sqlx::Error),
}

/// The score of the newest life of `cpf`, if one is known.
pub(crate) async fn newest_life(pool: &PgPool, cpf: Cpf) -> Result<Option<Score>, ReadError> {
    let read = sqlx::query_as(NEWEST_LIFE).bind(cpf.0).fetch_optional(pool);
    match tokio::time::timeout(DEADLINE, read).await {
        Ok(Ok(score)) => Ok(score),
        Ok(Err(error)) if is_away(&error) => {
            // Readiness says it at a level that is read; once a request would be too often.
            tracing::debug!(reason = reason(&error), "a read failed");
            Err(ReadError::Unavailable)
        }
        Ok(Err(error)) => Err(ReadError::Defect(error)),
        Err(_) => Err(ReadError::Unavailable),
    }
}

/// Whether the same read may succeed later: no connection, or SQLSTATE classes 08 (connection),
/// 40 (rolled back), 53 (resources), 55 (not in this state), 57 (shutting down, or a timeout).
fn is_away(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed => true,
        sqlx::Error::Database(error) => error
            .code()
            .is_some_and(|code| ["08", "40", "53", "55", "57"].iter().any(|class| code.starts_with(class))),
        _ => false,
    }
}

/// Why the database does not answer, for operators.
pub(crate) fn reason(error: &sqlx::Error) -> String {
    let reason = match error {
        sqlx::Error::PoolTimedOut => "no connection within 5 s".to_owned(),
        // Without where in its own source PostgreSQL raised it.
        sqlx::Error::Database(error) => error.message().to_owned(),
        other => other.to_string(),
    };
    format!("the database does not answer: {reason}")
}

#[cfg(test)]
mod tests {
    use sqlx::{Connection, PgConnection};

    use super::*;

    /// However many persons there are, an answer reads one entry of the index and one row.
    #[tokio::test]
    async fn the_newest_life_is_found_by_the_index_alone() {
        let url = devstack::testing::database("score_api_plan").await;
        let mut conn = PgConnection::connect(&url).await.unwrap();
        schema().migrator.run(&mut conn).await.unwrap();
        let fill = "INSERT INTO score.person (id, cpf, created_at, version)
                    SELECT gen_random_uuid(), i % 20000 + 1, now() + i * interval '1 s', 1
                    FROM generate_series(1, 50000) i";
        sqlx::query(fill).execute(&mut conn).await.unwrap();
        sqlx::query("ANALYZE score.person").execute(&mut conn).await.unwrap();
        let explain = sqlx::AssertSqlSafe(format!("EXPLAIN (COSTS OFF) {NEWEST_LIFE}"));
        let plan: Vec<String> =
            sqlx::query_scalar(explain).bind(11111_i64).fetch_all(&mut conn).await.unwrap();
        insta::assert_snapshot!(plan.join("\n"), @r"
        Limit
          ->  Index Scan using person_cpf on person
                Index Cond: (cpf = '11111'::bigint)
        ");
    }
}
