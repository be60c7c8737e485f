//! What a subscriber should have: of each aggregate at least what the outbox had when the comparison came to it, and no
//! more than the outbox has afterwards.
//!
//! The aggregates of a type are read page by page from the outbox, and the same part of the key from the inbox. An
//! aggregate that differs is looked at again: in the outbox at once, and in the inbox at the end, until the subscriber has
//! caught up. The two databases may sort texts differently: then more aggregates are looked up one by one, and the result
//! is the same.

use std::collections::BTreeMap;

use daemon::progress::Progress;
use serde::Serialize;

use super::snapshot::{Inbox, InboxSide, OutboxSide, PAGE, Versions};

/// How many aggregates that are behind are remembered, to be looked at again. Further ones count as behind.
const REMEMBERED: usize = 100_000;

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

/// What both sides have of a type, as of the last look at each aggregate.
#[derive(Debug, Serialize)]
pub(super) struct Totals {
    pub(super) aggregate_type: String,
    pub(super) aggregates: i64,
    pub(super) versions: i64,
    pub(super) applied: i64,
    pub(super) applied_versions: i64,
}

impl Totals {
    /// Replaces what is known of an aggregate in the outbox. Versions are summed up modulo 2^63.
    fn outbox(&mut self, before: Option<i64>, now: Option<i64>) {
        replace(&mut self.aggregates, &mut self.versions, before, now);
    }

    /// Replaces what is known of an aggregate in the inbox.
    fn inbox(&mut self, before: Option<i64>, now: Option<i64>) {
        replace(&mut self.applied, &mut self.applied_versions, before, now);
    }
}

fn replace(count: &mut i64, versions: &mut i64, before: Option<i64>, now: Option<i64>) {
    *count += i64::from(now.is_some()) - i64::from(before.is_some());
    *versions =
        versions.wrapping_sub(before.unwrap_or_default()).wrapping_add(now.unwrap_or_default()) & i64::MAX;
}

/// What came of a comparison. Bounded, whatever is wrong: everything is counted, and some of what is
/// wrong is named.
#[derive(Debug)]
pub(super) struct Findings {
    pub(super) types: Vec<Totals>,
    pub(super) named: Vec<DifferingAggregate>,
    /// Into how many parts the aggregates were divided.
    pub(super) pages: usize,
    /// In how many of them something differed at the first look.
    pub(super) differed: usize,
    counts: [u64; Difference::ALL.len()],
    pub(super) limit: usize,
}

impl Findings {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            types: Vec::new(),
            named: Vec::new(),
            pages: 0,
            differed: 0,
            counts: Default::default(),
            limit,
        }
    }

    pub(super) fn of(&self, difference: Difference) -> u64 {
        self.counts[difference as usize]
    }

    pub(super) fn wrong(&self) -> u64 {
        self.counts.iter().sum::<u64>() - self.of(Difference::Retired)
    }

    fn add(&mut self, aggregate: DifferingAggregate) {
        self.counts[aggregate.difference as usize] += 1;
        if aggregate.difference == Difference::Retired {
            return;
        }
        // The first ones by their ids, whatever was found first.
        let at = self.named.partition_point(|named| named.aggregate < aggregate.aggregate);
        if at < self.limit {
            self.named.insert(at, aggregate);
            self.named.truncate(self.limit);
        }
    }
}

/// The comparison of a type's aggregates.
pub(super) struct TypeComparison<'a> {
    pub(super) type_: &'a str,
    pub(super) inbox_of: &'a Inbox,
    totals: Totals,
    /// Those that the subscriber had not reached, with what the outbox had, and what the subscriber has.
    behind: BTreeMap<String, (i64, Option<i64>)>,
    pages: usize,
    differed: usize,
    /// What will not become right by itself, as far as the limit of names goes, and the counts.
    wrong: Findings,
}

impl<'a> TypeComparison<'a> {
    pub(super) fn new(type_: &'a str, inbox_of: &'a Inbox, limit: usize) -> Self {
        let totals = Totals {
            aggregate_type: type_.to_owned(),
            aggregates: 0,
            versions: 0,
            applied: 0,
            applied_versions: 0,
        };
        Self {
            type_,
            inbox_of,
            totals,
            behind: BTreeMap::new(),
            pages: 0,
            differed: 0,
            wrong: Findings::new(limit),
        }
    }

    /// How many aggregates the subscriber has not reached.
    pub(super) fn behind(&self) -> usize {
        self.behind.len()
    }

    /// Goes through both sides, of which a page each is in memory.
    pub(super) async fn run(
        &mut self,
        outbox: &mut OutboxSide,
        inbox: &mut InboxSide,
        progress: &Progress,
    ) -> anyhow::Result<()> {
        let all = inbox.count(self.inbox_of, self.type_).await?.unsigned_abs();
        progress.step(format!("comparing {}", escape::line(self.type_)), "aggregate");
        // Up to where each side was read. The inbox's end never goes back, in its own order.
        let (mut read, mut reached): (Option<String>, Option<String>) = (None, None);
        loop {
            let page = outbox.page(self.type_, read.as_deref()).await?;
            let end = page.last().map(|(id, _)| id.clone());
            let end = end.filter(|_| page.len() == PAGE);
            self.pages += 1;
            self.part(page, outbox, inbox, (reached.as_deref(), end.as_deref())).await?;
            let compared = self.totals.aggregates.max(self.totals.applied).unsigned_abs();
            progress.at(compared, all.max(compared));
            let Some(end) = end else { return Ok(()) };
            reached = Some(inbox.later(reached, &end).await?);
            read = Some(end);
        }
    }

