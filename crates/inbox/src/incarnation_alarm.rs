//! The alarm about incarnations: messages that were not taken, and aggregates that the newest one has not begun.

use chrono::{DateTime, Utc};

use crate::{
    alarms::{Alarms, COUNTED, NAMED, counted, more},
    rejection::NOT_KEPT,
};

impl Alarms<'_> {
    /// What is of another incarnation than the newest one of its source. `unrelated` and `superseded` are how many
    /// messages were rejected for these reasons.
    pub(crate) async fn incarnations(&self, unrelated: i64, superseded: i64) -> sqlx::Result<Option<String>> {
        let texts =
            [self.unrelated(unrelated).await?, self.superseded(superseded).await?, self.left_behind().await?];
        let texts: Vec<String> = texts.into_iter().flatten().collect();
        Ok((!texts.is_empty()).then(|| texts.join("; ")))
    }

    async fn unrelated(&self, count: i64) -> sqlx::Result<Option<String>> {
        if count == 0 {
            return Ok(None);
        }
        Ok(Some(format!(
            "{} not applied, of an unknown incarnation: {}",
            messages(count),
            self.details("unrelated").await?,
        )))
    }

    async fn superseded(&self, count: i64) -> sqlx::Result<Option<String>> {
        if count == 0 {
            return Ok(None);
        }
        let (first, last): (Option<DateTime<Utc>>, Option<DateTime<Utc>>) = sqlx::query_as(
            "SELECT min(first_at), max(last_at) FROM inbox.rejected WHERE consumer = $1 AND reason = 'superseded'",
        )
        .bind(self.consumer)
        .fetch_one(self.pool)
        .await?;
        let time = |time: Option<DateTime<Utc>>| time.unwrap_or_default().format("%Y-%m-%d %H:%M:%S UTC");
        Ok(Some(format!(
            "{} not applied, of an earlier incarnation, from {} to {}: {}. If more come, an old primary publishes: stop it. \
             Then delete them from inbox.rejected",
            messages(count),
            time(first),
            time(last),
            self.details("superseded").await?,
        )))
    }

    /// Why the last messages were rejected for this reason.
    async fn details(&self, reason: &str) -> sqlx::Result<String> {
        let details: Vec<String> = sqlx::query_scalar(
            "SELECT detail FROM (SELECT detail, last_at FROM inbox.rejected
                                 WHERE consumer = $1 AND reason = $2 AND detail <> $3
                                 ORDER BY last_at DESC LIMIT 100) AS last
             GROUP BY detail ORDER BY max(last_at) DESC LIMIT $4",
        )
        .bind(self.consumer)
        .bind(reason)
        .bind(NOT_KEPT)
        .bind(i64::try_from(NAMED).unwrap_or(i64::MAX))
        .fetch_all(self.pool)
        .await?;
        Ok(details.join("; "))
    }

    async fn left_behind(&self) -> sqlx::Result<Option<String>> {
        let (count, named): (i64, Vec<String>) = sqlx::query_as(
            "SELECT (SELECT count(*) FROM inbox.some_left_behind($1, $2)),
                    ARRAY(SELECT format('%s/%s of %s', aggregate_type, aggregate_id,
                                        inbox.spell(source_name, incarnation))
                          FROM inbox.some_left_behind($1, $3))",
        )
        .bind(self.consumer)
        .bind(i32::try_from(COUNTED + 1).unwrap_or(i32::MAX))
        .bind(i32::try_from(NAMED).unwrap_or(i32::MAX))
        .fetch_one(self.pool)
        .await?;
        #[expect(clippy::cast_precision_loss, reason = "at most ten thousand")]
        metrics::gauge!("inbox_left_behind", "consumer" => self.consumer.to_owned()).set(count as f64);
        if count == 0 {
            return Ok(None);
        }
        let named: Vec<String> = named.iter().map(|one| escape::line(one).to_string()).collect();
        Ok(Some(format!(
            "{} of an earlier incarnation have no event of the newest one: {}{}. Have the source publish a baseline of every \
             aggregate, and then the deletion of those that it does not have",
            if count == 1 { "1 aggregate".to_owned() } else { format!("{} aggregates", counted(count)) },
            named.join(", "),
            more(count),
        )))
    }
}

fn messages(count: i64) -> String {
    if count == 1 { "1 message was".to_owned() } else { format!("{} messages were", counted(count)) }
}
