//! `digest`: what the outbox has, summed up; and, with a subscriber's inbox, whether the subscriber has it.

mod compare;
mod snapshot;

use std::{
    collections::BTreeSet,
    fmt::Write,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail};
use daemon::{config::database, progress::Progress};
use serde_json::json;

use self::{
    compare::{Difference, Findings, TypeComparison},
    snapshot::{Inbox, InboxSide, OutboxSide},
};
use super::{CommandArgs, Verdict, connect, left_behind::LeftBehind, many};

/// A digest is one pass over everything.
const STATEMENT_TIMEOUT: Duration = Duration::from_mins(10);
/// A subscriber that is behind is asked again after this, and after longer where an answer takes longer.
const PAUSE: Duration = Duration::from_millis(500);

/// Settings of `digest`.
#[derive(Debug, clap::Args)]
pub struct DigestArgs {
    /// The database, and the form of the answer.
    #[command(flatten)]
    pub common: CommandArgs,
    /// The number of buckets into which a hash of their ids divides the aggregates of a type. A comparison takes pages
    /// instead.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=65536))]
    pub buckets: Option<i32>,
    /// Only aggregates of this type; may be repeated. Without it, a comparison takes the types that the subscriber has.
    #[arg(long, value_name = "TYPE")]
    pub aggregate_type: Vec<String>,
    /// Compare with what this consumer has applied, by its name in its inbox, or by the name of one that it has
    /// replaced.
    #[arg(long, value_name = "NAME")]
    pub consumer: Option<String>,
    /// A file that holds the PostgreSQL URL of the consumer's inbox, instead of the variable
    /// `INBOX_DATABASE_URL`. Its role needs what `inbox.grant_reader` grants.
    #[arg(long, env = "INBOX_DATABASE_URL_FILE", value_name = "PATH")]
    pub inbox_database_url_file: Option<PathBuf>,
    /// How long the consumer may take, once all aggregates are compared, to get what the outbox had.
    #[arg(long, default_value = "10s", value_parser = daemon::config::duration, value_name = "DURATION")]
    pub wait: Duration,
    /// The most aggregates to name.
    #[arg(long, default_value = "20", value_name = "N")]
    pub limit: usize,
}

/// Prints the outbox's digest, or compares it with a consumer's.
pub async fn digest(args: &DigestArgs) -> anyhow::Result<Verdict> {
    let Some(asked) = &args.consumer else { return print(args).await };
    let compared = compare(args, asked).await?;
    let agrees = compared.agrees();
    let Compared { consumer, source, findings, left } = compared;
    let document = json!({
        "source": source, "consumer": consumer, "agrees": agrees, "types": findings.types,
        "buckets": findings.pages, "gone_through": findings.differed,
        "behind": findings.of(Difference::Behind), "missing": findings.of(Difference::Missing),
        "ahead": findings.of(Difference::Ahead), "unknown": findings.of(Difference::Unknown),
        "retired": findings.of(Difference::Retired), "named": findings.named,
        "not_begun": left.behind.len(), "lost": left.lost.len(),
    });
    let name = if *asked == consumer {
        consumer.clone()
    } else {
        format!("{consumer}, which has replaced {asked},")
    };
    args.common.answer(&document, || text(&findings, &left, &name, &source))?;
    Ok(if agrees { Verdict::Ok } else { Verdict::Attention })
}

/// What a comparison came to.
pub(super) struct Compared {
    consumer: String,
    pub(super) source: String,
    findings: Findings,
    left: LeftBehind,
}

impl Compared {
    /// Whether the consumer has what the outbox has, and nothing else.
    pub(super) fn agrees(&self) -> bool {
        self.wrong() == 0
    }

    /// How many aggregates differ.
    pub(super) fn wrong(&self) -> i64 {
        wrong(&self.findings, &self.left)
    }
}

/// Compares with a consumer, by its name or that of one that it has replaced.
pub(super) async fn compare(args: &DigestArgs, asked: &str) -> anyhow::Result<Compared> {
    let inbox = database::options(
        "INBOX_DATABASE_URL",
        args.inbox_database_url_file.as_ref(),
        "outbox-relay digest",
        STATEMENT_TIMEOUT,
    )?;
    let mut outbox = OutboxSide::new(connect(&args.common, "digest", STATEMENT_TIMEOUT).await?).await?;
    let mut inbox = InboxSide::new(CommandArgs::reach_at(inbox).await.context("the inbox")?).await?;
    let consumer = inbox.current(asked).await?;
    let source = outbox.source().await?;
    let inbox_of = Inbox { consumer: consumer.clone(), source: source.clone() };
    let comparison = Comparison { args, inbox_of };
    let progress = Progress::new("comparing", "aggregate");
    let findings = comparison.settle(&mut outbox, &mut inbox, &progress).await?;
    let left = comparison.left_behind(&mut outbox, &mut inbox).await?;
    Ok(Compared { consumer, source, findings, left })
}

