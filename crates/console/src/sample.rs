//! The last hour of an outbox, from the console's own looks, in bounded memory.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use chrono::{DateTime, TimeDelta, Utc};

use crate::{outbox::Look, watch::TICK};

/// What is kept.
pub const HOUR: Duration = Duration::from_hours(1);

/// What is drawn of one look.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// When.
    pub at: DateTime<Utc>,
    /// Events that are not settled, of the relay that has most. At most one more than are counted.
    pub backlog: f64,
    /// The age of the oldest of them in seconds.
    pub age: f64,
    /// Events published a second, of all relays.
    pub published: f64,
    /// Events that are set aside or wait.
    pub aside: f64,
}

impl Sample {
    /// Of a look.
    pub fn of(look: &Look) -> Self {
        let relays = &look.status.relays;
        let most = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
        Self {
            at: Utc::now(),
            backlog: most(&mut relays.iter().map(|r| float(r.backlog.events.unwrap_or(r.backlog.at_most)))),
            age: most(&mut relays.iter().filter_map(|r| r.backlog.age_seconds)),
            published: relays
                .iter()
                .filter_map(|r| r.rate.as_ref().and_then(|rate| rate.published_per_second))
                .sum(),
            aside: most(
                &mut relays.iter().map(|r| float(r.parked.all() + r.waiting_events.events.unwrap_or(10_001))),
            ),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "for a plot it is exact enough")]
fn float(count: i64) -> f64 {
    count as f64
}

/// About one for each tick of an hour: a second look may begin the next one up to a second early.
#[derive(Debug, Default)]
pub struct Samples(Mutex<VecDeque<Sample>>);

impl Samples {
    /// Keeps it. Of looks that follow each other quickly, the greatest values stand for all.
    pub fn add(&self, sample: Sample) {
        let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let tick = TimeDelta::from_std(TICK).unwrap_or_default();
        // Two looks make a line, so the second one is kept however early it comes.
        match samples.len().checked_sub(2).map(|before| samples[before].at) {
            Some(before) if sample.at - before < tick => {
                if let Some(last) = samples.back_mut() {
                    *last = Sample {
                        backlog: last.backlog.max(sample.backlog),
                        age: last.age.max(sample.age),
                        aside: last.aside.max(sample.aside),
                        ..sample
                    };
                }
            }
            _ => samples.push_back(sample),
        }
        let hour = TimeDelta::from_std(HOUR).unwrap_or_default();
        while samples.front().is_some_and(|first| sample.at - first.at > hour) {
            samples.pop_front();
        }
    }

    /// All of them, the oldest first.
    pub fn all(&self) -> Vec<Sample> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_hour_of_looks_is_bounded_however_often_one_looks() {
        let samples = Samples::default();
        let begin: DateTime<Utc> = "2026-01-01T00:00:00Z".parse().unwrap();
        for second in 0..10_000 {
            let at = begin + TimeDelta::seconds(second);
            let backlog = if second == 9_001 { 50.0 } else { 1.0 };
            samples.add(Sample { at, backlog, age: 0.0, published: 0.0, aside: 0.0 });
        }
        let all = samples.all();
        assert!((300..=402).contains(&all.len()), "{}", all.len());
        assert!(all[0].at >= begin + TimeDelta::seconds(10_000 - 3_601));
        assert_eq!(all.iter().filter(|sample| sample.backlog > 1.0).count(), 1);
    }
}
