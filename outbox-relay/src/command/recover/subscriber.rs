//! What was found at a subscriber, as steps.

use super::{database::Overview, step::Step};
use crate::command::{
    left_behind::{EarlierChain, LeftBehind},
    many,
};

/// Why nothing can be said of the consumer, if that is so.
pub(super) fn refused(found: &LeftBehind, consumer: &str, overview: &Overview) -> Option<Step> {
    let source = &overview.source;
    match found.newest {
        Some(newest) if newest == source.incarnation => None,
        Some(newest) if Some(newest) == source.parent => Some(Step::next(
            "subscribers",
            format!("{consumer} has received nothing of {source} yet"),
            "see whether it runs and is ready, and whether its queue is bound; then run this again",
        )),
        Some(newest) => Some(Step::next(
            "subscribers",
            format!(
                "{consumer} knows the incarnation {newest} of {}, which {source} does not follow, so it refuses it",
                source.name
            ),
            format!(
                "find out who published {newest}: another database under the same name (a copy), or this one, before \
                     it was restored once more. If this database is the right one, run: outbox-relay new-incarnation \
                     --above {newest} --yes, then publish the baselines again, and run this again"
            ),
        )),
        None => Some(Step::next(
            "subscribers",
            format!("{consumer} has received nothing of {} in this inbox", source.name),
            "see whether the name and INBOX_DATABASE_URL are the right ones",
        )),
    }
}

/// What is to be done.
pub(super) fn steps(found: &LeftBehind, consumer: &str, limit: usize) -> Vec<Step> {
    let count =
        |aggregates: &[EarlierChain]| many(i64::try_from(aggregates.len()).unwrap_or(i64::MAX), "aggregate");
    let named = |aggregates: &[EarlierChain]| aggregates.iter().take(limit).map(EarlierChain::text).collect();
    let mut steps = Vec::new();
    if !found.behind.is_empty() {
        steps.push(
            Step::next(
                "subscribers",
                format!("{consumer} is behind with {}", count(&found.behind)),
                "they were published anew: see what it holds and what is in its queue, and run this again",
            )
            .naming(named(&found.behind)),
        );
    }
    if !found.lost.is_empty() {
        let number = found.lost.len();
        steps.push(
                Step::next(
                    "subscribers",
                    format!(
                        "{consumer} has {} that this database does not know: they were made in the lost time, or \
                         deleted before it and made again",
                        count(&found.lost)
                    ),
                    format!(
                        "make again what is needed. To end the rest at every subscriber, which publishes TYPE.deleted \
                         for each: outbox-relay recover --consumer {} --lost {number}",
                        escape::shell_word(consumer)
                    ),
                )
                .naming(named(&found.lost)),
            );
    }
    if steps.is_empty() {
        steps.push(Step::done(
            "subscribers",
            format!("{consumer} has nothing that this database does not have; go through the others as well"),
        ));
    }
    steps
}