fn wrong(findings: &Findings, left: &LeftBehind) -> i64 {
    let left = i64::try_from(left.behind.len() + left.lost.len()).unwrap_or(i64::MAX);
    i64::try_from(findings.wrong()).unwrap_or(i64::MAX).saturating_add(left)
}

/// The outbox's own.
async fn print(args: &DigestArgs) -> anyhow::Result<Verdict> {
    let mut conn = connect(&args.common, "digest", STATEMENT_TIMEOUT).await?;
    let progress = Progress::new("summing up all events", "aggregate");
    let source = snapshot::source(&mut conn).await?;
    let buckets = args.buckets.unwrap_or(1);
    let mut digest = snapshot::digest(&mut conn, buckets).await?;
    drop(progress);
    if !args.aggregate_type.is_empty() {
        digest.retain(|(type_, _), _| args.aggregate_type.contains(type_));
    }
    let rows: Vec<_> = digest
        .iter()
        .map(|((type_, bucket), sums)| {
            json!({"aggregate_type": type_, "bucket": bucket, "aggregates": sums.aggregates,
                   "versions": sums.versions, "hash": sums.hash()})
        })
        .collect();
    args.common.answer(&json!({"source": source, "buckets": buckets, "digest": rows}), || {
        let mut text = format!("{source}\n");
        for ((type_, bucket), sums) in &digest {
            let part = if buckets > 1 { format!(", bucket {bucket}") } else { String::new() };
            let aggregates = many(sums.aggregates, "aggregate");
            let _ = writeln!(
                text,
                "  {}{part}: {aggregates}, versions {}, hash {}",
                escape::line(type_),
                sums.versions,
                sums.hash()
            );
        }
        if digest.is_empty() {
            text.push_str("  no events\n");
        }
        text
    })?;
    Ok(Verdict::Ok)
}

struct Comparison<'a> {
    args: &'a DigestArgs,
    inbox_of: Inbox,
}

