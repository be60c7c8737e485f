//! Fills a stack's databases with a history, by SQL.

use anyhow::Context;
use devstack::stack::Stack;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

/// How long ago the history begins, in milliseconds: two years.
const SPAN: i64 = 2 * 365 * 24 * 3_600_000;
/// How long ago it ends.
const SINCE: i64 = 3_600_000;
/// Ordinary persons are spread evenly, and both kinds of large ones have whole numbers of events.
const STEP: i64 = 20_000;

const FUNCTIONS: &str = include_str!("functions.sql");

/// A history: how long it is, and when it began.
#[derive(Clone, Copy, Debug)]
pub(crate) struct History {
    /// Events of ordinary persons; with those of the large ones it is 1.06 times as many.
    pub(crate) scale: i64,
    from_ms: i64,
}

impl History {
    /// Of at least this scale, until an hour ago.
    pub(crate) fn of(scale: i64) -> Self {
        let scale = (scale.max(1) + STEP - 1) / STEP * STEP;
        Self { scale, from_ms: chrono::Utc::now().timestamp_millis() - SPAN - SINCE }
    }

    /// Fills the stack's databases, whose programs do not run.
    pub(crate) async fn fill(self, stack: &Stack) -> anyhow::Result<()> {
        let addresses = stack.addresses();
        let (person, score) = (&addresses.person_database_url, &addresses.score_database_url);
        tokio::try_join!(
            self.run(person, include_str!("person_events.sql")),
            self.run(person, include_str!("person_rows.sql")),
            self.run(score, include_str!("score_events.sql")),
            self.run(score, include_str!("score_rows.sql")),
        )?;
        // What the server has done by itself over the years.
        tokio::try_join!(vacuum(person), vacuum(score))?;
        Ok(())
    }

    /// Adds a baseline of everybody. No program runs, and everything that was published is applied.
    pub(crate) async fn add_baselines(self, stack: &Stack) -> anyhow::Result<()> {
        let addresses = stack.addresses();
        let (person, score) = (&addresses.person_database_url, &addresses.score_database_url);
        tokio::try_join!(
            self.run(person, include_str!("baselines.sql")),
            self.run(score, include_str!("baselines_applied.sql")),
        )?;
        tokio::try_join!(vacuum(person), vacuum(score))?;
        Ok(())
    }

    async fn run(self, database: &str, script: &str) -> anyhow::Result<()> {
        let mut conn = PgConnection::connect(database).await?;
        let settings = [("persons", self.scale / 10), ("from_ms", self.from_ms), ("span_ms", SPAN)];
        for (name, value) in settings {
            conn.execute(AssertSqlSafe(format!("SET history.{name} = '{value}'"))).await?;
        }
        for script in [FUNCTIONS, script] {
            let first = script.lines().next().unwrap_or_default();
            sqlx::raw_sql(AssertSqlSafe(script))
                .execute(&mut conn)
                .await
                .with_context(|| first.to_owned())?;
        }
        Ok(conn.close().await?)
    }
}

async fn vacuum(database: &str) -> anyhow::Result<()> {
    let mut conn = PgConnection::connect(database).await?;
    conn.execute("VACUUM (FREEZE, ANALYZE)").await?;
    conn.execute("CHECKPOINT").await?;
    Ok(conn.close().await?)
}
