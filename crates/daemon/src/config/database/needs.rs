//! What a program needs of its database, asked in one statement: at start, and for its readiness.

use std::time::Duration;

use sqlx::{AssertSqlSafe, PgConnection, PgPool};
use tokio_util::sync::CancellationToken;

use super::{
    Database,
    schema::{Applied, Schema, SchemaError},
};

/// No look takes longer. The pool gives no connection within 5 s while the database is away.
const TIMEOUT: Duration = Duration::from_secs(6);
/// Between looks, the first and the longest pause.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Marks a row of the result that is a problem, and not a migration.
const PROBLEM: &str = "!";

/// The schemas, and what the program does with them.
#[derive(Debug)]
pub struct Needs {
    /// All of them current.
    pub schemas: Vec<Schema>,
    /// It writes, so a standby or a read-only transaction is not enough.
    pub writes: bool,
    /// A relation and a privilege each, such as `("outbox.event", "INSERT")`; one on some columns is enough. No row
    /// security may apply to the relation.
    pub rights: &'static [(&'static str, &'static str)],
}

impl Needs {
    /// Checks everything, in one statement when it is there.
    pub async fn check(&self, conn: &mut PgConnection) -> Result<(), SchemaError> {
        self.ask(conn, true).await
    }

    /// As [`check`](Self::check), over a connection of `database`, which may share its sessions.
    pub async fn check_of(&self, database: &Database, conn: &mut PgConnection) -> Result<(), SchemaError> {
        if !database.are_shared() {
            return self.ask(conn, true).await;
        }
        let mut tx = database.begin(conn).await?;
        self.ask(&mut tx, false).await?;
        Ok(tx.commit().await?)
    }

    async fn ask(&self, conn: &mut PgConnection, is_prepared: bool) -> Result<(), SchemaError> {
        let mut each: Vec<String> = self.schemas.iter().map(Schema::applied).collect();
        each.push(self.problems());
        let ask = sqlx::query_as(AssertSqlSafe(each.join(" UNION ALL "))).persistent(is_prepared);
        let asked = ask.fetch_all(&mut *conn).await;
        let rows: Vec<Applied> = match asked {
            Ok(rows) => rows,
            Err(sqlx::Error::Database(error)) => {
                // Alone, each schema says which one it is.
                for schema in &self.schemas {
                    schema.check(conn).await?;
                }
                return Err(sqlx::Error::Database(error).into());
            }
            Err(error) => return Err(error.into()),
        };
        self.schemas.iter().try_for_each(|schema| schema.compare(&rows))?;
        let mut problems = rows.iter().filter_map(|(name, ..)| name.strip_prefix(PROBLEM)).peekable();
        if problems.peek().is_none() {
            return Ok(());
        }
        Err(SchemaError::Unmet(problems.collect::<Vec<_>>().join("; ")))
    }

    /// A query for what is not as it must be, in the form of [`Applied`].
    fn problems(&self) -> String {
        let list = |rows: Vec<String>| rows.join(", ");
        let mut problems = Vec::new();
        if self.writes {
            problems.push(
                "SELECT 'the server is in recovery, so it takes no writes: it is a standby or still starting; \
                 connect to the primary' WHERE pg_is_in_recovery()"
                    .to_owned(),
            );
            problems.push(
                "SELECT 'the database takes no writes from this role: default_transaction_read_only is on; set it \
                 off for the role or the database' \
                 WHERE NOT pg_is_in_recovery() AND current_setting('transaction_read_only') = 'on'"
                    .to_owned(),
            );
        }
        if !self.rights.is_empty() {
            let rights =
                self.rights.iter().map(|(relation, privilege)| format!("('{relation}', '{privilege}')"));
            let mut relations: Vec<_> =
                self.rights.iter().map(|(relation, _)| format!("('{relation}')")).collect();
            relations.dedup();
            problems.push(format!(
                "SELECT 'the role ' || current_user || ' lacks the right ' || privilege || ' on ' || relation \
                     || '; grant it as the migrate command does' \
                 FROM (VALUES {}) AS needed (relation, privilege) \
                 WHERE NOT CASE privilege WHEN 'DELETE' THEN has_table_privilege(relation, privilege) \
                                          ELSE has_any_column_privilege(relation, privilege) END",
                list(rights.collect())
            ));
            problems.push(format!(
                "SELECT 'row security is on for ' || relation || ' and would hide rows from the role ' || current_user \
                     || '; disable it for the table, or give the role BYPASSRLS' \
                 FROM (VALUES {}) AS needed (relation) WHERE row_security_active(relation)",
                list(relations)
            ));
        }
        if problems.is_empty() {
            problems.push("SELECT '' WHERE false".to_owned());
        }
        let problems = problems.join(" UNION ALL ");
        format!("SELECT '{PROBLEM}' || problem, 0, ''::bytea FROM ({problems}) AS problems (problem)")
    }

    /// A look over a connection of `pool`, which is one of `database`, with a limit.
    pub async fn look(&self, database: &Database, pool: &PgPool) -> Result<(), SchemaError> {
        let look = async { self.check_of(database, &mut *pool.acquire().await?).await };
        tokio::time::timeout(TIMEOUT, look).await.unwrap_or_else(|_| {
            Err(SchemaError::Unmet(format!("the database does not respond within {TIMEOUT:?}")))
        })
    }

    /// Waits until the database has everything, and tells `waiting` what is missing. Ends with an error when a
    /// schema is not what the program needs, or when a pooler shares its sessions; waiting would not change that. `stop`
    /// ends the wait early, with `false`.
    pub async fn wait(
        &self,
        database: &Database,
        pool: &PgPool,
        stop: &CancellationToken,
        mut waiting: impl FnMut(String),
    ) -> Result<bool, SchemaError> {
        let mut pauses = crate::backoff(PAUSE.0, PAUSE.1);
        loop {
            let attempt = async {
                // The pool would try for as long as a program waits for a connection, and keep the reason to itself.
                database.refuse_shared().await?;
                self.look(database, pool).await
            };
            // The attempt too: while the database is away it lasts as long as the pool waits for a connection.
            match stop.run_until_cancelled(attempt).await {
                None => return Ok(false),
                Some(Ok(())) => return Ok(true),
                Some(Err(error)) if error.passes() => waiting(error.to_string()),
                Some(Err(fatal)) => return Err(fatal),
            }
            let pause = pauses.next().unwrap_or(PAUSE.1);
            if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return Ok(false);
            }
        }
    }
}
