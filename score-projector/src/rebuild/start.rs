use anyhow::{Context, bail};
use daemon::{command::Verdict, config::broker::BrokerArgs};
use serde_json::json;
use sqlx::{Connection, PgConnection};

use super::{RebuildArgs, carry, config};
use crate::model;

/// Creates the shadow, and the queue from which running programs then consume for it.
pub(super) async fn start(
    args: &RebuildArgs,
    conn: &mut PgConnection,
    broker: &BrokerArgs,
    live_queue: &str,
) -> anyhow::Result<Verdict> {
    let mut tx = conn.begin().await?;
    // One of these commands at a time; those who read or lock rows go on.
    sqlx::query("LOCK TABLE score.model IN SHARE ROW EXCLUSIVE MODE").execute(&mut *tx).await?;
    if let Some(shadow) = model::stored(&mut tx, "shadow").await? {
        bail!("a rebuild is under way already, as {}: score-projector rebuild status", shadow.consumer);
    }
    if let Some(ending) = model::stored(&mut tx, "ending").await? {
        bail!("{} was aborted and is not removed yet; run: score-projector rebuild abort", ending.consumer);
    }
    if let Some(old) = model::stored(&mut tx, "old").await? {
        bail!("the old model {} is still there; run: score-projector rebuild drop", old.consumer);
    }
    let number: i64 = sqlx::query_scalar("SELECT nextval('score.model_number')").fetch_one(&mut *tx).await?;
    let (consumer, queue) = (format!("score-{number}"), format!("{live_queue}.rebuild-{number}"));
    // Settings that are wrong are found before anything is stored.
    let config = config(broker, &queue)?;
    sqlx::query("SELECT score.create_shadow()")
        .execute(&mut *tx)
        .await
        .context("the shadow was not made; it takes the owner of the schema score")?;
    // Copied tables keep samples of what is personal unless they are told not to.
    sqlx::query("SELECT score.keep_no_samples()").execute(&mut *tx).await?;
    sqlx::query("INSERT INTO score.model (role, consumer, queue) VALUES ('shadow', $1, $2)")
        .bind(&consumer)
        .bind(&queue)
        .execute(&mut *tx)
        .await?;
    // So that the shadow does not begin with an event of an earlier incarnation.
    let live = model::live(&mut tx).await?;
    carry::sources(&mut tx, &live.consumer, &consumer).await?;
    tx.commit().await?;
    // Only now, so that an abort knows of it; and from now on it misses nothing, so it may be filled.
    if let Err(reason) = inbox::declare(&config).await {
        bail!(
            "{consumer} is being built, but its queue {queue} is not there yet: {reason}\n\
             A running score-projector will declare it as soon as the broker responds. Fill it only then, \
             as with outbox-relay replay --all --to-queue {queue}"
        );
    }
    let fill =
        [format!("outbox-relay replay --all --to-queue {queue}"), "person-api republish --all".to_owned()];
    args.common.answer(&json!({"consumer": consumer, "queue": queue, "fill": fill}), || {
        format!(
            "{consumer} is being built in the schema score_shadow. Every running score-projector consumes\n\
             live events for it from the queue {queue}.\n\
             Fill it at the source, once:\n  {}\n\
             or, where history was pruned, with a baseline of everybody:\n  {}\n\
             Then: score-projector rebuild status",
            fill[0], fill[1]
        )
    })?;
    Ok(Verdict::Ok)
}