impl Comparison<'_> {
    /// Compares the consumer's inbox with the outbox, and asks it again while it is behind.
    async fn settle(
        &self,
        outbox: &mut OutboxSide,
        inbox: &mut InboxSide,
        progress: &Progress,
    ) -> anyhow::Result<Findings> {
        let types = self.types(outbox, inbox).await?;
        let mut compared = Vec::new();
        for type_ in &types {
            let mut comparison = TypeComparison::new(type_, &self.inbox_of, self.args.limit);
            comparison.run(outbox, inbox, progress).await?;
            compared.push(comparison);
        }
        let deadline = Instant::now() + self.args.wait;
        let behind = |compared: &[TypeComparison<'_>]| {
            compared.iter().map(TypeComparison::behind).sum::<usize>() as u64
        };
        let first = behind(&compared);
        progress.step("looking again at what is behind", "aggregate");
        loop {
            let at = Instant::now();
            for comparison in &mut compared {
                comparison.again(outbox, inbox).await?;
            }
            let left = behind(&compared);
            progress.at(first.saturating_sub(left), first);
            self.is_still(outbox).await?;
            if left == 0 || Instant::now() >= deadline {
                break;
            }
            let pause = PAUSE.max(at.elapsed()).min(deadline.saturating_duration_since(Instant::now()));
            tokio::time::sleep(pause).await;
        }
        let retired = outbox.is_retired().await?;
        let mut findings = Findings::new(self.args.limit);
        for comparison in compared {
            comparison.end(retired, &mut findings);
        }
        Ok(findings)
    }

    /// Fails when the source has begun another incarnation since.
    async fn is_still(&self, outbox: &mut OutboxSide) -> anyhow::Result<()> {
        let now = outbox.source().await?;
        if now != self.inbox_of.source {
            bail!("the source became {now} meanwhile, and its chains begin again: run this again");
        }
        Ok(())
    }

    /// The types to compare: those that were told, or those that the consumer has any of.
    async fn types(
        &self,
        outbox: &mut OutboxSide,
        inbox: &mut InboxSide,
    ) -> anyhow::Result<BTreeSet<String>> {
        let told = &self.args.aggregate_type;
        if !told.is_empty() {
            return Ok(told.iter().cloned().collect());
        }
        let deadline = Instant::now() + self.args.wait;
        loop {
            let types = inbox.types(&self.inbox_of).await?;
            if !types.is_empty() || !outbox.has_events().await? {
                return Ok(types.into_iter().collect());
            }
            let known = inbox.sources().await?;
            if !self.begins_anew(&known) || Instant::now() >= deadline {
                return Err(self.no_inbox(&known));
            }
            tokio::time::sleep(PAUSE.min(deadline.saturating_duration_since(Instant::now()))).await;
            self.is_still(outbox).await?;
        }
    }

    /// What the consumer still has of earlier incarnations of the source. There is none before the second one.
    async fn left_behind(
        &self,
        outbox: &mut OutboxSide,
        inbox: &mut InboxSide,
    ) -> anyhow::Result<LeftBehind> {
        let source = outbox.incarnation().await?;
        if source.incarnation == 1 {
            return Ok(LeftBehind::default());
        }
        LeftBehind::look(outbox.conn(), inbox.conn(), &self.inbox_of.consumer, &source).await
    }

    /// Whether the consumer has what the source published as an earlier incarnation: then it is behind.
    fn begins_anew(&self, known: &[Inbox]) -> bool {
        let name = |source: &str| source.split('~').next().map(str::to_owned);
        known.iter().any(|known| {
            known.consumer == self.inbox_of.consumer && name(&known.source) == name(&self.inbox_of.source)
        })
    }

    /// An inbox without a row of the source agrees with anything.
    fn no_inbox(&self, known: &[Inbox]) -> anyhow::Error {
        let Inbox { consumer, source } = &self.inbox_of;
        let there: Vec<String> = known
            .iter()
            .map(|known| format!("{} of {}", escape::line(&known.consumer), escape::line(&known.source)))
            .collect();
        let ask = |known: &&Inbox| known.source == *source;
        let ask = known
            .iter()
            .find(ask)
            .map(|known| format!("ask for --consumer {}; ", escape::shell_word(&known.consumer)));
        let there = if there.is_empty() { "nothing".to_owned() } else { there.join(", ") };
        anyhow!(
            "the consumer {consumer} has received nothing of {source} in this inbox, which has: {there}; {}to have \
             it compared all the same, say of which --aggregate-type",
            ask.unwrap_or_default()
        )
    }
}

fn text(findings: &Findings, left: &LeftBehind, consumer: &str, source: &str) -> String {
    let wrong = wrong(findings, left);
    let mut text = if wrong == 0 {
        let nothing = if findings.types.is_empty() { ", which is nothing" } else { "" };
        format!("{consumer} has what {source} published{nothing}\n")
    } else {
        format!("{consumer} differs from {source} in {}\n", many(wrong, "aggregate"))
    };
    for type_ in &findings.types {
        let (here, there) = (many(type_.aggregates, "aggregate"), many(type_.applied, "aggregate"));
        let _ = writeln!(
            text,
            "  {}: {here} with versions {} in the outbox, {there} with versions {} in the inbox",
            escape::line(&type_.aggregate_type),
            type_.versions,
            type_.applied_versions
        );
    }
    for (title, aggregates) in
        [("not begun anew", &left.behind), ("without a baseline, or of the lost time", &left.lost)]
    {
        if !aggregates.is_empty() {
            let count = many(i64::try_from(aggregates.len()).unwrap_or(i64::MAX), "aggregate");
            let _ = writeln!(text, "{title}: {count}");
            for aggregate in aggregates.iter().take(findings.limit) {
                let _ = writeln!(text, "  {}", escape::line(&aggregate.text()));
            }
            text.push_str("  -> outbox-relay recover --consumer NAME leads through it\n");
        }
    }
    let mut differences =
        Difference::ALL.into_iter().filter(|difference| findings.of(*difference) > 0).peekable();
    while let Some(difference) = differences.next() {
        let count = findings.of(difference);
        let _ = writeln!(
            text,
            "{}: {}",
            difference.title(),
            many(i64::try_from(count).unwrap_or(i64::MAX), "aggregate")
        );
        for aggregate in findings.named.iter().filter(|aggregate| aggregate.difference == difference) {
            let _ = writeln!(text, "  {}", escape::line(&aggregate.text()));
        }
        // Said once where it is the same.
        if differences.peek().is_none_or(|next| next.advice() != difference.advice()) {
            let _ = writeln!(text, "  -> {}", difference.advice());
        }
    }
    text
}