    /// Compares a page of the outbox with the same part of the inbox.
    async fn part(
        &mut self,
        page: Vec<(String, i64)>,
        outbox: &mut OutboxSide,
        inbox: &mut InboxSide,
        (after, end): (Option<&str>, Option<&str>),
    ) -> anyhow::Result<()> {
        let mut published: Versions = page.into_iter().collect();
        for version in published.values() {
            self.totals.outbox(None, Some(*version));
        }
        let mut after = after.map(str::to_owned);
        let mut differs = false;
        loop {
            let rows = inbox.page(self.inbox_of, self.type_, (after.as_deref(), end)).await?;
            let last = rows.last().map(|(id, _)| id.clone()).filter(|_| rows.len() == PAGE);
            let mut later = Versions::new();
            for (id, applied) in rows {
                self.totals.inbox(None, Some(applied));
                match published.get(&id) {
                    Some(version) if *version == applied => drop(published.remove(&id)),
                    Some(version) if *version > applied => {
                        let version = *version;
                        published.remove(&id);
                        differs = true;
                        self.is_behind(id, version, Some(applied));
                    }
                    // The outbox had less, or nothing: what does it have now?
                    _ => drop(later.insert(id, applied)),
                }
            }
            differs |= !later.is_empty();
            self.is_later(later, &mut published, outbox).await?;
            match last {
                Some(last) => after = Some(last),
                None => break,
            }
        }
        // What the inbox lacks here, it may have elsewhere in its own order.
        let missing: Vec<&str> = published.keys().map(String::as_str).collect();
        let elsewhere = inbox.of(self.inbox_of, self.type_, &missing).await?;
        let mut later = Versions::new();
        for (id, version) in &published {
            match elsewhere.get(id) {
                Some(applied) if applied == version => {}
                Some(applied) if applied > version => drop(later.insert(id.clone(), *applied)),
                applied => {
                    differs = true;
                    self.is_behind(id.clone(), *version, applied.copied());
                }
            }
        }
        differs |= !later.is_empty();
        self.is_later(later, &mut published, outbox).await?;
        self.differed += usize::from(differs);
        Ok(())
    }

    /// The subscriber has later versions than the outbox had. The outbox has at least these now, or never had them.
    async fn is_later(
        &mut self,
        later: Versions,
        published: &mut Versions,
        outbox: &mut OutboxSide,
    ) -> anyhow::Result<()> {
        if later.is_empty() {
            return Ok(());
        }
        let ids: Vec<&str> = later.keys().map(String::as_str).collect();
        let now = outbox.of(self.type_, &ids).await?;
        for (id, applied) in &later {
            let before = published.remove(id);
            let version = now.get(id).copied();
            if before.is_some() {
                self.totals.outbox(before, version.or(before));
            }
            let difference = match version {
                None => Difference::Unknown,
                Some(version) if version < *applied => Difference::Ahead,
                Some(_) => continue,
            };
            self.add(id, difference, Some(*applied), version);
        }
        Ok(())
    }

    fn is_behind(&mut self, id: String, version: i64, applied: Option<i64>) {
        if self.behind.len() < REMEMBERED {
            self.behind.insert(id, (version, applied));
        } else {
            let difference = if applied.is_some() { Difference::Behind } else { Difference::Missing };
            self.add(&id, difference, applied, Some(version));
        }
    }

    fn add(&mut self, id: &str, difference: Difference, applied: Option<i64>, version: Option<i64>) {
        let aggregate = format!("{}/{id}", self.type_);
        self.wrong.add(DifferingAggregate { difference, aggregate, applied, version });
    }

    /// Looks again at those that the subscriber had not reached.
    pub(super) async fn again(
        &mut self,
        outbox: &mut OutboxSide,
        inbox: &mut InboxSide,
    ) -> anyhow::Result<()> {
        let behind: Vec<String> = self.behind.keys().cloned().collect();
        for ids in behind.chunks(PAGE) {
            let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
            let now = inbox.of(self.inbox_of, self.type_, &ids).await?;
            let mut later = Versions::new();
            let mut published = Versions::new();
            for id in ids {
                let (Some(applied), Some((version, before))) =
                    (now.get(id).copied(), self.behind.get(id).copied())
                else {
                    continue;
                };
                self.totals.inbox(before, Some(applied));
                if applied < version {
                    self.behind.insert(id.to_owned(), (version, Some(applied)));
                    continue;
                }
                self.behind.remove(id);
                if applied > version {
                    later.insert(id.to_owned(), applied);
                    published.insert(id.to_owned(), version);
                }
            }
            self.is_later(later, &mut published, outbox).await?;
        }
        Ok(())
    }

    /// The result. Of what the outbox does not know, nobody can tell where history is `retired`.
    pub(super) fn end(mut self, retired: bool, findings: &mut Findings) {
        for (id, (version, applied)) in std::mem::take(&mut self.behind) {
            let difference = if applied.is_some() { Difference::Behind } else { Difference::Missing };
            self.add(&id, difference, applied, Some(version));
        }
        let mut wrong = self.wrong;
        if retired {
            wrong.counts[Difference::Retired as usize] =
                std::mem::take(&mut wrong.counts[Difference::Unknown as usize]);
            wrong.named.retain(|aggregate| aggregate.difference != Difference::Unknown);
        }
        for (count, more) in findings.counts.iter_mut().zip(wrong.counts) {
            *count += more;
        }
        let free = findings.limit.saturating_sub(findings.named.len());
        findings.named.extend(wrong.named.into_iter().take(free));
        findings.pages += self.pages;
        findings.differed += self.differed;
        findings.types.push(self.totals);
    }
}
