use anyhow::Context;
use daemon::command::{Verdict, many};
use outbox::database::again;
use serde_json::json;
use sqlx::PgConnection;

use super::{RebuildArgs, remove_consumer};
use crate::model;

/// Removes the model that was live before the last swap.
pub(super) async fn drop(args: &RebuildArgs, conn: &mut PgConnection) -> anyhow::Result<Verdict> {
    let Some(old) = model::stored(conn, "old").await? else {
        args.common.answer(&json!({"dropped": null}), || "no old model is kept".to_owned())?;
        return Ok(Verdict::Ok);
    };
    // A projector that erases an aggregate in both models may hold a lock.
    again(async || sqlx::query("DROP SCHEMA IF EXISTS score_old CASCADE").execute(&mut *conn).await)
        .await
        .context("the old model's tables were not dropped")?;
    let rows = remove_consumer(conn, &old.consumer).await?;
    again(async || sqlx::query("DELETE FROM score.model WHERE role = 'old'").execute(&mut *conn).await)
        .await?;
    args.common.answer(&json!({"dropped": old.consumer, "rows": rows}), || {
        let rows = many(i64::try_from(rows).unwrap_or(i64::MAX), "row");
        format!("the old model {} is gone, and {rows} of its consumer in the inbox", old.consumer)
    })?;
    Ok(Verdict::Ok)
}
