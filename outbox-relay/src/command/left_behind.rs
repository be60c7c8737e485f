//! What a consumer has that its source has not published anew: its aggregates whose chain is of an earlier incarnation.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context, anyhow, bail};
use daemon::progress::Progress;
use outbox::Source;
use sqlx::PgConnection;
use tokio::time::{Instant, sleep};

/// So many aggregates are asked for at a time.
const PAGE: i64 = 5_000;
/// More are not ended at once: whoever lost more looks at the first ones first.
const MOST: usize = 1_000_000;
/// How often the consumer is asked again while it is behind.
const LOOK: Duration = Duration::from_millis(500);

/// An aggregate of which the consumer has an earlier incarnation's chain, and the last version of that.
#[derive(Clone, Debug, sqlx::FromRow)]
pub(crate) struct EarlierChain {
    pub(crate) aggregate_type: String,
    pub(crate) aggregate_id: String,
    pub(crate) version: i64,
}

impl EarlierChain {
    /// For people.
    pub(crate) fn text(&self) -> String {
        format!(
            "{}/{}: at version {} of an earlier incarnation",
            self.aggregate_type, self.aggregate_id, self.version
        )
    }
}

/// What was found in the inbox.
#[derive(Debug, Default)]
pub(crate) struct LeftBehind {
    /// The newest incarnation that the consumer knows; none when it has nothing of the source.
    pub(crate) newest: Option<i64>,
    /// The source has published these anew, or will.
    pub(crate) behind: Vec<EarlierChain>,
    /// The source knows nothing of these in its present incarnation.
    pub(crate) lost: Vec<EarlierChain>,
}

impl LeftBehind {
    /// Looks until nothing is behind any more, for at most `wait`.
    pub(crate) async fn settle(
        outbox: &mut PgConnection,
        inbox: &mut PgConnection,
        (consumer, source): (&str, &Source),
        wait: Duration,
    ) -> anyhow::Result<Self> {
        let end = Instant::now() + wait;
        let _said = Progress::new(format!("waiting for {consumer}, for at most {wait:?}"), "aggregate");
        loop {
            let found = Self::look(outbox, inbox, consumer, source).await?;
            let ahead = found.newest.is_some_and(|newest| newest > source.incarnation);
            let settled = found.newest == Some(source.incarnation) && found.behind.is_empty();
            if settled || ahead || Instant::now() >= end {
                return Ok(found);
            }
            sleep(LOOK).await;
        }
    }

    /// Looks once.
    pub(crate) async fn look(
        outbox: &mut PgConnection,
        inbox: &mut PgConnection,
        consumer: &str,
        source: &Source,
    ) -> anyhow::Result<Self> {
        let newest = newest_known(inbox, consumer, source).await?;
        let mut found = Self { newest, ..Self::default() };
        // Where it knows none but an earlier one, all that it has is of an earlier one.
        let earlier = newest.filter(|newest| *newest < source.incarnation);
        if newest != Some(source.incarnation) && earlier.is_none() {
            return Ok(found);
        }
        let (mut after_type, mut after_id) = (String::new(), String::new());
        loop {
            // One row of each aggregate, also where chains of several earlier incarnations are left.
            let page: Vec<EarlierChain> = sqlx::query_as(
                "SELECT aggregate_type, aggregate_id, max(version) AS version
                 FROM (SELECT aggregate_type, aggregate_id, version FROM inbox.left_behind
                       WHERE consumer = $1 AND source_name = $2
                       UNION ALL
                       SELECT aggregate_type, aggregate_id, version FROM inbox.aggregate
                       WHERE consumer = $1 AND source = inbox.spell($2, $6) AND NOT ended) AS chains
                 WHERE (aggregate_type, aggregate_id) > ($3, $4)
                 GROUP BY 1, 2 ORDER BY 1, 2 LIMIT $5",
            )
            .bind(consumer)
            .bind(&source.name)
            .bind(&after_type)
            .bind(&after_id)
            .bind(PAGE)
            .bind(earlier)
            .fetch_all(&mut *inbox)
            .await
            .map_err(unreadable)?;
            let Some(last) = page.last() else { return Ok(found) };
            (after_type, after_id) = (last.aggregate_type.clone(), last.aggregate_id.clone());
            let unknown = not_begun(outbox, &page).await?.into_iter().collect::<BTreeSet<_>>();
            for aggregate in page {
                let key = (aggregate.aggregate_type.clone(), aggregate.aggregate_id.clone());
                if unknown.contains(&key) { &mut found.lost } else { &mut found.behind }.push(aggregate);
            }
            if found.lost.len() + found.behind.len() > MOST {
                bail!("more than {MOST} aggregates are left behind: was the republishing interrupted?");
            }
        }
    }
}

/// The consumer that goes by this name now: another one, once it was replaced.
pub(crate) async fn current_consumer(inbox: &mut PgConnection, name: &str) -> anyhow::Result<String> {
    let current = sqlx::query_scalar("SELECT inbox.current_consumer($1)").bind(name);
    current.fetch_one(inbox).await.map_err(unreadable)
}

/// The newest incarnation of the source that the consumer knows; none when it has received nothing of it.
pub(crate) async fn newest_known(
    inbox: &mut PgConnection,
    consumer: &str,
    source: &Source,
) -> anyhow::Result<Option<i64>> {
    let newest = sqlx::query_scalar("SELECT incarnation FROM inbox.source WHERE consumer = $1 AND name = $2");
    newest.bind(consumer).bind(&source.name).fetch_optional(inbox).await.map_err(unreadable)
}

/// Which of the aggregates the present incarnation knows nothing of.
async fn not_begun(
    outbox: &mut PgConnection,
    aggregates: &[EarlierChain],
) -> anyhow::Result<Vec<(String, String)>> {
    let (types, ids): (Vec<&str>, Vec<&str>) =
        aggregates.iter().map(|a| (&*a.aggregate_type, &*a.aggregate_id)).unzip();
    sqlx::query_as("SELECT aggregate_type, aggregate_id FROM outbox.not_begun($1, $2)")
        .bind(types)
        .bind(ids)
        .fetch_all(outbox)
        .await
        .context("the outbox could not be looked at; nothing was changed")
}

fn unreadable(error: sqlx::Error) -> anyhow::Error {
    match error.as_database_error().and_then(sqlx::error::DatabaseError::code).as_deref() {
        // undefined_function, undefined_table, undefined_column, invalid_schema_name
        Some("42883" | "42P01" | "42703" | "3F000") => anyhow!(
            "this database has no inbox that knows incarnations; bring its schema inbox up to date (run what migrates \
             the subscriber)"
        ),
        // insufficient_privilege
        Some("42501") => anyhow!("this role may not read the inbox; inbox.grant_reader grants it"),
        _ => anyhow!(error).context("the inbox could not be read"),
    }
}
