//! The report of a run: the table, the page in Markdown, and JSON.

use std::fmt::Write;

use serde::Serialize;

use super::{
    figure::Measured,
    scale::Scale,
    statistics::{Spread, number},
};

/// The report of a run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The command that measures it again.
    pub command: String,
    /// A short run, whose numbers mean little.
    pub quick: bool,
    /// The scale of the run.
    pub size: Scale,
    /// Versions, cores, settings.
    pub machine: Vec<(&'static str, String)>,
    /// The rows of the table.
    pub rows: Vec<Measured>,
    /// Notes of the figures.
    pub notes: Vec<String>,
    /// The figures without a result.
    pub failed: Vec<Failed>,
}

/// A figure that could not be measured.
#[derive(Clone, Debug, Serialize)]
pub struct Failed {
    /// Its name.
    pub figure: &'static str,
    /// Why.
    pub error: String,
}

impl Report {
    /// The rows whose goal is missed.
    pub fn missed(&self) -> Vec<&'static str> {
        self.rows.iter().filter(|row| !row.is_met()).map(|row| row.row.name).collect()
    }

    /// The table, in Markdown.
    pub fn table(&self) -> String {
        let mut text = "| figure | the system | its ceiling | in each round (least to most) | goal | |\n\
                        |---|---|---|---|---|---|\n"
            .to_owned();
        for measured in &self.rows {
            let row = measured.row;
            let median = |values: &[f64]| format!("{} {}", number(Spread::of(values).median), row.unit);
            let ceiling = if row.ceiling.is_some() { median(&measured.of_ceiling) } else { "–".to_owned() };
            let Spread { median: middle, min, max } = Spread::of(&measured.values());
            let _never = writeln!(
                text,
                "| {} | {} | {ceiling} | **{}** ({} to {}) | {} | {} |",
                row.name,
                median(&measured.of_system),
                number(middle),
                number(min),
                number(max),
                row.goal,
                if measured.is_met() { "met" } else { "missed" },
            );
        }
        text
    }

    /// The whole page, in Markdown.
    pub fn page(&self) -> String {
        let mut text = format!("Made by `{}`.\n\n", self.command);
        if self.quick {
            text.push_str("**A quick run, to see that everything works: too short to mean much.**\n\n");
        }
        text.push_str(&self.table());
        for Failed { figure, error } in &self.failed {
            let _never = writeln!(text, "\n**The figure {figure} could not be measured**: {error}");
        }
        text.push_str(
            "\nEach number is the median of its rounds. A round is the system and then its ceiling, or the \
             other way round, on the same servers; what is held against the goal is computed in each round, \
             and the median decides.\n\n",
        );
        for Measured { row, .. } in &self.rows {
            let against = row.ceiling.map(|ceiling| format!(" Its ceiling: {ceiling}.")).unwrap_or_default();
            let _never = writeln!(text, "- **{}**: {}.{against}", row.name, row.system);
        }
        text.push('\n');
        for note in &self.notes {
            let _never = writeln!(text, "- {note}.");
        }
        text.push_str("\n| measured on | |\n|---|---|\n");
        for (name, value) in &self.machine {
            let _never = writeln!(text, "| {name} | {value} |");
        }
        text
    }

    /// In a sentence.
    pub(crate) fn measured_on(&self) -> String {
        let of = |name: &str| {
            let found = self.machine.iter().find(|(field, _)| *field == name);
            found.map_or("?", |(_, value)| value.split(';').next().unwrap_or_default())
        };
        format!(
            "Medians of {} rounds, made by `{}` on {} cores, with PostgreSQL {} and RabbitMQ {}, both durable.",
            self.size.rounds,
            self.command,
            of("cores"),
            of("PostgreSQL"),
            of("RabbitMQ"),
        )
    }

    /// Every round, as JSON.
    pub fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }
}
