//! `digest`: sums up what a read model has received, like `outbox-relay digest` at its source.

use std::{fmt::Write, time::Duration};

use anyhow::Context;
use daemon::progress::Progress;
use serde_json::json;

use crate::command::{CommandArgs, Verdict, WhichModel, connect, many};

/// The timeout of a digest, which reads all rows of a consumer.
const STATEMENT_TIMEOUT: Duration = Duration::from_mins(10);

/// Settings of `digest`.
#[derive(Debug, clap::Args)]
pub struct DigestArgs {
    /// The database and the output format.
    #[command(flatten)]
    pub common: CommandArgs,
    /// The number of parts into which the aggregates of a type are divided, by a hash of their ids.
    #[arg(long, default_value = "1", value_name = "N", value_parser = clap::value_parser!(i32).range(1..=65536))]
    pub buckets: i32,
    /// The read model.
    #[command(flatten)]
    pub which: WhichModel,
}

/// Prints the digest of each source that the read model follows.
pub async fn digest(args: &DigestArgs) -> anyhow::Result<Verdict> {
    let (mut conn, consumer) = connect(&args.common, "digest", args.which, STATEMENT_TIMEOUT).await?;
    let progress = Progress::new("summing up what was received", "aggregate");
    let digests =
        inbox::digest(&mut conn, &consumer, args.buckets).await.context("the inbox could not be read")?;
    drop(progress);
    let hash = |digest: &inbox::Digest| format!("{:016x}", digest.hash.cast_unsigned());
    let rows: Vec<_> = digests
        .iter()
        .map(|digest| {
            json!({"source": digest.source, "aggregate_type": digest.aggregate_type, "bucket": digest.bucket,
                   "aggregates": digest.aggregates, "versions": digest.versions, "hash": hash(digest)})
        })
        .collect();
    args.common.answer(&json!({"consumer": consumer, "buckets": args.buckets, "digest": rows}), || {
        let mut text = format!("consumer {consumer}\n");
        let mut source = None;
        for digest in &digests {
            if source.replace(&digest.source) != Some(&digest.source) {
                let _ = writeln!(text, "{}", escape::line(&digest.source));
            }
            let part = if args.buckets > 1 { format!(", bucket {}", digest.bucket) } else { String::new() };
            let (type_, aggregates) =
                (escape::line(&digest.aggregate_type), many(digest.aggregates, "aggregate"));
            let _ = writeln!(
                text,
                "  {type_}{part}: {aggregates}, versions {}, hash {}",
                digest.versions,
                hash(digest)
            );
        }
        if digests.is_empty() {
            text.push_str("nothing was received\n");
        }
        text
    })?;
    Ok(Verdict::Ok)
}
