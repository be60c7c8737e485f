//! `recover`: leads through what is to be done after the database went back in time, and says when it is done.
//!
//! A restore from a backup, or a failover that lost commits, leaves subscribers with state that the database does not
//! have. They begin anew under a new incarnation of the source, with a baseline of each aggregate. What is left then at a
//! subscriber without a chain in the new incarnation, and unknown to the database, was made in the lost time: it is ended.

mod database;
mod sequence;
mod step;
mod subscriber;

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, bail};
use daemon::config;
use outbox::Source;
use serde_json::json;
use sqlx::PgConnection;

use self::{
    database::Overview,
    step::{Step, Steps},
};
use super::{
    CommandArgs, Verdict, connect,
    digest::{self, DigestArgs},
    left_behind::{LeftBehind, current_consumer, newest_known},
    many,
    new_incarnation::{TakeOver, begin, taken_over},
    time,
};

/// Some of it is one pass over all events.
const STATEMENT_TIMEOUT: Duration = Duration::from_mins(10);

/// Settings of `recover`.
#[derive(Debug, clap::Args)]
pub struct RecoverArgs {
    /// The database, with the role that owns the schema, and the form of the answer.
    #[command(flatten)]
    pub common: CommandArgs,
    /// A subscriber with an inbox, by its name there: what it still has of the lost time. Go through all of them, one
    /// after the other.
    #[arg(long, value_name = "NAME")]
    pub consumer: Option<String>,
    /// A file that holds the PostgreSQL URL of the consumer's inbox, instead of the variable `INBOX_DATABASE_URL`. Its
    /// role needs what `inbox.grant_reader` grants.
    #[arg(long, env = "INBOX_DATABASE_URL_FILE", value_name = "PATH")]
    pub inbox_database_url_file: Option<PathBuf>,
    /// Begin a new incarnation, if the database is not where it was. With --sequence: set the sequence right.
    #[arg(long)]
    pub yes: bool,
    /// Only the sequence outbox.position: whether it stands behind what is stored or published, and what was written
    /// meanwhile. With --yes it is set to the highest position in use, and what was written meanwhile is published.
    #[arg(long, conflicts_with_all = ["above", "nothing_lost", "consumer", "lost"])]
    pub sequence: bool,
    /// With --sequence: events below this position were published, whatever they look like.
    #[arg(long, requires = "sequence", value_name = "POSITION", value_parser = clap::value_parser!(i64).range(1..))]
    pub from: Option<i64>,
    /// With --yes: the incarnation that the new one follows, where it is not this database's present one. With
    /// --consumer, it is the newest one that the consumer knows.
    #[arg(long, requires = "yes", value_name = "INCARNATION", value_parser = clap::value_parser!(i64).range(1..))]
    pub above: Option<i64>,
    /// No commit was lost, so nothing is to be recovered: the place where the database is now is the known one.
    #[arg(long, conflicts_with_all = ["yes", "lost", "consumer"])]
    pub nothing_lost: bool,
    /// End the aggregates that the consumer has and this database does not: so many as were listed.
    #[arg(long, requires = "consumer", value_name = "COUNT", value_parser = clap::value_parser!(i64).range(1..))]
    pub lost: Option<i64>,
    /// How long the relay and the consumer may take to get on with what is there now.
    #[arg(long, default_value = "30s", value_parser = daemon::config::duration, value_name = "DURATION")]
    pub wait: Duration,
    /// The most aggregates to name.
    #[arg(long, default_value = "20", value_name = "N")]
    pub limit: usize,
}

