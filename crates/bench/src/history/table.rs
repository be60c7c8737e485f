//! The result of a run, and what it is held against.

use std::fmt::Write;

use serde::Serialize;

use super::{
    alone::Statement,
    operation::{Growth, Reach},
    run::{End, Outcome},
};
use crate::statistics::{float, number};

/// More than this and twice as many buffers as with the short history is growth.
const SLACK: f64 = 200.0;
/// What passes over the history once may touch so many times more buffers than the history is longer.
const OVER: f64 = 1.5;
/// As many blocks of a table as one page of its visibility map covers: 256 MB.
const MAPPED: f64 = 32_672.0;
/// How many of the statements that run by themselves the page shows.
const SHOWN: usize = 12;

/// One length of history.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Measured {
    /// Events of ordinary persons.
    pub(crate) scale: i64,
    /// How long it took to fill, in seconds.
    pub(crate) filled_in: f64,
    /// Both databases, in bytes.
    pub(crate) bytes: i64,
    /// Blocks of the person service's events.
    pub(crate) blocks: i64,
    pub(crate) partitions: i64,
    pub(crate) outcomes: Vec<Outcome>,
    /// Events a second that the relay publishes.
    pub(crate) relay_rate: Option<f64>,
    /// What the programs do by themselves: with nothing set aside, and with much.
    pub(crate) alone: [Vec<Statement>; 2],
    /// The peak of each program, in megabytes.
    pub(crate) memory: Vec<(String, f64)>,
}

/// The report of a run.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) quick: bool,
    pub(crate) machine: Vec<(&'static str, String)>,
    pub(crate) short: Measured,
    pub(crate) long: Measured,
}

impl Report {
    /// What does not hold, each with its reason. Times count where the run is long enough for them.
    pub(crate) fn broken(&self) -> Vec<String> {
        let mut broken = Vec::new();
        for (n, outcome) in self.long.outcomes.iter().enumerate() {
            let reasons = [self.guard((n, outcome)), if self.quick { None } else { self.miss(outcome) }];
            broken.extend(
                reasons.into_iter().flatten().map(|why| format!("{}: {why}", outcome.operation.line)),
            );
        }
        let short = self.short.alone.concat();
        for long in &self.long.alone {
            for statement in long {
                let why = statement.broken(&short);
                broken.extend(
                    why.map(|why| format!("by itself, {}: {why}: {}", statement.role, statement.short())),
                );
            }
        }
        broken
    }

    /// Both runs do the same in the same order.
    fn before(&self, n: usize) -> Option<&Outcome> {
        let before = self.short.outcomes.get(n)?;
        (Some(before.operation.line) == self.long.outcomes.get(n).map(|now| now.operation.line))
            .then_some(before)
    }

    /// How the buffers of an operation break the rule of its growth.
    fn guard(&self, (n, outcome): (usize, &Outcome)) -> Option<String> {
        match &outcome.end {
            End::Failed(why) => return Some(format!("failed: {why}")),
            // What its last statement has cost is not known.
            End::Limit if self.quick && !outcome.operation.sampled => {
                return Some("not done within the limit".to_owned());
            }
            End::Limit if outcome.done.is_none() => return None,
            End::Limit | End::Done(_) => {}
        }
        let before = self.before(n)?;
        let [now, before] = [outcome, before]
            .map(|outcome| float(outcome.cost.buffers) / float(outcome.done.unwrap_or(1).max(1)));
        let most = match outcome.operation.growth {
            Growth::Steady => 2.0 * before + SLACK,
            // Of each unit.
            Growth::Linear if outcome.done.is_some() => 2.0 * before + SLACK,
            Growth::AtMost(most) => most,
            Growth::ForEachRow(most) => most * float(outcome.cost.rows) + SLACK,
            Growth::Linear => {
                let times = float(self.long.scale) / float(self.short.scale);
                OVER * before * times + SLACK + self.long.looks_at_maps()
            }
            Growth::Part(part) => part * float(self.long.blocks) + SLACK,
        };
        (now > most).then(|| format!("{} buffers, of {} at most", number(now), number(most)))
    }

    /// How it misses what is to be reached.
    fn miss(&self, outcome: &Outcome) -> Option<String> {
        let limited = outcome.end == End::Limit && !outcome.operation.sampled;
        let missed = match outcome.operation.reach? {
            Reach::Time(most) => limited || outcome.seconds > most,
            Reach::TimePerPartition(most) => limited || outcome.seconds > most * float(self.long.partitions),
            Reach::Rate(least) => outcome.rate.is_none_or(|rate| rate < least),
            Reach::OfRelay(part) => {
                let (rate, relay) = (outcome.rate, self.long.relay_rate);
                rate.zip(relay).is_none_or(|(rate, relay)| rate < part * relay)
            }
            Reach::Still(most) => limited || outcome.score_late > most,
        };
        missed.then(|| {
            format!(
                "{} is missed",
                outcome.operation.reach.map(|reach| reach.to_string()).unwrap_or_default()
            )
        })
    }

