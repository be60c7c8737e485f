//! A run for people and for programs.

use std::{collections::BTreeMap, fmt::Write, time::Duration};

use serde::Serialize;

use super::{
    crew::Log,
    fault::Member,
    history::Told,
    oracle::Totals,
    settings::Settings,
    subscriber::Memory,
    verdict::{Charge, Found},
};

/// Everything that was found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The command that runs it again.
    pub command: String,
    /// Which run it was.
    pub seed: u64,
    /// For how long there were faults, in seconds.
    pub length: u64,
    /// How often each kind of fault was done.
    pub faults: BTreeMap<&'static str, usize>,
    /// How often each charge was found.
    pub verdicts: BTreeMap<Charge, Found>,
    /// How the programs were.
    pub programs: Vec<ProgramReport>,
    /// How much there was.
    pub numbers: Numbers,
}

/// How a program was.
#[derive(Debug, Serialize)]
pub struct ProgramReport {
    /// Which.
    pub name: &'static str,
    /// How often it had to be ready again after its faults.
    pub recoveries: usize,
    /// How many seconds that took: the median.
    pub median: f64,
    /// The longest.
    pub worst: f64,
    /// The most memory that it had, in MiB.
    pub memory: u64,
}

/// How much there was.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Numbers {
    /// Writes that were acknowledged.
    pub acknowledged: usize,
    /// Requests that clients sent again.
    pub retries: u64,
    /// Writes of which nobody knew for a while whether they were done.
    pub in_doubt: u64,
    /// Scores that were read with a write's token.
    pub reads: u64,
    /// Events of the person database, notes included.
    pub person_events: usize,
    /// Events of the score database.
    pub score_events: usize,
    /// Events whose content was erased.
    pub erased: usize,
    /// Persons who are there at the end.
    pub persons: usize,
    /// What the subscriber was delivered.
    pub deliveries: u64,
    /// Of these, what had come before.
    pub repeated: u64,
    /// Dead rows of the outboxes.
    pub dead_rows: i64,
    /// Seconds from the last write until everything had arrived.
    pub quiet: f64,
    /// Seconds that the whole run took.
    pub seconds: u64,
}

impl Numbers {
    pub(crate) fn new(told: &Told, totals: &Totals, memory: &Memory, quiet: Duration) -> Self {
        Self {
            acknowledged: told.acknowledged.len(),
            retries: told.retries,
            in_doubt: told.in_doubt,
            reads: told.reads,
            person_events: totals.person_events,
            score_events: totals.score_events,
            erased: totals.erased,
            persons: totals.persons,
            deliveries: memory.deliveries,
            repeated: memory.repeated,
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
        crew: &BTreeMap<Member, Log>,
        found: BTreeMap<Charge, Found>,
        numbers: Numbers,
    ) -> Self {
        let mut verdicts: BTreeMap<Charge, Found> =
            Charge::ALL.into_iter().map(|charge| (charge, Found::default())).collect();
        verdicts.extend(found);
        let programs = crew.iter().map(|(member, log)| ProgramReport::new(*member, log)).collect();
        let (command, length) = (settings.command(), settings.length.as_secs());
        Self { command, seed: settings.seed, length, faults, verdicts, programs, numbers }
    }

    /// Whether nothing was found.
    pub fn is_green(&self) -> bool {
        self.verdicts.values().all(|found| found.count == 0)
    }

    /// What was found, in the order of the table.
    pub fn charges(&self) -> Vec<Charge> {
        let found = self.verdicts.iter().filter(|(_, found)| found.count > 0);
        found.map(|(charge, _)| *charge).collect()
    }

    /// The whole of it, in Markdown.
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
        row(&["verdict".to_owned(), String::new()]);
        row(&["---".to_owned(), "---:".to_owned()]);
        for charge in Charge::ALL {
            let count = self.verdicts.get(&charge).map_or(0, |found| found.count);
            row(&[charge.words().to_owned(), count.to_string()]);
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
            "\n{} writes acknowledged ({} requests sent again, {} writes in doubt for a while), {} own writes read; \
             {} events of persons and notes, {} of scores, {} erased; {} deliveries, {} of them repeated; \
             {} dead rows in the outboxes; everything had arrived {:.1} s after the end.\n",
            n.acknowledged,
            n.retries,
            n.in_doubt,
            n.reads,
            n.person_events,
            n.score_events,
            n.erased,
            n.deliveries,
            n.repeated,
            n.dead_rows,
            n.quiet,
        );
        text
    }

    /// What to look at, when something was found.
    pub fn complaint(&self, logs: &std::path::Path) -> String {
        let mut text = String::new();
        for charge in self.charges() {
            let Some(found) = self.verdicts.get(&charge) else { continue };
            let _never = writeln!(text, "{}: {}", charge.words(), found.count);
            for example in &found.examples {
                let _never = writeln!(text, "    {example}");
            }
            let _never = writeln!(text, "    look at {}", charge.look_at());
        }
        let _never =
            writeln!(text, "The logs are in {}. The same faults again: {}", logs.display(), self.command);
        text
    }

    /// For programs.
    pub fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }
}

impl ProgramReport {
    fn new(member: Member, log: &Log) -> Self {
        let mut took = log.recoveries.clone();
        took.sort_unstable();
        let seconds = |at: usize| took.get(at).map_or(0.0, Duration::as_secs_f64);
        Self {
            name: member.name(),
            recoveries: took.len(),
            median: seconds(took.len() / 2),
            worst: seconds(took.len().saturating_sub(1)),
            memory: log.memory / 1024,
        }
    }
}
