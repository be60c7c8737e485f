//! Which positions were read, which are missing, and when a missing one will never come. No I/O.
//!
//! Positions become visible out of order: 101 may commit before 100, and 100 may never commit. A
//! position that was jumped over is a *gap*. Its writer took the shared outbox lock before the position
//! and keeps it to its end, so whoever holds the lock after the gap was seen is a *suspect*, and once
//! no suspect holds it any more, one more read decides: the event is there, or it never will be.
//!
//! An open gap holds back `low_water`, never delivery: whoever may still fill it also still holds its
//! aggregate's row lock, so nothing of that aggregate can be behind it.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet, VecDeque},
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};

/// How long after its death a gap is looked at once more. Nothing should be there; if something is, it
/// is published late and an alarm is raised.
pub const SECOND_LOOK: Duration = Duration::from_mins(1);
/// Dead gaps that wait for their second look; the oldest give way.
const MAX_DEAD_GAPS: usize = 10_000;
/// Samples of the sequence that are kept, to know which sleepers are older than a gap.
const MAX_SAMPLES: usize = 256;

/// A transaction that holds the outbox lock, by its virtual transaction id (when prepared, that of the session which
/// prepared it, and `-1/<xid>` after a restart of the server).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vxid(pub i32, pub u32);

/// Who holds the outbox lock, as seen in one look at `pg_locks`.
#[derive(Clone, Debug)]
pub struct Holder {
    /// Which transaction.
    pub vxid: Vxid,
    /// It was prepared (two-phase commit): no session has it, the lock stays.
    pub prepared: bool,
    /// Since when it has done nothing: idle in transaction, or prepared. None when it is busy or the
    /// relay's role may not see it.
    pub asleep_since: Option<DateTime<Utc>>,
    /// When it began. None when prepared or not to be seen.
    pub began: Option<DateTime<Utc>>,
}

/// The sequence's mark at a time, both by the server.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// A time before the mark was read.
    pub before: DateTime<Utc>,
    /// The last position handed out.
    pub last_value: i64,
    /// A time after the mark was read.
    pub after: DateTime<Utc>,
}

#[derive(Clone, Debug)]
struct Gap {
    to: i64,
    /// Who may still fill it; None until the first look after it was seen.
    suspects: Option<BTreeSet<Vxid>>,
}

#[derive(Debug)]
struct DeadGap {
    from: i64,
    to: i64,
    due: Instant,
}

/// What a read did to the positions.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ReadResult {
    /// Positions that are new and now unsettled, in order.
    pub fresh: Vec<i64>,
    /// Those of them that were already given up: an alarm.
    pub late: Vec<i64>,
    /// How many missing positions were given up as rolled back.
    pub died: i64,
}

/// Everything the relay remembers about positions. Bounded by gaps and by what is in flight; lost with
/// the database connection on purpose, since after a crash or failover the server may hand out
/// positions again that this memory takes for settled.
#[derive(Debug)]
pub struct Positions {
    high: i64,
    gaps: BTreeMap<i64, Gap>,
    unsettled: BTreeSet<i64>,
    dead_gaps: VecDeque<DeadGap>,
    samples: VecDeque<Sample>,
    prepared: HashSet<Vxid>,
}

impl Positions {
    /// Continues from what is stored: the last position read, and the open ranges (inclusive) below it.
    pub fn restore(high: i64, open: impl IntoIterator<Item = (i64, i64)>) -> Self {
        let gaps = open.into_iter().map(|(from, to)| (from, Gap { to, suspects: None })).collect();
        Self {
            high,
            gaps,
            unsettled: BTreeSet::new(),
            dead_gaps: VecDeque::new(),
            samples: VecDeque::new(),
            prepared: HashSet::new(),
        }
    }

    /// The last position read.
    pub fn high(&self) -> i64 {
        self.high
    }

    /// Everything at or below is settled.
    pub fn low_water(&self) -> i64 {
        let gap = self.gaps.keys().next().copied();
        let unsettled = self.unsettled.first().copied();
        gap.into_iter().chain(unsettled).min().map_or(self.high, |first| first - 1)
    }

    /// How many stretches of positions are missing.
    pub fn gaps(&self) -> usize {
        self.gaps.len()
    }

    /// Whether a look at the lock's holders would tell anything.
    pub fn wants_look(&self) -> bool {
        !self.gaps.is_empty()
    }

    /// Remembers the sequence's mark, for gaps to come.
    pub fn sample(&mut self, sample: Sample) {
        if self.samples.back().is_some_and(|last| last.last_value == sample.last_value) {
            // The later time says more: a sleeper since then is a sleeper of this mark too.
            self.samples.pop_back();
        }
        self.samples.push_back(sample);
        if self.samples.len() > MAX_SAMPLES {
            // Thin out the old half: the past is needed, but not in detail.
            let keep = self.samples.len() / 2;
            let mut n = 0;
            self.samples.retain(|_| {
                n += 1;
                n > keep || n % 2 == 0
            });
        }
    }

