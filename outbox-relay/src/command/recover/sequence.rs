//! The sequence: whether it stands behind what is in use, and what was written meanwhile.

use std::fmt::Write;

use sqlx::PgConnection;

use super::{RecoverArgs, Step, database, database::Overview};
use crate::command::{many, were};

/// Says where it stands, and sets it right if that was asked for.
pub(super) async fn step(
    conn: &mut PgConnection,
    args: &RecoverArgs,
    overview: &Overview,
) -> anyhow::Result<Step> {
    let name = "sequence";
    let Overview { last_position, used_position, .. } = overview;
    if last_position >= used_position {
        let finding = format!("it stands at {last_position}, and no higher position is in use");
        return Ok(Step::done(name, finding));
    }
    let since = args.from.unwrap_or(1);
    if args.sequence && args.yes {
        let done = database::mend_sequence(conn, since).await?;
        tracing::warn!(?done, "the sequence outbox.position was behind, and was set by hand");
        let moved = match done.moved {
            0 => "no event was written meanwhile".to_owned(),
            moved => format!(
                "{} written meanwhile: moved to the positions from {} on, which the relay publishes next",
                many(moved, "event"),
                done.stands_at - moved + 1
            ),
        };
        let finding = format!("it stood at {}, and stands at {} now; {moved}", done.stood_at, done.stands_at);
        return Ok(Step::done(name, finding));
    }
    let found = database::reissued(conn, since).await?;
    let mut finding = format!(
        "it stands at {last_position}, behind {used_position}, which is stored or published already, so it hands out \
         positions a second time"
    );
    let _ = match found.first {
        None => write!(finding, ". No event was written there meanwhile"),
        Some(first) => write!(
            finding,
            ". At most {} written there meanwhile, the first at {first}, and no relay publishes what lies there",
            were(found.latest)
        ),
    };
    if found.others > 0 {
        let _ = write!(
            finding,
            "; {} more may have been, but later versions of the aggregates are stored above, so they count as published",
            found.others
        );
    }
    let from = args.from.map_or_else(String::new, |from| format!(" --from {from}"));
    let mut next = format!(
        "run: outbox-relay recover --sequence{from} --yes. It sets the sequence to {used_position}, the highest position \
         in use"
    );
    if found.latest > 0 {
        next.push_str(
            ", and moves these events above it, so that the relay publishes them after all that were written before \
             them. Writers wait meanwhile. If they are too many, because some of them were published before: --from \
             POSITION leaves those below it where they are",
        );
    }
    Ok(Step::next(name, finding, next))
}
