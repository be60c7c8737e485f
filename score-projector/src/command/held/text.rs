//! What `held` prints for people.

use std::fmt::Write;

use escape::line as escaped;
use inbox::{
    RedriveSummary, RedrivenAggregate,
    held::{Group, Groups, HeldDetail, HeldEvent},
};

use crate::command::{WhichModel, many, time};

pub(super) fn groups_text(consumer: &str, held: &Groups, which: WhichModel) -> String {
    if held.events == 0 {
        return format!("{consumer}: nothing is held");
    }
    let mut text = format!("{consumer}: {} held\n", many(held.events, "event"));
    for group in &held.groups {
        let Group { reason, events, aggregates, first_at, oldest, version, .. } = group;
        let of =
            format!("{events} of {}, {reason} since {}", many(*aggregates, "aggregate"), time(*first_at));
        let _ = match &group.error {
            Some(error) => {
                writeln!(text, "  {of}, tried {}: {}", many(group.attempts, "time"), escaped(error))
            }
            None if reason == "gap" => writeln!(text, "  {of}: an earlier version has not arrived"),
            None => writeln!(text, "  {of}, tried {}", many(group.attempts, "time")),
        };
        let todo = if reason == "gap" {
            format!(
                "outbox-relay replay --aggregate {} --to-queue QUEUE, at the source {}",
                oldest.quoted(),
                escaped(&oldest.source)
            )
        } else {
            let shadow = if which.shadow { " --shadow" } else { "" };
            format!("score-projector held redrive --aggregate {}{shadow}", oldest.quoted())
        };
        let _ = writeln!(text, "    {oldest} waits for version {version}: {todo}");
    }
    if held.more > 0 {
        let _ = writeln!(text, "  and {} more; --limit shows them", many(held.more, "cause"));
    }
    text
}

/// Why an event waits, since when, and what came of trying it.
pub(super) fn waiting_text(event: &HeldEvent) -> String {
    let since = format!("{} since {}", event.reason, time(event.first_at));
    match (&event.error, event.attempts) {
        (None, 0) => since,
        (None, attempts) => format!("{since}, tried {}", many(attempts, "time")),
        (Some(error), attempts) => {
            let (tried, last, error) = (many(attempts, "time"), time(event.last_at), escaped(error));
            format!("{since}, tried {tried}, last at {last}: {error}")
        }
    }
}

pub(super) fn event_text(shown: &HeldDetail) -> String {
    let HeldDetail { event, applied, behind, body, .. } = shown;
    let mut text = format!(
        "event {} of type {}\n  of {}, version {}, published by {}; applied is version {applied}\n  {}\n  \
         {} behind it\n",
        event.event_id,
        escaped(&event.type_),
        event.aggregate,
        event.version,
        escaped(&event.aggregate.source),
        waiting_text(event),
        many(*behind, "event"),
    );
    let _ = match body {
        Some(body) => writeln!(text, "{}", body.replace('\n', "\n  ")),
        None => writeln!(text, "  its body has {}; --body shows it", many(event.bytes, "byte")),
    };
    text
}

pub(super) fn summary_text(all: &RedriveSummary, dry_run: bool) -> String {
    if all.aggregates == 0 {
        let text = if all.interrupted {
            "interrupted before the first event was applied"
        } else {
            "no held event matches"
        };
        return text.to_owned();
    }
    let (applied, still_held) =
        if dry_run { ("would be applied", "would still be held") } else { ("applied", "are still held") };
    let aggregates = i64::try_from(all.aggregates).unwrap_or(i64::MAX);
    let events = i64::try_from(all.applied).unwrap_or(i64::MAX);
    let mut text = format!("{}: {} {applied}", many(aggregates, "aggregate"), many(events, "event"));
    let _ = match all.held {
        0 => writeln!(text, ", none {still_held}"),
        held => writeln!(text, ", {held} {still_held}"),
    };
    if all.interrupted {
        text += "interrupted; the same command goes on with the rest\n";
    }
    for (error, count) in &all.errors {
        let aggregates = many(i64::try_from(*count).unwrap_or(i64::MAX), "aggregate");
        let _ = writeln!(text, "  {aggregates} stopped again: {}", escaped(error));
    }
    for one in &all.each {
        let _ = writeln!(text, "  {}", aggregate_text(one));
    }
    if u64::try_from(all.each.len()).is_ok_and(|listed| listed < all.aggregates) {
        let _ = writeln!(text, "  and others");
    }
    text
}

pub(super) fn aggregate_text(one: &RedrivenAggregate) -> String {
    let RedrivenAggregate { aggregate, from, to, held, .. } = one;
    let moved = if from == to {
        format!("{aggregate} stays at version {to}")
    } else {
        format!("{aggregate} from version {from} to {to}")
    };
    match (&one.refused, held) {
        (Some(refused), _) => format!("{moved}, stopped by event {}; {held} held", refused.event_id),
        (None, 0) => moved,
        (None, held) => format!("{moved}, and waits for version {}; {held} held", to + 1),
    }
}