    /// In Markdown.
    pub(crate) fn page(&self) -> String {
        let mut text = format!(
            "{} events of persons, {} MB; next to {} events. Filled in {} s.\n\n\
             | command or request | time | to reach | buffers | with the short history | strongest lock, held | longest write | a score late | silent | memory | |\n\
             |---|---|---|---|---|---|---|---|---|---|---|\n",
            number(float(self.long.scale) * 1.06),
            number(float(self.long.bytes) / 1e6),
            number(float(self.short.scale) * 1.06),
            number(self.long.filled_in),
        );
        for (n, outcome) in self.long.outcomes.iter().enumerate() {
            let _never = writeln!(text, "{}", self.row((n, outcome)));
        }
        text.push_str("\nWhat the programs do by themselves, by buffers a call:\n\n| program | statement | calls | buffers | with the short history | longest | |\n|---|---|---|---|---|---|---|\n");
        let all_short = self.short.alone.concat();
        for (n, (long, short)) in self.long.alone.iter().zip(&self.short.alone).enumerate() {
            for statement in long.iter().take(SHOWN) {
                let before = short
                    .iter()
                    .find(|other| other.query == statement.query && other.database == statement.database);
                let _never = writeln!(
                    text,
                    "| {}{} | `{}` | {} | {} | {} | {} ms | {} |",
                    statement.role,
                    if n == 1 { ", much set aside" } else { "" },
                    statement.short().replace('`', "'"),
                    statement.calls,
                    number(statement.buffers),
                    before.map_or("–".to_owned(), |before| number(before.buffers)),
                    number(statement.longest_ms),
                    if statement.broken(&all_short).is_some() { "grows" } else { "bounded" },
                );
            }
        }
        if let Some(rate) = self.long.relay_rate {
            let _never = writeln!(text, "\nThe relay's own rate: {} events/s.", number(rate));
        }
        let memory = |measured: &Measured| {
            measured
                .memory
                .iter()
                .map(|(name, megabytes)| format!("{name} {}", number(*megabytes)))
                .collect::<Vec<_>>()
                .join(", ")
        };
        let _never = writeln!(
            text,
            "\nPeak memory of the programs, in MB: {}; with the short history {}.",
            memory(&self.long),
            memory(&self.short)
        );
        for (name, value) in &self.machine {
            let _never = writeln!(text, "\n{name}: {value}");
        }
        text
    }

    fn row(&self, (n, outcome): (usize, &Outcome)) -> String {
        let operation = outcome.operation;
        let time = match (&outcome.end, outcome.rate) {
            (End::Failed(_), _) => "failed".to_owned(),
            (End::Limit, None) => format!("> {} s", number(outcome.seconds)),
            (_, Some(rate)) => format!("{}/s, {} s", number(rate), number(outcome.seconds)),
            (End::Done(_), None) => format!("{} s", number(outcome.seconds)),
        };
        let buffers = |outcome: &Outcome| {
            let temporary = outcome.cost.temporary;
            let more = if temporary > 0 {
                format!(" + {} temporary", number(float(temporary)))
            } else {
                String::new()
            };
            let at_least = if outcome.end == End::Limit { "≥ " } else { "" };
            format!("{at_least}{}{more}", number(float(outcome.cost.buffers)))
        };
        let before = self
            .before(n)
            .map_or("–".to_owned(), |before| format!("{}, {} s", buffers(before), number(before.seconds)));
        let lock = outcome.locks.relation.iter().chain(&outcome.locks.advisory);
        let lock = lock
            .map(|held| {
                if held.seconds < 0.02 {
                    format!("{}, < 0.02 s", held.lock)
                } else {
                    format!("{}, {} s", held.lock, number(held.seconds))
                }
            })
            .collect::<Vec<_>>()
            .join("; ");
        let verdict = match (self.guard((n, outcome)), self.miss(outcome)) {
            (Some(_), _) if matches!(outcome.end, End::Failed(_)) => "failed",
            (Some(_), _) => "grows",
            (None, Some(_)) => "missed",
            (None, None) if outcome.end == End::Limit && outcome.done.is_none() => "not done",
            (None, None) => "met",
        };
        format!(
            "| `{}`{} | {time} | {} | {} | {before} | {lock} | {} s{} | {} s | {} | {} | {verdict}{} |",
            operation.line,
            if operation.score && operation.program() == "outbox-relay" { " (score)" } else { "" },
            operation.reach.map_or("–".to_owned(), |reach| reach.to_string()),
            buffers(outcome),
            number(outcome.longest_write),
            if outcome.failed_writes > 0 {
                format!(", {} failed", outcome.failed_writes)
            } else {
                String::new()
            },
            number(outcome.score_late),
            if outcome.silent > 0.0 { format!("{} s", number(outcome.silent)) } else { "–".to_owned() },
            outcome.memory.map_or("–".to_owned(), |megabytes| format!("{} MB", number(megabytes))),
            if outcome.left_behind > 0 { ", left a statement behind" } else { "" },
        )
    }
}

