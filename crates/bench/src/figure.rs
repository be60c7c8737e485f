//! The shape of a figure, and how its rounds are judged.

use std::time::Duration;

use serde::Serialize;

use super::ground::Ground;

/// How much a run does.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Size {
    /// Rounds of each figure.
    pub rounds: usize,
    /// Events of a drain.
    pub events: i64,
    /// Persons to write and to read.
    pub persons: i64,
    /// How long a load lasts.
    pub load: Duration,
    /// Between two writes of the latency figure.
    pub apart: Duration,
    /// How long the programs are watched while they have nothing to do.
    pub idle: Duration,
    /// Events of history.
    pub history: i64,
    /// Events that wait while the relay's memory is watched.
    pub waiting: i64,
}

impl Size {
    /// What the goals are about.
    pub const FULL: Self = Self {
        rounds: 5,
        events: 100_000,
        persons: 100_000,
        load: Duration::from_secs(10),
        apart: Duration::from_millis(5),
        idle: Duration::from_secs(12),
        history: 5_000_000,
        waiting: 2_000_000,
    };
    /// To see that everything works. Its numbers are too short to mean much.
    pub const QUICK: Self = Self {
        rounds: 3,
        events: 15_000,
        persons: 20_000,
        load: Duration::from_secs(3),
        // What a debug build can do beside others.
        apart: Duration::from_millis(50),
        idle: Duration::from_secs(4),
        history: 200_000,
        waiting: 100_000,
    };
}

/// What the system and its ceiling have to come to, round by round; the median decides.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// The system does at least so much of its ceiling.
    RatioAtLeast(f64),
    /// The system takes at most so many times its floor.
    RatioAtMost(f64),
    /// The system takes at most so much more.
    DifferenceAtMost(f64),
    /// The system takes less than this.
    Below(f64),
}

impl Goal {
    /// What is held against the goal.
    fn value(self, system: f64, ceiling: f64) -> f64 {
        match self {
            Self::RatioAtLeast(_) | Self::RatioAtMost(_) => system / ceiling,
            Self::DifferenceAtMost(_) => system - ceiling,
            Self::Below(_) => system,
        }
    }

    fn is_met_by(self, value: f64) -> bool {
        match self {
            Self::RatioAtLeast(goal) => value >= goal,
            Self::RatioAtMost(goal) | Self::DifferenceAtMost(goal) => value <= goal,
            Self::Below(goal) => value < goal,
        }
    }
}

/// A row of the table, before it was measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Row {
    /// What it is called.
    pub name: &'static str,
    /// What the system does.
    pub system: &'static str,
    /// What it is held against, if anything.
    pub ceiling: Option<&'static str>,
    /// Of both.
    pub unit: &'static str,
    /// What they have to come to.
    pub goal: Goal,
}

/// A figure: one number for each of its rows and rounds, of the system and of its ceiling.
pub trait Figure: Sized {
    /// Its rows.
    const ROWS: &'static [Row];

    /// Makes what all rounds need.
    fn prepare(ground: &Ground) -> impl Future<Output = anyhow::Result<Self>>;

    /// A round of the system.
    fn system(&mut self, ground: &Ground) -> impl Future<Output = anyhow::Result<Vec<f64>>>;

    /// A round of what it is held against.
    fn ceiling(&mut self, _ground: &Ground) -> impl Future<Output = anyhow::Result<Vec<f64>>> {
        std::future::ready(Ok(Vec::new()))
    }

    /// Removes what was made, and says what else is worth knowing.
    fn finish(self, ground: &Ground) -> impl Future<Output = anyhow::Result<Vec<String>>>;
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
    /// What was held against the goal in each round.
    pub fn values(&self) -> Vec<f64> {
        let ceilings = self.of_ceiling.iter().copied().chain(std::iter::repeat(f64::NAN));
        self.of_system.iter().zip(ceilings).map(|(s, c)| self.row.goal.value(*s, c)).collect()
    }

