//! What a subscriber should have: of each aggregate at least what the outbox had at the start, and no more
//! than it had at the end.

use futures_util::TryStreamExt;
use serde::Serialize;

use super::snapshot::{Digest, List, Sums};

/// How the subscriber's version of an aggregate differs from the outbox's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Difference {
    /// The subscriber has an earlier version than the outbox had at the start.
    Behind,
    /// It has nothing of it.
    Missing,
    /// It has a version that the outbox never had.
    Ahead,
    /// It has an aggregate that the outbox never had.
    Unknown,
    /// The same, but some of the outbox's history is retired, so nobody can tell. Not wrong.
    Retired,
}

impl Difference {
    pub(super) const ALL: [Self; 5] =
        [Self::Behind, Self::Missing, Self::Ahead, Self::Unknown, Self::Retired];

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Behind => "behind",
            Self::Missing => "missing at the subscriber",
            Self::Ahead => "ahead of the outbox",
            Self::Unknown => "unknown to the outbox",
            Self::Retired => {
                "not compared, since the outbox no longer has them and some of its history is retired"
            }
        }
    }

    pub(super) fn advice(self) -> &'static str {
        match self {
            Self::Behind | Self::Missing => {
                "see whether everything is published (outbox-relay status, trace TYPE/ID), and whether the \
                subscriber holds events behind a gap or a refused event (its list of held events). To publish \
                what never arrived again, run: outbox-relay replay --aggregate TYPE/ID --to-queue QUEUE. Where \
                the events are retired, publish a baseline"
            }
            Self::Ahead | Self::Unknown => {
                "the outbox was restored from a backup or lost commits in a failover (see outbox-relay \
                new-incarnation), or another database publishes under the same name"
            }
            Self::Retired => {
                "expected for aggregates that were deleted before; of all others, outbox-relay prune leaves a baseline"
            }
        }
    }
}

/// An aggregate of which the subscriber has not what it should have.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct DifferingAggregate {
    #[serde(rename = "kind")]
    pub(super) difference: Difference,
    pub(super) aggregate: String,
    /// What the subscriber has.
    pub(super) applied: Option<i64>,
    /// What the outbox has: at the start where the subscriber is behind, else at the end.
    pub(super) version: Option<i64>,
}

impl DifferingAggregate {
    pub(super) fn text(&self) -> String {
        let Self { aggregate, .. } = self;
        match (self.applied, self.version) {
            (Some(applied), Some(version)) if version.checked_sub(1) == Some(applied) => {
                format!("{aggregate}: at version {applied}; {version} is missing")
            }
            (Some(applied), Some(version)) if applied < version => {
                format!("{aggregate}: at version {applied}; {} to {version} are missing", applied + 1)
            }
            (Some(applied), Some(version)) => {
                format!("{aggregate}: at version {applied}; the outbox has {version} and never had more")
            }
            (None, Some(version)) => format!("{aggregate}: nothing up to version {version}"),
            (Some(applied), None) => {
                format!("{aggregate}: at version {applied}; the outbox has nothing of it")
            }
            (None, None) => aggregate.clone(),
        }
    }
}

/// What both sides have of a type, as of the last look.
#[derive(Debug, Serialize)]
pub(super) struct Totals {
    pub(super) aggregate_type: String,
    pub(super) aggregates: i64,
    pub(super) versions: i64,
    pub(super) applied: i64,
    pub(super) applied_versions: i64,
}

/// What came of a comparison. Bounded, whatever is wrong: everything is counted, and some of what is
/// wrong is named.
#[derive(Debug)]
pub(super) struct Findings {
    pub(super) types: Vec<Totals>,
    pub(super) named: Vec<DifferingAggregate>,
    /// How many buckets no hash settled.
    pub(super) gone_through: usize,
    counts: [u64; Difference::ALL.len()],
    pub(super) limit: usize,
}

impl Findings {
    pub(super) fn new(limit: usize) -> Self {
        Self { types: Vec::new(), named: Vec::new(), gone_through: 0, counts: Default::default(), limit }
    }

    pub(super) fn of(&self, difference: Difference) -> u64 {
        self.counts[difference as usize]
    }

    pub(super) fn wrong(&self) -> u64 {
        self.counts.iter().sum::<u64>() - self.of(Difference::Retired)
    }

    /// It may still become right by itself.
    pub(super) fn only_behind(&self) -> bool {
        let behind = self.of(Difference::Behind) + self.of(Difference::Missing);
        behind > 0 && behind == self.wrong()
    }