impl Measured {
    /// A scan of an index alone asks the visibility map for each row, and keeps the map's page until another one is asked
    /// for. In a partition with several of these pages, an order that is not that of the table asks for another one at every
    /// second row: at most one buffer more for each event.
    fn looks_at_maps(&self) -> f64 {
        let partition = float(self.blocks) / float(self.partitions.max(1));
        if partition > MAPPED { float(self.scale) * 1.06 } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::{
        cost::Cost,
        operation::{Count, Operation},
        watch::Locks,
    };

    fn outcome(operation: Operation, buffers: i64) -> Outcome {
        Outcome {
            operation,
            seconds: 1.0,
            end: End::Done(0),
            done: None,
            rate: None,
            cost: Cost { buffers, ..Cost::default() },
            locks: Locks::default(),
            longest_write: 0.0,
            failed_writes: 0,
            score_late: 0.0,
            memory: None,
            silent: 0.0,
            left_behind: 0,
        }
    }

    /// Ten times as long.
    fn report(short: Vec<Outcome>, long: Vec<Outcome>) -> Report {
        let measured = |scale, outcomes| Measured {
            scale,
            filled_in: 0.0,
            bytes: 0,
            blocks: 10_000,
            partitions: 11,
            outcomes,
            relay_rate: Some(10.0),
            alone: Default::default(),
            memory: Vec::new(),
        };
        Report { quick: false, machine: Vec::new(), short: measured(100, short), long: measured(1_000, long) }
    }

    #[test]
    fn each_rule_of_growth_is_held() {
        for (operation, most) in [
            (Operation::steady("a"), 2_200),
            (Operation::linear("a"), 15_200),
            (Operation::part("a", 0.1), 1_200),
            (Operation::at_most("a", 5_000.0), 5_000),
        ] {
            let broken =
                |buffers| report(vec![outcome(operation, 1_000)], vec![outcome(operation, buffers)]).broken();
            assert_eq!(broken(most), Vec::<String>::new(), "{operation:?}");
            assert_eq!(broken(most + 1).len(), 1, "{operation:?}");
        }
    }

    #[test]
    fn a_large_partition_costs_a_look_at_its_map_for_each_event() {
        let looks = |blocks, partitions| {
            let operation = Operation::linear("a");
            let mut report = report(vec![outcome(operation, 1)], vec![outcome(operation, 1_270)]);
            (report.long.blocks, report.long.partitions) = (blocks, partitions);
            report.broken().len()
        };
        assert_eq!([looks(326_730, 10), looks(326_720, 10), looks(326_730, 11)], [0, 1, 1]);
    }

    #[test]
    fn each_row_has_its_part() {
        let operation = Operation::for_each_row("a", 3.5);
        let of = |rows, buffers| {
            let cost = Cost { rows, buffers, ..Cost::default() };
            report(vec![outcome(operation, 1)], vec![Outcome { cost, ..outcome(operation, 0) }])
                .broken()
                .len()
        };
        assert_eq!([of(1_000, 3_700), of(1_000, 3_701)], [0, 1]);
    }

    #[test]
    fn what_is_counted_costs_as_much_for_each() {
        let operation = Operation::linear("a").counted(Count::Messages);
        let of = |buffers, done| Outcome { done: Some(done), ..outcome(operation, buffers) };
        assert!(report(vec![of(1_000, 10)], vec![of(40_000, 100)]).broken().is_empty());
        assert_eq!(report(vec![of(1_000, 10)], vec![of(40_001, 100)]).broken().len(), 1);
    }

    #[test]
    fn what_is_to_be_reached_is_held() {
        let line = Operation::steady("a");
        for (reach, met, missed) in [
            (Reach::Time(1.0), outcome(line, 0), Outcome { seconds: 1.1, ..outcome(line, 0) }),
            (Reach::TimePerPartition(0.1), outcome(line, 0), Outcome { seconds: 1.2, ..outcome(line, 0) }),
            (Reach::Rate(9.0), Outcome { rate: Some(9.0), ..outcome(line, 0) }, outcome(line, 0)),
            (
                Reach::OfRelay(0.5),
                Outcome { rate: Some(5.0), ..outcome(line, 0) },
                Outcome { rate: Some(4.9), ..outcome(line, 0) },
            ),
            (Reach::Still(1.0), outcome(line, 0), Outcome { score_late: 1.1, ..outcome(line, 0) }),
            (Reach::Time(9.0), outcome(line, 0), Outcome { end: End::Limit, ..outcome(line, 0) }),
            (
                Reach::Time(9.0),
                outcome(line, 0),
                Outcome { end: End::Failed("x".into()), ..outcome(line, 0) },
            ),
        ] {
            let broken = |outcome: Outcome| {
                let operation = line.reach(reach);
                report(vec![outcome.clone()], vec![Outcome { operation, ..outcome }]).broken()
            };
            assert_eq!(broken(met), Vec::<String>::new(), "{reach}");
            assert_eq!(broken(missed).len(), 1, "{reach}");
        }
    }
}
