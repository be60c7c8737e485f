//! The shape of a figure, and how its rounds are measured.

use serde::Serialize;

use super::{
    goal::Goal,
    statistics::{Spread, number},
    testbed::Testbed,
};

/// A row of the table, before it is measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Row {
    /// What it is called.
    pub name: &'static str,
    /// What the system does.
    pub system: &'static str,
    /// What it is compared with, if anything.
    pub ceiling: Option<&'static str>,
    /// Of both.
    pub unit: &'static str,
    /// The goal.
    pub goal: Goal,
}

/// A figure: one number for each of its rows and rounds, of the system and of its ceiling.
pub trait Figure: Sized {
    /// Its rows.
    const ROWS: &'static [Row];

    /// Prepares what all rounds need.
    fn prepare(testbed: &Testbed) -> impl Future<Output = anyhow::Result<Self>>;

    /// A round of the system.
    fn system(&mut self, testbed: &Testbed) -> impl Future<Output = anyhow::Result<Vec<f64>>>;

    /// A round of what it is compared with.
    fn ceiling(&mut self, _ground: &Testbed) -> impl Future<Output = anyhow::Result<Vec<f64>>> {
        std::future::ready(Ok(Vec::new()))
    }

    /// Removes what was prepared, and returns notes for the report.
    fn finish(self, testbed: &Testbed) -> impl Future<Output = anyhow::Result<Vec<String>>>;
}

/// A row and what was measured, round by round.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// What it is.
    #[serde(flatten)]
    pub row: Row,
    /// Of the system.
    pub of_system: Vec<f64>,
    /// Of its ceiling; empty where there is none.
    pub of_ceiling: Vec<f64>,
}

impl Measured {
    /// The value that is compared with the goal, round by round.
    pub fn values(&self) -> Vec<f64> {
        let ceilings = self.of_ceiling.iter().copied().chain(std::iter::repeat(f64::NAN));
        self.of_system.iter().zip(ceilings).map(|(s, c)| self.row.goal.value(*s, c)).collect()
    }

    /// Whether the median meets the goal.
    pub fn is_met(&self) -> bool {
        self.row.goal.is_met_by(Spread::of(&self.values()).median)
    }
}

/// Runs the rounds of a figure. System and ceiling take turns in going first. `say` gets a line for each round.
pub async fn measure<F: Figure>(
    testbed: &Testbed,
    say: impl Fn(&str),
) -> anyhow::Result<(Vec<Measured>, Vec<String>)> {
    let mut rows: Vec<Measured> = F::ROWS
        .iter()
        .map(|row| Measured { row: *row, of_system: Vec::new(), of_ceiling: Vec::new() })
        .collect();
    let mut figure = F::prepare(testbed).await?;
    for round in 0..testbed.size.rounds {
        let (system, ceiling) = if round % 2 == 0 {
            let system = figure.system(testbed).await?;
            (system, figure.ceiling(testbed).await?)
        } else {
            let ceiling = figure.ceiling(testbed).await?;
            (figure.system(testbed).await?, ceiling)
        };
        for (n, row) in rows.iter_mut().enumerate() {
            row.of_system.extend(system.get(n));
            row.of_ceiling.extend(ceiling.get(n));
            say(&progress(row, round + 1, testbed.size.rounds));
        }
    }
    let notes = figure.finish(testbed).await?;
    Ok((rows, notes))
}

/// The last round of a row, in one line.
fn progress(row: &Measured, round: usize, rounds: usize) -> String {
    let last = |values: &[f64]| values.last().copied().map(number).unwrap_or_default();
    let Row { name, unit, .. } = row.row;
    let against = match row.row.ceiling {
        Some(ceiling) => format!(", {ceiling} {} {unit}: {}", last(&row.of_ceiling), last(&row.values())),
        None => String::new(),
    };
    format!("{name} {round}/{rounds}: {} {unit}{against}", last(&row.of_system))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_decides() {
        let row = |goal| Row { name: "", system: "", ceiling: None, unit: "", goal };
        let measured = |goal, of_system: &[f64], of_ceiling: &[f64]| Measured {
            row: row(goal),
            of_system: of_system.to_vec(),
            of_ceiling: of_ceiling.to_vec(),
        };
        let ratio = measured(Goal::RatioAtLeast(0.5), &[1.0, 5.0, 9.0], &[10.0, 10.0, 10.0]);
        assert_eq!(Spread::of(&ratio.values()), Spread { median: 0.5, min: 0.1, max: 0.9 });
        assert!(ratio.is_met());
        assert!(!measured(Goal::RatioAtLeast(0.51), &[1.0, 5.0, 9.0], &[10.0; 3]).is_met());
        assert!(measured(Goal::DifferenceAtMost(16.0), &[20.0], &[4.0]).is_met());
        assert!(!measured(Goal::Below(1.0), &[1.0], &[]).is_met());
        assert!(measured(Goal::AtLeast(1.0), &[1.0, 1.5, 0.5], &[]).is_met());
        // What was not measured is no goal met.
        assert!(!measured(Goal::RatioAtMost(2.5), &[], &[]).is_met());
    }
}