/// Says what was found, does the step that was asked for, and says what is next. Exit code 0 only once nothing is left.
pub async fn recover(args: &RecoverArgs) -> anyhow::Result<Verdict> {
    let mut conn = connect(&args.common, "recover", STATEMENT_TIMEOUT).await?;
    if args.nothing_lost {
        return nothing_lost(&mut conn, args).await;
    }
    let mut overview = Overview::read(&mut conn).await?;
    let mut steps = Steps::default();
    // First: nothing can be published before the sequence is right.
    let is_behind = overview.last_position < overview.used_position;
    if args.sequence || is_behind {
        steps.push(sequence::step(&mut conn, args, &overview).await?);
    } else if overview.elsewhere && args.yes {
        let above = match (args.above, &args.consumer) {
            (None, Some(consumer)) => newest(args, consumer, &overview.source).await?,
            (above, _) => above,
        };
        begin(&mut conn, above).await?;
        overview = Overview::read(&mut conn).await?;
    }
    if args.sequence || is_behind {
        if steps.is_finished() && overview.elsewhere {
            steps.push(Step::next(
                "incarnation",
                "the database is not where it was, so commits may have been lost",
                "run: outbox-relay recover",
            ));
        }
    } else if overview.source.incarnation == 1 && !overview.elsewhere {
        steps.push(Step::done(
            "database",
            format!(
                "it is where it was when {} was installed here, so nothing says that it lost commits. If you know \
                 better: outbox-relay new-incarnation --yes, and then this again",
                overview.source
            ),
        ));
        if let Some(consumer) = &args.consumer {
            steps.push(comparison(args, consumer, &overview).await?);
        }
    } else {
        walk(&mut conn, args, &overview, &mut steps).await?;
    }
    let document = json!({
        "source": overview.source.to_string(), "parent": overview.source.parent, "elsewhere": overview.elsewhere,
        "finished": steps.is_finished(), "steps": steps.all(),
    });
    args.common.answer(&document, || steps.text())?;
    Ok(if steps.is_finished() { Verdict::Ok } else { Verdict::Attention })
}

/// The newest incarnation that the consumer knows, where this database does not know it: the backup is from before it.
async fn newest(args: &RecoverArgs, consumer: &str, source: &Source) -> anyhow::Result<Option<i64>> {
    let mut inbox = inbox(args).await?;
    let consumer = current_consumer(&mut inbox, consumer).await?;
    let known = newest_known(&mut inbox, &consumer, source).await?;
    Ok(known.filter(|known| *known > source.incarnation))
}

/// Connects to the consumer's inbox.
async fn inbox(args: &RecoverArgs) -> anyhow::Result<PgConnection> {
    let file = args.inbox_database_url_file.as_ref();
    let inbox =
        config::database::options("INBOX_DATABASE_URL", file, "outbox-relay recover", STATEMENT_TIMEOUT)?;
    CommandArgs::reach_at(inbox).await.context("the inbox")
}

async fn nothing_lost(conn: &mut PgConnection, args: &RecoverArgs) -> anyhow::Result<Verdict> {
    database::stay(conn).await?;
    tracing::warn!("an operator says that this database lost no commit");
    args.common.answer(&json!({"nothing_lost": true}), || {
        "noted: the place where the database is now is the known one, and nothing is to be recovered"
            .to_owned()
    })?;
    Ok(Verdict::Ok)
}

/// One step after the other, up to the first that is not done.
async fn walk(
    conn: &mut PgConnection,
    args: &RecoverArgs,
    overview: &Overview,
    steps: &mut Steps,
) -> anyhow::Result<()> {
    let source = &overview.source;
    if overview.elsewhere {
        steps.push(Step::next(
            "incarnation",
            "the database is on another server, on another timeline of it, or is another database there: it was \
             restored, or a standby was promoted. What it published after the moment to which it went back, \
             subscribers still have",
            "if commits may have been lost, run: outbox-relay recover --consumer NAME --yes, with the URL of that \
             subscriber's inbox in INBOX_DATABASE_URL (every subscriber begins anew, with a baseline of each \
             aggregate). If none were lost: outbox-relay recover --nothing-lost",
        ));
        return Ok(());
    }
    steps.push(Step::done(
        "incarnation",
        format!(
            "{source} began {}; if the database went back in time after that: outbox-relay new-incarnation --yes",
            time(Some(overview.since))
        ),
    ));
    steps.push(match taken_over(conn, source.incarnation).await? {
        TakeOver::Done => Step::done("relay", format!("it publishes as {source}")),
        TakeOver::NoLeader => {
            Step::next("relay", "none leads", "start outbox-relay run, and then this again")
        }
        TakeOver::Late(names) => Step::next(
            "relay",
            format!("still led under the earlier incarnation: {names}"),
            "look at their /ready, and run this again",
        ),
    });
    if !steps.is_finished() {
        return Ok(());
    }
    let missing = database::without_baseline(conn).await?;
    steps.push(if missing == 0 {
        Step::done(
            "baselines",
            "every aggregate that was there when the incarnation began has an event since",
        )
    } else {
        Step::next(
            "baselines",
            format!(
                "{} of those that were there when the incarnation began have no event since",
                many(missing, "aggregate")
            ),
            "have the service append a baseline of everything that it has, and then run this again",
        )
    });
    if !steps.is_finished() {
        return Ok(());
    }
    steps.push(match database::settled(conn, overview.last_position, args.wait).await? {
        None => Step::done(
            "published",
            format!("the broker has everything up to position {}", overview.last_position),
        ),
        Some(why) => Step::next("published", why, "see outbox-relay status, and run this again"),
    });
    if !steps.is_finished() {
        return Ok(());
    }
    if let Some(consumer) = &args.consumer {
        return left_behind(conn, args, overview, consumer, steps).await;
    }
    steps.push(Step::next(
        "subscribers",
        "not looked at",
        "of each subscriber that keeps an inbox, one after the other: outbox-relay recover --consumer NAME, with \
         INBOX_DATABASE_URL. Subscribers without an inbox compare what they have with what was published",
    ));
    Ok(())
}

