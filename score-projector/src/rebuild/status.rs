use std::{fmt::Write, time::Duration};

use daemon::{
    command::{Verdict, many, span},
    progress::Progress,
};
use serde_json::json;
use sqlx::PgConnection;
use tokio::time::Instant;

use super::{
    RebuildArgs,
    compare::{Comparison, remember},
    count::{Counts, Look},
    difference::{Difference, difference},
    progress::{HeldCount, held},
};
use crate::model::{self, StoredModel};

/// The time between the two looks that give the rate.
const BETWEEN: Duration = Duration::from_secs(1);
/// So few aggregates behind may be events that are under way. They are looked at again more often.
const FEW: usize = 100;
/// How often persons are looked at again that one model has at a later version than the other one.
const LOOKS: u32 = 10;
/// With more of them, the shadow is far behind, and no look would find them at the same version.
const APART: i64 = 10_000;

/// Prints the state of the rebuild, and its progress.
pub(super) async fn status(
    args: &RebuildArgs,
    conn: &mut PgConnection,
    compared: bool,
) -> anyhow::Result<Verdict> {
    let live = model::live(conn).await?;
    if let Some(shadow) = model::stored(conn, "shadow").await? {
        return building(args, conn, &live.consumer, &shadow, compared).await;
    }
    let old = model::stored(conn, "old").await?.map(|old| old.consumer);
    let ending = model::stored(conn, "ending").await?.map(|ending| ending.consumer);
    let rest = match (&ending, &live.queue) {
        (Some(ending), _) => {
            Some(format!("{ending} was aborted and is not removed yet; run: score-projector rebuild abort"))
        }
        (None, Some(queue)) => {
            Some(format!("the shadow's queue {queue} is not deleted yet; run: score-projector rebuild swap"))
        }
        (None, None) => None,
    };
    let answer = json!({"live": live.consumer, "shadow": null, "old": old, "unfinished": rest});
    args.common.answer(&answer, || {
        let mut text = format!("no rebuild is under way, and {} is live\n", live.consumer);
        if let Some(old) = &old {
            let _ =
                writeln!(text, "{old} is kept in the schema score_old until: score-projector rebuild drop");
        }
        text + rest.as_deref().unwrap_or_default()
    })?;
    Ok(if rest.is_some() { Verdict::Attention } else { Verdict::Ok })
}

async fn building(
    args: &RebuildArgs,
    conn: &mut PgConnection,
    live: &str,
    shadow: &StoredModel,
    compared: bool,
) -> anyhow::Result<Verdict> {
    let name = &shadow.consumer;
    let comparison = Comparison { live, shadow: name };
    let progress = Progress::new("counting the aggregates", "aggregate");
    let mut look = Look::at(conn, &comparison, false).await?;
    let mut rate = follow(conn, &mut look, name).await?;
    if !look.is_whole() && look.sample() < FEW {
        // Nearly nothing is behind of what was taken: too little for an estimate. What the shadow does not need is left
        // out, and what remains may be few enough to look at each.
        look = Look::at(conn, &comparison, true).await?;
        rate = follow(conn, &mut look, name).await?;
    }
    let now = look.counts();
    let held = held(conn, name).await?;
    let difference = if compared { Some(compare(conn, &comparison, &progress).await?) } else { None };
    drop(progress);
    let left = left(&now, rate);
    let answer = json!({
        "live": live, "shadow": name, "queue": shadow.queue, "since": shadow.since, "progress": now,
        "rate": rate, "seconds_left": left, "held": held, "difference": difference,
        "may_swap": now.behind == 0,
    });
    let apart = difference.as_ref().map_or(0, |difference| difference.apart);
    args.common.answer(&answer, || {
        let queue = shadow.queue.as_deref().unwrap_or_default();
        let since = shadow.since.format("%Y-%m-%d %H:%M:%S UTC");
        let mut text =
            format!("{name} is being built from the queue {queue}, since {since}; {live} is live\n");
        text += &counts(&now, &held);
        match (rate, left) {
            (Some(rate), Some(left)) => {
                let _ = writeln!(text, "  {rate:.0} aggregates/s, {} left", span(left));
            }
            (Some(_), None) => {
                text += "it does not catch up: is it being filled, and does a score-projector run?\n";
            }
            (None, _) => {}
        }
        if let Some(difference) = &difference {
            text += &difference.text();
            if apart > 0 {
                let _ = writeln!(
                    text,
                    "not compared, since the models have them at different versions: {}",
                    many(apart, "person")
                );
            }
        }
        text += if now.behind == 0 {
            "it may take the live model's place: score-projector rebuild swap"
        } else {
            "it may not take the live model's place yet"
        };
        text
    })?;
    Ok(if now.behind == 0 { Verdict::Ok } else { Verdict::Attention })
}

/// Compares the two models. Persons that one of them had at a later version are looked at again.
async fn compare(
    conn: &mut PgConnection,
    comparison: &Comparison<'_>,
    progress: &Progress,
) -> anyhow::Result<Difference> {
    remember(conn).await?;
    comparison.models(conn, progress).await?;
    progress.step("looking again at what differs", "look");
    let mut looks = 1;
    loop {
        let difference = difference(conn, comparison).await?;
        if difference.apart == 0 || difference.apart > APART || looks == LOOKS {
            return Ok(difference);
        }
        progress.at(looks.into(), LOOKS.into());
        looks += 1;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Looks again at the aggregates behind. Returns how many the shadow reaches in a second; none where it has reached all.
/// So the rate is the present one, without the time before the filling began. Events that were under way at the first look
/// are applied meanwhile: they are waited for, as long as the two looks are apart.
async fn follow(conn: &mut PgConnection, look: &mut Look, shadow: &str) -> sqlx::Result<Option<f64>> {
    let (sample, since) = (look.sample(), Instant::now());
    let pause = if sample <= FEW { BETWEEN / 10 } else { BETWEEN };
    while look.sample() > 0 && since.elapsed() < BETWEEN {
        tokio::time::sleep(pause).await;
        look.again(conn, shadow).await?;
    }
    if look.sample() == 0 {
        return Ok(None);
    }
    #[expect(clippy::cast_precision_loss, reason = "a rate is no exact number")]
    let caught_up = look.of_all(sample - look.sample()) as f64;
    Ok(Some(caught_up / since.elapsed().as_secs_f64()))
}

fn counts(now: &Counts, held: &[HeldCount]) -> String {
    let about = if now.estimated { "about " } else { "" };
    let mut text = format!(
        "  of {}: {about}{} level, {} ended or of an earlier incarnation, {} behind\n",
        many(now.aggregates, "aggregate"),
        now.level,
        now.excused,
        now.behind
    );
    for example in &now.examples {
        let _ = writeln!(text, "    behind: {example}");
    }
    for HeldCount { reason, events } in held {
        let _ = writeln!(text, "  {} held, reason {reason}", many(*events, "event"));
    }
    text
}

/// The remaining seconds at this rate.
fn left(now: &Counts, rate: Option<f64>) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "an estimate is no exact number")]
    rate.filter(|rate| *rate > 0.0).map(|rate| now.behind as f64 / rate)
}