    /// Takes in who holds the outbox lock. To be called with what was seen *before* the next read: a gap
    /// without suspects now, and still missing in that read, is dead.
    pub fn look(&mut self, holders: &[Holder]) {
        let holding: BTreeSet<Vxid> = holders.iter().map(|h| h.vxid).collect();
        let prepared: HashSet<Vxid> = holders.iter().filter(|h| h.prepared).map(|h| h.vxid).collect();
        for (&from, gap) in &mut self.gaps {
            match &mut gap.suspects {
                None => {
                    let suspects = holders.iter().filter(|h| may_fill(h, from, gap.to, &self.samples));
                    gap.suspects = Some(suspects.map(|h| h.vxid).collect());
                }
                Some(suspects) => {
                    let before = suspects.len();
                    suspects.retain(|vxid| holding.contains(vxid));
                    if suspects.len() < before {
                        // A suspect that is gone may have been prepared, which keeps its lock under
                        // another id: whoever was prepared since the last look inherits the suspicion.
                        suspects.extend(prepared.difference(&self.prepared));
                    }
                }
            }
        }
        self.prepared = prepared;
    }

    /// The ranges (inclusive) to be read besides everything above `high`: gaps, and dead gaps that are due.
    pub fn missing(&self, now: Instant) -> (Vec<i64>, Vec<i64>) {
        let dead_gaps = self.dead_gaps.iter().take_while(|g| g.due <= now).map(|g| (g.from, g.to));
        let mut ranges: Vec<(i64, i64)> =
            self.gaps.iter().map(|(&from, gap)| (from, gap.to)).chain(dead_gaps).collect();
        ranges.sort_unstable();
        ranges.into_iter().unzip()
    }

    /// Takes in what a read found, in order of position. `covered`: the read saw everything visible up
    /// to there. `now`: the time that [`missing`](Self::missing) was asked with.
    pub fn take(&mut self, found: impl IntoIterator<Item = i64>, covered: i64, now: Instant) -> ReadResult {
        let mut taken = ReadResult::default();
        for position in found {
            if position > self.high {
                if position > self.high + 1 {
                    self.gaps.insert(self.high + 1, Gap { to: position - 1, suspects: None });
                }
                self.high = position;
            } else if !self.fill(position) {
                if self.unsettled.contains(&position) {
                    continue;
                }
                taken.late.push(position);
            }
            self.unsettled.insert(position);
            taken.fresh.push(position);
        }
        // Dead gaps that were due had their second look.
        while self.dead_gaps.front().is_some_and(|g| g.due <= now && g.to <= covered) {
            self.dead_gaps.pop_front();
        }
        let dead: Vec<i64> = self
            .gaps
            .iter()
            .filter(|(_, gap)| gap.to <= covered && gap.suspects.as_ref().is_some_and(BTreeSet::is_empty))
            .map(|(&from, _)| from)
            .collect();
        for from in dead {
            if let Some(gap) = self.gaps.remove(&from) {
                taken.died += gap.to - from + 1;
                self.dead_gaps.push_back(DeadGap { from, to: gap.to, due: now + SECOND_LOOK });
            }
        }
        while self.dead_gaps.len() > MAX_DEAD_GAPS {
            self.dead_gaps.pop_front();
        }
        taken
    }

    /// Removes a position from its gap; false when it is in none.
    fn fill(&mut self, position: i64) -> bool {
        let Some((&from, gap)) = self.gaps.range(..=position).next_back() else { return false };
        if gap.to < position {
            return false;
        }
        let Some(Gap { to, suspects }) = self.gaps.remove(&from) else { return false };
        if position < to {
            self.gaps.insert(position + 1, Gap { to, suspects: suspects.clone() });
        }
        if from < position {
            self.gaps.insert(from, Gap { to: position - 1, suspects });
        }
        true
    }

    /// The event at `position` is confirmed, set aside or dropped.
    pub fn settle(&mut self, position: i64) {
        self.unsettled.remove(&position);
    }

    /// How many events are in memory, read and not settled.
    pub fn unsettled(&self) -> usize {
        self.unsettled.len()
    }

    /// What to store: `high` and the open ranges (inclusive) below it, at most `cap` of them. Beyond the
    /// cap `high` is set back to before the first range that is left out: a restart then repeats more
    /// and forgets nothing.
    pub fn open(&self, cap: usize) -> (i64, Vec<(i64, i64)>) {
        let mut all: Vec<(i64, i64)> = self
            .gaps
            .iter()
            .map(|(&from, gap)| (from, gap.to))
            .chain(self.unsettled.iter().map(|&p| (p, p)))
            .collect();
        all.sort_unstable();
        let mut ranges: Vec<(i64, i64)> = Vec::new();
        for (from, to) in all {
            let full = ranges.len() == cap;
            match ranges.last_mut() {
                Some(last) if last.1 + 1 == from => last.1 = to,
                _ if full => return (from - 1, ranges),
                _ => ranges.push((from, to)),
            }
        }
        (self.high, ranges)
    }
}

/// Whether a holder may be the one who took a position of this gap.
fn may_fill(holder: &Holder, from: i64, to: i64, samples: &VecDeque<Sample>) -> bool {
    // It has slept since before the first of these positions existed. Without this rule a single idle
    // appender would be a suspect of every rollback after it.
    let older = samples.iter().rev().find(|s| s.last_value < from);
    let slept = matches!((holder.asleep_since, older), (Some(since), Some(sample)) if since < sample.before);
    // It began after the last of these positions existed.
    let newer = samples.iter().find(|s| s.last_value >= to);
    let late = matches!((holder.began, newer), (Some(began), Some(sample)) if began > sample.after);
    !slept && !late
}