    /// Whether the median meets the goal.
    pub fn is_met(&self) -> bool {
        self.row.goal.is_met_by(Spread::of(&self.values()).median)
    }
}

/// Median, least and most.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The middle one; of an even number the lower of the two.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The most.
    pub max: f64,
}

impl Spread {
    /// Of some values; without any, nothing is known.
    pub fn of(values: &[f64]) -> Self {
        let sorted = sorted(values);
        let at = |n: usize| sorted.get(n).copied().unwrap_or(f64::NAN);
        Self {
            median: at(sorted.len().saturating_sub(1) / 2),
            min: at(0),
            max: at(sorted.len().saturating_sub(1)),
        }
    }
}

/// The value that so many thousandths are at or below.
pub(crate) fn quantile(values: &[f64], thousandths: usize) -> f64 {
    let sorted = sorted(values);
    let at = (sorted.len() * thousandths).div_ceil(1000).saturating_sub(1);
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// So many of something in a time, as a rate in seconds.
pub(crate) fn rate(count: i64, took: Duration) -> f64 {
    float(count) / took.as_secs_f64()
}

#[expect(clippy::cast_precision_loss, reason = "counts of a bench are far below 2^52")]
pub(crate) fn float(count: i64) -> f64 {
    count as f64
}

/// Runs the rounds of a figure. System and ceiling take turns in going first. `say` is told of each round.
pub async fn measure<F: Figure>(
    ground: &Ground,
    say: impl Fn(&str),
) -> anyhow::Result<(Vec<Measured>, Vec<String>)> {
    let mut rows: Vec<Measured> = F::ROWS
        .iter()
        .map(|row| Measured { row: *row, of_system: Vec::new(), of_ceiling: Vec::new() })
        .collect();
    let mut figure = F::prepare(ground).await?;
    for round in 0..ground.size.rounds {
        let (system, ceiling) = if round % 2 == 0 {
            let system = figure.system(ground).await?;
            (system, figure.ceiling(ground).await?)
        } else {
            let ceiling = figure.ceiling(ground).await?;
            (figure.system(ground).await?, ceiling)
        };
        for (n, row) in rows.iter_mut().enumerate() {
            row.of_system.extend(system.get(n));
            row.of_ceiling.extend(ceiling.get(n));
            say(&told(row, round + 1, ground.size.rounds));
        }
    }
    let notes = figure.finish(ground).await?;
    Ok((rows, notes))
}

/// A row's last round, in one line.
fn told(row: &Measured, round: usize, rounds: usize) -> String {
    let last = |values: &[f64]| values.last().copied().map(number).unwrap_or_default();
    let Row { name, unit, .. } = row.row;
    let against = match row.row.ceiling {
        Some(ceiling) => format!(", {ceiling} {} {unit}: {}", last(&row.of_ceiling), last(&row.values())),
        None => String::new(),
    };
    format!("{name} {round}/{rounds}: {} {unit}{against}", last(&row.of_system))
}

/// A number for people: three figures, and thousands apart.
pub fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => {
            let digits = format!("{value:.0}");
            let mut grouped = String::new();
            for (n, digit) in digits.chars().enumerate() {
                if n > 0 && (digits.len() - n) % 3 == 0 {
                    grouped.push(',');
                }
                grouped.push(digit);
            }
            grouped
        }
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_decides_and_numbers_are_short() {
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
        // What was not measured is no goal met.
        assert!(!measured(Goal::RatioAtMost(2.5), &[], &[]).is_met());
        let quantiles = [500, 990].map(|thousandths| number(quantile(&[4.0, 1.0, 3.0, 2.0], thousandths)));
        assert_eq!(quantiles, ["2.00", "4.00"]);
        let shown = [8412.3, 1_234_567.0, 123.4, 12.34, 0.956].map(number);
        assert_eq!(shown, ["8,412", "1,234,567", "123", "12.3", "0.96"]);
    }
}