    pub(super) fn add_type(&mut self, type_: &str, outbox: &Digest, inbox: &Digest) {
        let total = |digest: &Digest| {
            let sums = digest.iter().filter(|((of, _), _)| of == type_).map(|(_, sums)| sums);
            sums.fold((0, 0_i64), |(aggregates, versions), sums| {
                // Modulo 2^63, as each of them is.
                (aggregates + sums.aggregates, versions.wrapping_add(sums.versions) & i64::MAX)
            })
        };
        let ((aggregates, versions), (applied, applied_versions)) = (total(outbox), total(inbox));
        let aggregate_type = type_.to_owned();
        self.types.push(Totals { aggregate_type, aggregates, versions, applied, applied_versions });
    }

    fn add(&mut self, aggregate: DifferingAggregate) {
        self.counts[aggregate.difference as usize] += 1;
        if aggregate.difference != Difference::Retired && self.named.len() < self.limit {
            self.named.push(aggregate);
        }
    }
}

/// The buckets of a type that are not settled by their hash: where the subscriber has neither what the outbox
/// had at the start nor what it has at the end.
pub(super) fn differing(type_: &str, first: &Digest, theirs: &Digest, last: &Digest) -> Vec<i32> {
    let buckets = first.keys().chain(theirs.keys()).chain(last.keys());
    let mut buckets: Vec<i32> = buckets.filter(|(of, _)| of == type_).map(|(_, bucket)| *bucket).collect();
    buckets.sort_unstable();
    buckets.dedup();
    buckets.retain(|bucket| {
        let key = (type_.to_owned(), *bucket);
        let sums = |digest: &Digest| digest.get(&key).copied().unwrap_or_default();
        let theirs: Sums = sums(theirs);
        theirs != sums(first) && theirs != sums(last)
    });
    buckets
}

/// The comparison of a type's aggregates.
pub(super) struct TypeComparison<'a> {
    pub(super) type_: &'a str,
    /// Some of the outbox's history is gone.
    pub(super) retired: bool,
}

impl TypeComparison<'_> {
    /// Goes through three lists at once, of which one aggregate each is in memory.
    pub(super) async fn run(
        &self,
        lists: (List<'_>, List<'_>, List<'_>),
        findings: &mut Findings,
    ) -> anyhow::Result<()> {
        let (mut first, mut theirs, mut last) = lists;
        let mut heads = [first.try_next().await?, theirs.try_next().await?, last.try_next().await?];
        while let Some(id) = heads.iter().flatten().map(|(id, _)| id).min().cloned() {
            let mut versions = [None; 3];
            for (n, list) in [&mut first, &mut theirs, &mut last].into_iter().enumerate() {
                if let Some((_, version)) = heads[n].take_if(|(head, _)| *head == id) {
                    versions[n] = Some(version);
                    heads[n] = list.try_next().await?;
                }
            }
            let [start, applied, end] = versions;
            if let Some((difference, version)) = self.judge(start, applied, end) {
                let aggregate = format!("{}/{id}", self.type_);
                findings.add(DifferingAggregate { difference, aggregate, applied, version });
            }
        }
        Ok(())
    }

    fn judge(
        &self,
        start: Option<i64>,
        applied: Option<i64>,
        end: Option<i64>,
    ) -> Option<(Difference, Option<i64>)> {
        match (start, applied, end) {
            (Some(_), None, _) => Some((Difference::Missing, start)),
            (Some(at_least), Some(applied), _) if applied < at_least => Some((Difference::Behind, start)),
            (_, Some(_), None) => {
                Some((if self.retired { Difference::Retired } else { Difference::Unknown }, None))
            }
            (_, Some(applied), Some(at_most)) if applied > at_most => Some((Difference::Ahead, end)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn right_is_from_what_was_there_at_the_start_to_what_is_there_at_the_end() {
        let difference = |retired, start, applied, end| {
            TypeComparison { type_: "thing", retired }
                .judge(start, applied, end)
                .map(|(difference, _)| difference)
        };
        for (start, applied, end, expected) in [
            (Some(3), Some(3), Some(5), None),
            (Some(3), Some(4), Some(5), None),
            (Some(3), Some(5), Some(5), None),
            (None, Some(1), Some(1), None),
            (None, None, Some(1), None),
            (Some(3), Some(2), Some(5), Some(Difference::Behind)),
            (Some(3), None, Some(5), Some(Difference::Missing)),
            (Some(3), Some(6), Some(5), Some(Difference::Ahead)),
            (None, Some(6), Some(5), Some(Difference::Ahead)),
            (None, Some(1), None, Some(Difference::Unknown)),
            (Some(1), Some(1), None, Some(Difference::Unknown)),
        ] {
            assert_eq!(difference(false, start, applied, end), expected, "{start:?} {applied:?} {end:?}");
        }
        assert_eq!(difference(true, None, Some(1), None), Some(Difference::Retired));
    }
}