/// Whether the consumer has what the database has, whatever was said before: a database that was put back by hand is where
/// it was, and one that was said to have lost nothing may have.
async fn comparison(args: &RecoverArgs, consumer: &str, overview: &Overview) -> anyhow::Result<Step> {
    let digest = DigestArgs {
        common: args.common.clone(),
        buckets: None,
        aggregate_type: Vec::new(),
        consumer: Some(consumer.to_owned()),
        inbox_database_url_file: args.inbox_database_url_file.clone(),
        wait: args.wait,
        limit: args.limit,
    };
    let compared = digest::compare(&digest, consumer).await?;
    Ok(if compared.agrees() {
        Step::done(
            "comparison",
            format!("{consumer} is at the last version of everything that {} published", compared.source),
        )
    } else {
        Step::next(
            "comparison",
            format!("{consumer} differs from {} in {}", compared.source, many(compared.wrong(), "aggregate")),
            format!(
                "outbox-relay digest --consumer {} names them. Where it is behind, wait or see what it holds. Where it is \
                 ahead, or has what the outbox does not know, this database went back in time after {}: outbox-relay \
                 new-incarnation --yes, then the baselines, and this again",
                escape::shell_word(consumer),
                time(Some(overview.since))
            ),
        )
    })
}

/// What the consumer has that the source has not published anew.
async fn left_behind(
    conn: &mut PgConnection,
    args: &RecoverArgs,
    overview: &Overview,
    consumer: &str,
    steps: &mut Steps,
) -> anyhow::Result<()> {
    let mut inbox = inbox(args).await?;
    let consumer = &current_consumer(&mut inbox, consumer).await?;
    let found = LeftBehind::settle(conn, &mut inbox, (consumer, &overview.source), args.wait).await?;
    if let Some(step) = subscriber::refused(&found, consumer, overview) {
        steps.push(step);
        return Ok(());
    }
    if let Some(count) = args.lost {
        if found.lost.len() != usize::try_from(count)? {
            bail!(
                "{consumer} has {} that this database does not know, and not {count}; nothing was changed. Look at the \
                 list again",
                many(i64::try_from(found.lost.len())?, "aggregate")
            );
        }
        let ended = database::end_lost(conn, &found.lost).await?;
        tracing::warn!(consumer, ended, "aggregates of the lost time were ended by hand");
        steps.push(Step::next(
            "subscribers",
            format!(
                "{} ended: TYPE.deleted is written for each, and published next",
                many(ended, "aggregate")
            ),
            "run this again without --lost to see that they are gone",
        ));
        return Ok(());
    }
    steps.extend(subscriber::steps(&found, consumer, args.limit));
    if steps.is_finished() {
        steps.push(comparison(args, consumer, overview).await?);
    }
    Ok(())
}
