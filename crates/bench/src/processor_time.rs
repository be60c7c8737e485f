//! Who takes how much processor time: what bounds a figure, and a number of it that hardly depends on what
//! else the machine does.

use std::{collections::BTreeMap, fs, time::Duration};

use rustix::{param::clock_ticks_per_second, process};

use super::statistics::{Spread, float, number};
use devstack::proc;

/// Seconds of processor time that each program has taken so far, by name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sample(BTreeMap<String, f64>);

impl Sample {
    /// Of now.
    pub(crate) fn take() -> Self {
        let mut sample = Self::default();
        let this = process::getpid();
        // With what has ended: pgbench.
        sample.add("the bench", proc::processor(this));
        for child in proc::children(this) {
            let tree = std::iter::once(child).chain(proc::descendants(child));
            let name = fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
            let name = match name.trim() {
                // The guard sleeps.
                "devstack" => continue,
                "postgres" => "PostgreSQL",
                name if name.contains('-') && !name.starts_with("rabbitmq") => name,
                _ => "RabbitMQ",
            };
            sample.add(name, tree.map(proc::processor).sum());
        }
        sample
    }

    fn add(&mut self, name: &str, ticks: u64) {
        let ticks = float(i64::try_from(ticks).unwrap_or(i64::MAX));
        let hertz = float(i64::try_from(clock_ticks_per_second()).unwrap_or(100));
        *self.0.entry(name.to_owned()).or_default() += ticks / hertz;
    }
}

/// What the rounds of a figure took.
#[derive(Debug, Default)]
pub(crate) struct Spent(BTreeMap<String, Vec<f64>>);

impl Spent {
    /// Takes in what was spent since `begin` on `count` of something.
    pub(crate) fn add(&mut self, begin: &Sample, count: i64) {
        for (name, seconds) in Sample::take().0 {
            let spent = seconds - begin.0.get(&name).copied().unwrap_or_default();
            self.0.entry(name).or_default().push(spent * 1e6 / float(count.max(1)));
        }
    }

    /// The same, of what was done at a `rate` for so long.
    pub(crate) fn add_rate(&mut self, begin: &Sample, rate: f64, length: Duration) {
        #[expect(clippy::cast_possible_truncation, reason = "a count")]
        self.add(begin, (rate * length.as_secs_f64()) as i64);
    }

    /// The medians, the largest first.
    pub(crate) fn told(&self) -> String {
        let medians = self.0.iter().map(|(name, each)| (Spread::of(each).median, name));
        let mut medians: Vec<_> = medians.filter(|(median, _)| *median >= 0.5).collect();
        medians.sort_by(|(a, _), (b, _)| b.total_cmp(a));
        let told: Vec<String> =
            medians.iter().map(|(median, name)| format!("{name} {}", number(*median))).collect();
        told.join(", ")
    }
}
