//! Processor time by program: it shows what limits a figure, and hardly depends on what else the machine does.

use std::{collections::BTreeMap, fs, time::Duration};

use rustix::{param::clock_ticks_per_second, process};

use super::statistics::{Spread, float, number};
use devstack::proc;

/// Seconds of processor time of each program so far, by name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sample(BTreeMap<String, f64>);

impl Sample {
    /// Takes one.
    pub(crate) fn take() -> Self {
        let mut sample = Self::default();
        let this = process::getpid();
        // With its children that have ended, such as pgbench.
        sample.add("the bench", proc::processor(this));
        for child in proc::children(this) {
            let tree = std::iter::once(child).chain(proc::descendants(child));
            let name = fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
            let name = match name.trim() {
                // The reaper only waits.
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

/// Microseconds of processor time by program, for each unit of work, round by round.
#[derive(Debug, Default)]
pub(crate) struct ProcessorTime(BTreeMap<String, Vec<f64>>);

impl ProcessorTime {
    /// Adds a round that began at the sample `begin` and did `count` units of work.
    pub(crate) fn add(&mut self, begin: &Sample, count: i64) {
        for (name, seconds) in Sample::take().0 {
            let spent = seconds - begin.0.get(&name).copied().unwrap_or_default();
            self.0.entry(name).or_default().push(spent * 1e6 / float(count.max(1)));
        }
    }

    /// Adds a round that worked at this `rate` for so long.
    pub(crate) fn add_rate(&mut self, begin: &Sample, rate: f64, length: Duration) {
        #[expect(clippy::cast_possible_truncation, reason = "a count")]
        self.add(begin, (rate * length.as_secs_f64()) as i64);
    }

    /// The medians, the largest first.
    pub(crate) fn summary(&self) -> String {
        let medians = self.0.iter().map(|(name, each)| (Spread::of(each).median, name));
        let mut medians: Vec<_> = medians.filter(|(median, _)| *median >= 0.5).collect();
        medians.sort_by(|(a, _), (b, _)| b.total_cmp(a));
        let summary: Vec<String> =
            medians.iter().map(|(median, name)| format!("{name} {}", number(*median))).collect();
        summary.join(", ")
    }
}
