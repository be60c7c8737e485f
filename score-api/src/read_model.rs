//! All of the SQL: the scores of some cpfs, the entries of a score, and the versions of some persons.

pub(crate) mod entries;
pub(crate) mod scores;

use std::{borrow::Cow, str::FromStr, sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use daemon::config::database::{Database, Failure, Needs, Schema};
use outbox::database::Session;
use rust_decimal::Decimal;
use uuid::Uuid;

/// The limit of a read, including the wait for a connection. The pool alone would wait longer.
pub(crate) const DEADLINE: Duration = Duration::from_secs(2);

/// The version of each person in the live read model: 0 before the first applied event, and null for an unknown
/// person. A restored source publishes under a new incarnation and continues its restored versions, so the newest
/// incarnation decides: `person~10` before `person~2` before `person`.
/// `OFFSET 0` has only the id looked up by an index, `aggregate_id`: a table without statistics seems so
/// small that the planner would take the primary key, and read all of the consumer's rows for each id.
const VERSIONS: &str = "SELECT asked.id, (
    SELECT a.version
    FROM (SELECT * FROM inbox.aggregate a WHERE a.aggregate_id = asked.id::text OFFSET 0) a
    WHERE a.aggregate_type = 'person' AND a.consumer = (SELECT consumer FROM score.model WHERE role = 'live')
    ORDER BY length(a.source) DESC, a.source DESC LIMIT 1)
FROM unnest($1::uuid[]) AS asked (id)";

/// The options of a connection to the read model.
pub(crate) fn options(database: Database) -> Database {
    database
        .by_index()
        // The role has no right to write either; this also holds under a role with more rights.
        .with("default_transaction_read_only", "on")
        // A page is read from an index in its order, and ends when it is full. While most persons have few
        // items, the planner would rather fetch all that a person has and sort them.
        .with("enable_bitmapscan", "off")
}

/// What `run` needs of its database. A standby is enough.
pub(crate) fn needs() -> Needs {
    const RIGHTS: &[(&str, &str)] = &[
        ("score.model", "SELECT"),
        ("score.person", "SELECT"),
        ("score.entry", "SELECT"),
        ("inbox.aggregate", "SELECT"),
    ];
    Needs { schemas: schemas().into(), writes: false, rights: RIGHTS }
}

/// The schemas `score` and `inbox`, which the score projector's migrations create.
pub(crate) fn schemas() -> [Schema; 2] {
    [("score", sqlx::migrate!("../migrations/score")), ("inbox", sqlx::migrate!("../migrations/inbox"))].map(
        |(name, mut migrator)| {
            migrator.dangerous_set_table_name(format!("{name}.migration"));
            migrator.create_schema(name);
            Schema { name, migrator, command: "score-projector migrate" }
        },
    )
}

/// A positive integer of at most 11 digits, as the path brings it. Personal data, so it neither
/// displays nor debugs.
#[derive(Clone, Copy)]
pub(crate) struct Cpf(i64);

impl Cpf {
    /// The number, only for the client's own response.
    pub(crate) fn get(self) -> i64 {
        self.0
    }
}

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

/// A person's score in the read model.
#[derive(Debug, sqlx::FromRow)]
pub(crate) struct Score {
    /// The person: a cpf may belong to another person later.
    #[sqlx(rename = "id")]
    pub(crate) person_id: Uuid,
    /// The person's version that the score contains.
    pub(crate) version: i64,
    /// The score: an integer that may exceed 64 bits, and 0 without items.
    pub(crate) total: Decimal,
    /// When the projector last wrote it.
    pub(crate) updated_at: DateTime<Utc>,
}

/// Why a read failed.
#[derive(Clone, Debug)]
pub(crate) enum ReadError {
    /// The database does not respond in time. Another try may succeed.
    Unavailable,
    /// A defect.
    Defect(Arc<sqlx::Error>),
}

impl ReadError {
    /// What kind of error it is, for a trace.
    fn class(&self) -> Cow<'static, str> {
        match self {
            Self::Unavailable => "unavailable",
            Self::Defect(_) => "failed",
        }
        .into()
    }
}

