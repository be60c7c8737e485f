//! Reads the scores of concurrent requests together: requests that arrive during a query share the next one. So a busier
//! server spends less on each request.

use daemon::{shutdown::Shutdown, traces};
use outbox::database::Session;
use sqlx::{FromRow, PgConnection, PgPool, Row};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::{Cpf, DEADLINE, ReadError, Score, in_time};

/// How many requests one query serves at most.
const BATCH: usize = 64;

/// The events of two persons with the same cpf have no common order, so the older person may still be present beside the
/// newer one. The newest is returned. It costs one index entry and one row for each cpf.
pub(super) const NEWEST_PERSONS: &str = "SELECT asked.number, person.*
FROM unnest($1::bigint[]) WITH ORDINALITY AS asked (cpf, number)
CROSS JOIN LATERAL (SELECT id, version, total, updated_at FROM score.person
                    WHERE cpf = asked.cpf ORDER BY created_at DESC, id DESC LIMIT 1) person";

/// Reads scores.
#[derive(Clone)]
pub(crate) struct Scores(mpsc::Sender<Ask>);

/// A request that waits for its score.
struct Ask {
    cpf: Cpf,
    reply: oneshot::Sender<Result<Option<Score>, ReadError>>,
}

impl Scores {
    /// Starts the task that reads, which ends with the last `Scores`. The process ends if the task ends before.
    pub(crate) fn new(pool: PgPool, shutdown: &Shutdown) -> Self {
        let (asks, asked) = mpsc::channel(BATCH);
        shutdown.spawn("scores", async move {
            read(pool, asked).await;
            Ok(())
        });
        Self(asks)
    }

    /// Reads the score of the newest person with this cpf, if one is known. The snapshot is taken after the call.
    pub(crate) async fn newest_person(&self, cpf: Cpf) -> Result<Option<Score>, ReadError> {
        let (reply, received) = oneshot::channel();
        let read = async {
            self.0.send(Ask { cpf, reply }).await.ok()?;
            received.await.ok()
        };
        // No reply comes when the task has ended, and the process ends.
        let read =
            async { timeout(DEADLINE, read).await.ok().flatten().unwrap_or(Err(ReadError::Unavailable)) };
        traces::statement("SELECT", "person", read, ReadError::class).await
    }
}

/// Runs one query after the other, each for all requests that have arrived.
async fn read(pool: PgPool, mut asked: mpsc::Receiver<Ask>) {
    let session = Session::of(pool);
    let mut asks = Vec::new();
    while asked.recv_many(&mut asks, BATCH).await > 0 {
        // A request that was cancelled meanwhile needs no reply.
        asks.retain(|ask| !ask.reply.is_closed());
        let cpfs: Vec<i64> = asks.iter().map(|ask| ask.cpf.get()).collect();
        let found = in_time(async {
            let mut conn = session.take().await?;
            let found = newest_persons(&mut conn, cpfs).await?;
            session.keep(conn);
            Ok(found)
        })
        .await;
        match found {
            Ok(found) => {
                for (ask, score) in asks.drain(..).zip(found) {
                    let _ = ask.reply.send(Ok(score));
                }
            }
            Err(error) => {
                for ask in asks.drain(..) {
                    let _ = ask.reply.send(Err(error.clone()));
                }
            }
        }
    }
}

/// Reads the scores of `cpfs`, in their order.
async fn newest_persons(conn: &mut PgConnection, cpfs: Vec<i64>) -> sqlx::Result<Vec<Option<Score>>> {
    let mut found: Vec<Option<Score>> = cpfs.iter().map(|_| None).collect();
    for row in sqlx::query(NEWEST_PERSONS).bind(cpfs).fetch_all(conn).await? {
        let number = usize::try_from(row.try_get::<i64, _>("number")?).unwrap_or_default();
        if let Some(place) = number.checked_sub(1).and_then(|index| found.get_mut(index)) {
            *place = Some(Score::from_row(&row)?);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use daemon::config::database::Database;

    use super::*;
    use crate::read_model::{schemas, tests::connect};

    /// Without its task no score would ever be read again, while the database, and so readiness, is fine.
    #[tokio::test]
    async fn the_process_ends_with_the_task_that_reads() {
        let (shutdown, nowhere) = (Shutdown::new(), "postgres://nowhere.invalid");
        drop(Scores::new(nowhere.parse::<Database>().unwrap().pool(1), &shutdown));
        let end = timeout(Duration::from_secs(10), shutdown.finish(Duration::from_secs(1)));
        let error = end.await.expect("the process lives on").unwrap_err();
        assert_eq!(format!("{error:#}"), "the task scores failed: it ended before the shutdown");
    }

    /// However many persons there are, an answer reads one entry of the index and one row.
    #[tokio::test]
    async fn the_newest_person_is_found_by_the_index_alone() {
        let url = devstack::testing::database("score_api_plan").await;
        let mut conn = connect(&url).await;
        for schema in schemas() {
            schema.migrator.run(&mut conn).await.unwrap();
        }
        let fill = "INSERT INTO score.person (id, cpf, created_at, version)
                    SELECT gen_random_uuid(), i % 20000 + 1, now() + i * interval '1 s', 1
                    FROM generate_series(1, 50000) i";
        sqlx::query(fill).execute(&mut conn).await.unwrap();
        sqlx::query("ANALYZE score.person").execute(&mut conn).await.unwrap();
        let explain = sqlx::AssertSqlSafe(format!("EXPLAIN (COSTS OFF) {NEWEST_PERSONS}"));
        let plan: Vec<String> =
            sqlx::query_scalar(explain).bind([11111_i64, 1, 11111]).fetch_all(&mut conn).await.unwrap();
        insta::assert_snapshot!(plan.join("\n"), @r"
        Nested Loop
          ->  Function Scan on unnest asked
          ->  Limit
                ->  Index Scan using person_cpf on person
                      Index Cond: (cpf = asked.cpf)
        ");
    }
}
