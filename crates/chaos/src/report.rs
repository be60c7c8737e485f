//! The report of a run, as Markdown and as JSON.

use std::{collections::BTreeMap, fmt::Write, time::Duration};

use serde::Serialize;

use super::{
    fault::Instance,
    history::History,
    oracle::Totals,
    settings::Settings,
    subscriber::Deliveries,
    supervisor::Health,
    violation::{Occurrences, Violation},
};

/// The report.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The command that runs it again.
    pub command: String,
    /// Its seed.
    pub seed: u64,
    /// For how long there were faults, in seconds.
    pub length: u64,
    /// How often each kind of fault was injected.
    pub faults: BTreeMap<&'static str, usize>,
    /// How often each violation was found.
    pub verdicts: BTreeMap<Violation, Occurrences>,
    /// The programs.
    pub programs: Vec<ProgramReport>,
    /// How much was written, published and read.
    pub numbers: Numbers,
}

/// A program during the run.
#[derive(Debug, Serialize)]
pub struct ProgramReport {
    /// Its name.
    pub name: &'static str,
    /// How often it had a fault and was ready again.
    pub recoveries: usize,
    /// From the end of the fault until it was ready, in seconds: the median.
    pub median: f64,
    /// The longest.
    pub worst: f64,
    /// Its peak memory, in MiB.
    pub memory: u64,
}

/// How much was written, published and read.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Numbers {
    /// Writes that were acknowledged.
    pub acknowledged: usize,
    /// Of these, those that were forgotten when a database went back in time, after they had been compared.
    pub forgotten: usize,
    /// Requests that clients repeated.
    pub retries: u64,
    /// Writes whose outcome was unknown for a while.
    pub in_doubt: u64,
    /// Scores that were read with a write's token.
    pub reads: u64,
    /// Events of the person database, notes included.
    pub person_events: usize,
    /// Events of the score database.
    pub score_events: usize,
    /// Events that were erased.
    pub erased: usize,
    /// Persons that exist at the end.
    pub persons: usize,
    /// Deliveries to the subscriber.
    pub deliveries: u64,
    /// Of these, repeated ones.
    pub repeated: u64,
    /// Deliveries of an incarnation after those of a later one.
    pub superseded: u64,
    /// Dead rows of the outboxes.
    pub dead_rows: i64,
    /// Seconds from the last write until everything had arrived.
    pub quiet: f64,
    /// Seconds that the whole run took.
    pub seconds: u64,
}

impl Numbers {
    pub(crate) fn new(history: &History, totals: &Totals, deliveries: &Deliveries, quiet: Duration) -> Self {
        Self {
            acknowledged: history.acknowledged.len() + history.forgotten,
            forgotten: history.forgotten,
            retries: history.retries,
            in_doubt: history.in_doubt,
            reads: history.reads,
            person_events: totals.person_events,
            score_events: totals.score_events,
            erased: totals.erased,
            persons: totals.persons,
            deliveries: deliveries.total,
            repeated: deliveries.repeated,
            superseded: deliveries.superseded,
            dead_rows: totals.dead_rows,
            quiet: quiet.as_secs_f64(),
            seconds: 0,
        }
    }
}

impl Report {
    pub(crate) fn new(
        settings: &Settings,
        faults: BTreeMap<&'static str, usize>,
        health: &BTreeMap<Instance, Health>,
        found: BTreeMap<Violation, Occurrences>,
        numbers: Numbers,
    ) -> Self {
        let mut verdicts: BTreeMap<Violation, Occurrences> =
            Violation::ALL.into_iter().map(|violation| (violation, Occurrences::default())).collect();
        verdicts.extend(found);
        let programs =
            health.iter().map(|(instance, health)| ProgramReport::new(*instance, health)).collect();
        let (command, length) = (settings.command(), settings.length.as_secs());
        Self { command, seed: settings.seed, length, faults, verdicts, programs, numbers }
    }

    /// Whether every promise was kept.
    pub fn is_green(&self) -> bool {
        self.verdicts.values().all(|found| found.count == 0)
    }

    /// The violations that were found, in the order of the table.
    pub fn violations(&self) -> Vec<Violation> {
        let found = self.verdicts.iter().filter(|(_, found)| found.count > 0);
        found.map(|(violation, _)| *violation).collect()
    }

    /// The page, in Markdown.
    pub fn page(&self) -> String {
        let mut text = format!("Made by `{}`.\n\n", self.command);
        let mut row = |cells: &[String]| {
            let _never = writeln!(text, "| {} |", cells.join(" | "));
        };
        let total: usize = self.faults.values().sum();
        row(&[format!("faults: {total}"), String::new()]);
        row(&["---".to_owned(), "---:".to_owned()]);
        for (kind, count) in &self.faults {
            row(&[(*kind).to_owned(), count.to_string()]);
        }
        text.push('\n');
        let mut row = |cells: &[String]| {
            let _never = writeln!(text, "| {} |", cells.join(" | "));
        };
        row(&["violation".to_owned(), String::new()]);
        row(&["---".to_owned(), "---:".to_owned()]);
        for violation in Violation::ALL {
            let count = self.verdicts.get(&violation).map_or(0, |found| found.count);
            row(&[violation.description().to_owned(), count.to_string()]);
        }
        text.push('\n');
        let mut row = |cells: &[String]| {
            let _never = writeln!(text, "| {} |", cells.join(" | "));
        };
        row(&["program", "ready again, times", "median", "worst", "memory"].map(str::to_owned));
        row(&["---", "---:", "---:", "---:", "---:"].map(str::to_owned));
        for program in &self.programs {
            row(&[
                program.name.to_owned(),
                program.recoveries.to_string(),
                format!("{:.1} s", program.median),
                format!("{:.1} s", program.worst),
                format!("{} MiB", program.memory),
            ]);
        }
        let n = &self.numbers;
        let _never = write!(
            text,
            "\n{} writes acknowledged ({} before a database went back in time, {} requests sent again, \
             {} writes in doubt for a while), {} own writes read; \
             {} events of persons and notes, {} of scores, {} erased; {} deliveries, {} of them repeated, \
             {} superseded; \
             {} dead rows in the outboxes; everything had arrived {:.1} s after the end.\n",
            n.acknowledged,
            n.forgotten,
            n.retries,
            n.in_doubt,
            n.reads,
            n.person_events,
            n.score_events,
            n.erased,
            n.deliveries,
            n.repeated,
            n.superseded,
            n.dead_rows,
            n.quiet,
        );
        text
    }

    /// What to look at when a promise was broken.
    pub fn complaint(&self, logs: &std::path::Path) -> String {
        let mut text = String::new();
        for violation in self.violations() {
            let Some(found) = self.verdicts.get(&violation) else { continue };
            let _never = writeln!(text, "{}: {}", violation.description(), found.count);
            for example in &found.examples {
                let _never = writeln!(text, "    {example}");
            }
            let _never = writeln!(text, "    look at {}", violation.where_to_look());
        }
        let _never =
            writeln!(text, "The logs are in {}. The same faults again: {}", logs.display(), self.command);
        text
    }

    /// All of it, as JSON.
    pub fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }
}

impl ProgramReport {
    fn new(instance: Instance, health: &Health) -> Self {
        let mut took = health.recoveries.clone();
        took.sort_unstable();
        let seconds = |at: usize| took.get(at).map_or(0.0, Duration::as_secs_f64);
        Self {
            name: instance.name(),
            recoveries: took.len(),
            median: seconds(took.len() / 2),
            worst: seconds(took.len().saturating_sub(1)),
            memory: health.peak_memory / 1024,
        }
    }
}
