use anyhow::Context;
use daemon::{
    command::{Verdict, many},
    progress::Progress,
};
use outbox::database::again;
use serde_json::json;
use sqlx::{AssertSqlSafe, PgConnection};

use super::{RebuildArgs, compare::unwatch, remove_consumer};
use crate::model;

/// Removes the model that was live before the last swap.
pub(super) async fn drop(args: &RebuildArgs, conn: &mut PgConnection) -> anyhow::Result<Verdict> {
    let Some(old) = model::stored(conn, "old").await? else {
        args.common.answer(&json!({"dropped": null}), || "no old model is kept".to_owned())?;
        return Ok(Verdict::Ok);
    };
    let progress = Progress::new("dropping the old tables", "table");
    // One table after the other, those that refer to others first. A projector that erases an aggregate in both models may
    // hold a lock.
    let tables: Vec<String> = sqlx::query_scalar(
        "SELECT relation::text FROM unnest(score.model_tables()) WITH ORDINALITY AS m (name, n),
                to_regclass(format('score_old.%I', name)) AS relation
         WHERE relation IS NOT NULL ORDER BY n DESC",
    )
    .fetch_all(&mut *conn)
    .await?;
    for (done, table) in (1_u64..).zip(&tables) {
        let sql = format!("DROP TABLE IF EXISTS {table} CASCADE");
        again(async || sqlx::raw_sql(AssertSqlSafe(&*sql)).execute(&mut *conn).await)
            .await
            .context("the old model's tables were not dropped")?;
        progress.at(done, tables.len() as u64);
    }
    again(async || sqlx::query("DROP SCHEMA IF EXISTS score_old CASCADE").execute(&mut *conn).await)
        .await
        .context("the old model's tables were not dropped")?;
    let rows = remove_consumer(conn, &old.consumer, &progress).await?;
    unwatch(conn).await;
    again(async || sqlx::query("DELETE FROM score.model WHERE role = 'old'").execute(&mut *conn).await)
        .await?;
    std::mem::drop(progress);
    args.common.answer(&json!({"dropped": old.consumer, "rows": rows}), || {
        let rows = many(i64::try_from(rows).unwrap_or(i64::MAX), "row");
        format!("the old model {} is gone, and {rows} of its consumer in the inbox", old.consumer)
    })?;
    Ok(Verdict::Ok)
}