/// Reads the version of each of `persons` in the live read model. None before the first applied event.
pub(crate) async fn versions(
    session: &Session,
    persons: &[Uuid],
) -> Result<Vec<(Uuid, Option<i64>)>, ReadError> {
    let mut versions: Vec<(Uuid, Option<i64>)> = in_time(async {
        let mut conn = session.take().await?;
        let versions = sqlx::query_as(VERSIONS).bind(persons).fetch_all(&mut *conn).await?;
        session.keep(conn);
        Ok(versions)
    })
    .await?;
    for (_, version) in &mut versions {
        version.take_if(|version| *version == 0);
    }
    Ok(versions)
}

async fn in_time<T>(read: impl Future<Output = sqlx::Result<T>>) -> Result<T, ReadError> {
    match tokio::time::timeout(DEADLINE, read).await {
        Ok(Ok(read)) => Ok(read),
        Ok(Err(error)) if is_away(&error) => {
            // Readiness reports it; a warning for each request would be too many.
            tracing::debug!(reason = outbox::database::reason(&error), "a read failed");
            Err(ReadError::Unavailable)
        }
        Ok(Err(error)) => Err(ReadError::Defect(error.into())),
        Err(_) => Err(ReadError::Unavailable),
    }
}

/// Whether the same read may succeed later, perhaps after an operator acted: readiness names the reason.
fn is_away(error: &sqlx::Error) -> bool {
    Failure::of(error) != Failure::Defect
}

#[cfg(test)]
mod tests {
    use sqlx::PgConnection;

    use super::*;

    /// As the program connects, but to write.
    pub(crate) async fn connect(url: &str) -> PgConnection {
        let database = super::options(url.parse().unwrap());
        database.with("default_transaction_read_only", "off").connect().await.unwrap()
    }

    /// However many persons there are, asking for some probes the index once for each; also while the
    /// server knows nothing of the table yet.
    #[tokio::test]
    async fn versions_are_found_by_the_index_alone() {
        let url = devstack::testing::database("score_api_plan").await;
        let mut conn = connect(&url).await;
        for schema in schemas() {
            schema.migrator.run(&mut conn).await.unwrap();
        }
        let plan = async |conn: &mut PgConnection| -> String {
            let explain = sqlx::AssertSqlSafe(format!("EXPLAIN (COSTS OFF) {VERSIONS}"));
            let plan: Vec<String> =
                sqlx::query_scalar(explain).bind([Uuid::nil(); 3]).fetch_all(conn).await.unwrap();
            // As PostgreSQL 17 and later spell it.
            plan.join("\n").replace(" (returns $0)", "").replace("$0", "(InitPlan 1).col1")
        };
        insta::assert_snapshot!(plan(&mut conn).await, @r"
    Function Scan on unnest asked
      SubPlan 2
        ->  Limit
              InitPlan 1
                ->  Index Scan using model_pkey on model
                      Index Cond: (role = 'live'::text)
              ->  Sort
                    Sort Key: (length(a.source)) DESC, a.source DESC
                    ->  Subquery Scan on a
                          Filter: ((a.aggregate_type = 'person'::text) AND (a.consumer = (InitPlan 1).col1))
                          ->  Index Scan using aggregate_id on aggregate a_1
                                Index Cond: (aggregate_id = (asked.id)::text)
    ");
        let fill = "INSERT INTO inbox.aggregate
                        (consumer, source, aggregate_type, aggregate_id, version, last_event_id)
                    SELECT 'score', 'person', 'person', gen_random_uuid(), 1, gen_random_uuid()
                    FROM generate_series(1, 50000)";
        sqlx::query(fill).execute(&mut conn).await.unwrap();
        sqlx::query("ANALYZE inbox.aggregate, score.model").execute(&mut conn).await.unwrap();
        insta::assert_snapshot!(plan(&mut conn).await, @r"
    Function Scan on unnest asked
      SubPlan 2
        ->  Limit
              InitPlan 1
                ->  Index Scan using model_pkey on model
                      Index Cond: (role = 'live'::text)
              ->  Sort
                    Sort Key: (length(a.source)) DESC, a.source DESC
                    ->  Subquery Scan on a
                          Filter: ((a.aggregate_type = 'person'::text) AND (a.consumer = (InitPlan 1).col1))
                          ->  Index Scan using aggregate_id on aggregate a_1
                                Index Cond: (aggregate_id = (asked.id)::text)
    ");
    }
}
