//! What a replay reads: the events that are stored, page after page, without those that the live relay will publish
//! itself. For each kind of question there is a statement of its own, which reads by the index that fits.

use anyhow::{Context, anyhow};
use chrono::{DateTime, Utc};
use daemon::progress::Progress;
use futures_util::TryStreamExt;
use sqlx::{Connection, PgConnection, Postgres, QueryBuilder};
use tokio::sync::mpsc;

use crate::{
    command::when,
    event::Event,
    row::{self, Row, Unreadable},
    rules::regex,
};

/// Rows of one page at most, and bytes of them, but for an event that is larger by itself.
const PAGE: usize = 1_000;
const PAGE_BYTES: usize = 4 << 20;
/// Rows of the first page: the server sends all of a page, whatever is taken of it.
const FIRST_PAGE: usize = 10;
/// A statement that reads looks at so many positions at most, also where it finds little.
const SPAN: i64 = 100_000;
/// A statement that counts looks at so many.
const COUNTED: i64 = 1_000_000;
/// Of an aggregate, so many positions are remembered at a time.
const REMEMBERED: i64 = 1_000_000;
/// A stretch of time is remembered as one stretch of positions for each so many of them.
const STRETCH: i64 = 10_000;

/// Which events; all conditions hold.
#[derive(Clone, Debug, clap::Args)]
#[group(required = true, multiple = true)]
pub struct Range {
    /// From this position on.
    #[arg(long, value_name = "POSITION")]
    pub from: Option<i64>,
    /// Up to this position.
    #[arg(long, value_name = "POSITION")]
    pub to: Option<i64>,
    /// Made at or after this time: RFC 3339, a date (2026-11-27, in UTC), `today`, `yesterday`, or a duration
    /// (24h) for so long ago.
    #[arg(long, value_parser = when::time, value_name = "TIME")]
    pub since: Option<DateTime<Utc>>,
    /// Made before this time.
    #[arg(long, value_parser = when::time, value_name = "TIME")]
    pub until: Option<DateTime<Utc>>,
    /// Of this aggregate: TYPE/ID.
    #[arg(long, value_parser = aggregate)]
    pub aggregate: Option<(String, String)>,
    /// Of types that match, as in a topic binding: `order.*`.
    #[arg(long = "type", value_name = "PATTERN")]
    pub type_: Option<String>,
    /// All that is stored.
    #[arg(long)]
    pub all: bool,
}

fn aggregate(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('/') {
        Some((type_, id)) if !type_.is_empty() && !id.is_empty() => Ok((type_.to_owned(), id.to_owned())),
        _ => Err("it should look like TYPE/ID"),
    }
}

const COLUMNS: &str = "SELECT e.position, e.id, e.aggregate_type, e.aggregate_id, e.version, e.type, e.payload::text, \
                       e.headers, e.created_at, e.previous_id FROM outbox.readable e WHERE ";

/// Where the events are.
#[derive(Debug)]
enum Place {
    /// Anywhere, by the primary key.
    Positions,
    /// In these stretches of positions, which hold what was made in a stretch of time; with the number of events.
    Stretches(Vec<(i64, i64)>, u64),
    /// At these positions of an aggregate; there are more beyond the last one when there are [`REMEMBERED`].
    Aggregate(Vec<i64>),
}

/// What is left to be read.
#[derive(Clone, Debug)]
pub(super) struct History {
    range: Range,
    /// The next position.
    pub(super) from: i64,
    /// The last position.
    pub(super) to: i64,
    /// Positions that the live relay has not settled, as PostgreSQL writes ranges: the driver has no type for them.
    unsettled: String,
    /// Rows that the next page asks for: twice what the last one took, unless its bytes were too many.
    page: usize,
}

/// What the reading of a replay says.
#[derive(Debug)]
pub(in crate::command) enum Read {
    /// So many events are to be read, where that is known.
    Expected(u64),
    /// Events that were read together.
    Page(Page),
}

/// Events that were read together.
#[derive(Debug)]
pub(in crate::command) struct Page {
    /// Everything up to here was read.
    pub(in crate::command) up_to: i64,
    /// The events.
    pub(in crate::command) events: Vec<Event>,
    /// Rows that are no events.
    pub(in crate::command) unreadable: Vec<Unreadable>,
}

impl History {
    /// What the relay `name` has published of `range`. The rest it will publish itself.
    pub(super) async fn of(conn: &mut PgConnection, name: &str, range: &Range) -> anyhow::Result<Self> {
        let (high, unsettled): (i64, String) =
            sqlx::query_as("SELECT high, open::text FROM outbox.relay WHERE name = $1")
                .bind(name)
                .fetch_one(conn)
                .await
                .context("the relay's progress could not be read")?;
        let to = range.to.map_or(high, |to| to.min(high));
        let from = range.from.unwrap_or(0);
        Ok(Self { range: range.clone(), from, to, unsettled, page: FIRST_PAGE })
    }

    /// Reads to the end, or until the pages are wanted no more.
    pub(super) async fn send(mut self, mut conn: PgConnection, pages: mpsc::Sender<anyhow::Result<Read>>) {
        if let Err(error) = self.send_all(&mut conn, &pages).await {
            let _nobody_reads = pages.send(Err(anyhow!(error).context("the events could not be read"))).await;
        }
    }

    async fn send_all(
        &mut self,
        conn: &mut PgConnection,
        pages: &mpsc::Sender<anyhow::Result<Read>>,
    ) -> sqlx::Result<()> {
        loop {
            let (place, whole) = match &self.range {
                Range { aggregate: Some(_), .. } => {
                    let positions = self.positions(conn).await?;
                    let whole = positions.len() < usize::try_from(REMEMBERED).unwrap_or(usize::MAX);
                    (Place::Aggregate(positions), whole)
                }
                Range { since: None, until: None, .. } => (Place::Positions, true),
                _ => {
                    let (stretches, events) = self.stretches(conn, &mut |_, _| {}).await?;
                    (Place::Stretches(stretches, events), true)
                }
            };
            let expected = match &place {
                Place::Aggregate(positions) if whole => Some(positions.len() as u64),
                Place::Stretches(_, events) => Some(*events),
                _ => None,
            };
            if let Some(expected) = expected
                && pages.send(Ok(Read::Expected(expected))).await.is_err()
            {
                return Ok(());
            }
            // Where the events are is known: each page is read by the primary key.
            sqlx::raw_sql("SET enable_bitmapscan = off; SET enable_seqscan = off")
                .execute(&mut *conn)
                .await?;
            while let Some(page) = self.page(conn, &place).await? {
                let next = page.up_to.checked_add(1);
                if pages.send(Ok(Read::Page(page))).await.is_err() {
                    return Ok(());
                }
                let Some(next) = next else { return Ok(()) };
                self.from = next;
            }
            if whole {
                return Ok(());
            }
            sqlx::raw_sql("RESET enable_bitmapscan; RESET enable_seqscan").execute(&mut *conn).await?;
        }
    }

    /// The next page; none at the end.
    async fn page(&mut self, conn: &mut PgConnection, place: &Place) -> sqlx::Result<Option<Page>> {
        let most = self.page;
        loop {
            let mut sql = QueryBuilder::new(COLUMNS);
            // Up to where this statement looks, if it finds less than it may.
            let up_to = match place {
                Place::Aggregate(positions) => {
                    let left = &positions[positions.partition_point(|position| *position < self.from)..];
                    let some = &left[..left.len().min(most)];
                    let Some(last) = some.last() else { return Ok(None) };
                    sql.push("e.position = ANY (").push_bind(some.to_vec()).push(")");
                    *last
                }
                Place::Positions => {
                    if self.from > self.to {
                        return Ok(None);
                    }
                    let up_to = self.from.saturating_add(SPAN - 1).min(self.to);
                    between(&mut sql, self.from, up_to);
                    self.conditions(&mut sql);
                    up_to
                }
                Place::Stretches(stretches, _) => {
                    let next = stretches.partition_point(|(_, last)| *last < self.from);
                    let Some((first, last)) = stretches.get(next) else { return Ok(None) };
                    between(&mut sql, self.from.max(*first), *last);
                    self.conditions(&mut sql);
                    *last
                }
            };
            sql.push(" ORDER BY e.position LIMIT ").push_bind(i64::try_from(most).unwrap_or(i64::MAX));
            let mut rows = sql.build_query_as::<Row>().persistent(false).fetch(&mut *conn);
            let (mut found, mut bytes) = (Vec::new(), 0);
            while let Some(row) = rows.try_next().await? {
                bytes += row.size();
                found.push(row);
                if bytes >= PAGE_BYTES {
                    break;
                }
            }
            drop(rows);
            let cut_off = bytes >= PAGE_BYTES || found.len() >= most;
            let Some(last) = found.last().map(Row::position) else {
                if !self.skip(conn, place, up_to).await? {
                    return Ok(None);
                }
                continue;
            };
            self.page = if bytes < PAGE_BYTES { PAGE.min(self.page * 2) } else { found.len() };
            let (events, unreadable) = row::split(found);
            return Ok(Some(Page { up_to: if cut_off { last } else { up_to }, events, unreadable }));
        }
    }

    /// Nothing is left up to there: goes on behind it, at the next position that has an event. False at the end.
    async fn skip(&mut self, conn: &mut PgConnection, place: &Place, up_to: i64) -> sqlx::Result<bool> {
        let Some(next) = up_to.checked_add(1).filter(|next| *next <= self.to) else { return Ok(false) };
        self.from = next;
        if matches!(place, Place::Positions) {
            let Some(next) = next_position(conn, next).await? else { return Ok(false) };
            self.from = next;
        }
        Ok(self.from <= self.to)
    }

    /// What the events fulfil besides where they are.
    fn conditions(&self, sql: &mut QueryBuilder<Postgres>) {
        if self.unsettled != "{}" {
            sql.push(" AND NOT ").push_bind(self.unsettled.clone()).push("::int8multirange @> e.position");
        }
        if let Some(since) = self.range.since {
            sql.push(" AND e.created_at >= ").push_bind(since);
        }
        if let Some(until) = self.range.until {
            sql.push(" AND e.created_at < ").push_bind(until);
        }
        if let Some(pattern) = &self.range.type_ {
            sql.push(" AND (e.type || '.') ~ ").push_bind(regex(pattern));
        }
    }

    /// The next positions of the aggregate, by the partitions' unique indexes. In its order, an index on positions would
    /// be read from the beginning of history, so that is kept apart.
    async fn positions(&self, conn: &mut PgConnection) -> sqlx::Result<Vec<i64>> {
        let mut sql =
            QueryBuilder::new("SELECT s.position FROM (SELECT e.position FROM outbox.event e WHERE ");
        self.of_aggregate(&mut sql);
        sql.push(" OFFSET 0) AS s ORDER BY 1 LIMIT ").push_bind(REMEMBERED);
        sql.build_query_scalar().persistent(false).fetch_all(conn).await
    }

    fn of_aggregate(&self, sql: &mut QueryBuilder<Postgres>) {
        let (type_, id) = self.range.aggregate.clone().unwrap_or_default();
        sql.push("e.aggregate_type = ").push_bind(type_);
        sql.push(" AND e.aggregate_id = ").push_bind(id).push(" AND ");
        between(sql, self.from, self.to);
        self.conditions(sql);
    }

    /// The stretches of positions in which the events of a stretch of time lie, and how many events these are:
    /// partition by partition, by the index on the time, which is small and points at the blocks to look at. `said` is
    /// told how far it is, and how many events it has found.
    async fn stretches(
        &self,
        conn: &mut PgConnection,
        said: &mut (dyn FnMut((u64, u64), u64) + Send),
    ) -> sqlx::Result<(Vec<(i64, i64)>, u64)> {
        let bounds: Vec<(Option<i64>, Option<i64>)> = sqlx::query_as(
            "SELECT lower, upper FROM outbox.partition
             WHERE NOT is_default AND coalesce(lower, 0) <= $2 AND upper > $1 ORDER BY upper",
        )
        .bind(self.from)
        .bind(self.to)
        .fetch_all(&mut *conn)
        .await?;
        let parts = bounds.iter().map(|(lower, upper)| {
            let first = lower.unwrap_or(i64::MIN).max(self.from);
            ("outbox.event", first, upper.map_or(self.to, |upper| (upper - 1).min(self.to)))
        });
        // The net's events may lie anywhere between.
        let parts: Vec<_> = parts.chain([("outbox.event_default", self.from, self.to)]).collect();
        let (mut stretches, mut events) = (Vec::new(), 0);
        // In a transaction, because an index that is read in the order of positions would be one over everything.
        let mut tx = conn.begin().await?;
        sqlx::raw_sql("SET LOCAL enable_indexscan = off; SET LOCAL enable_indexonlyscan = off")
            .execute(&mut *tx)
            .await?;
        let all = parts.len() as u64;
        for (n, (table, from, to)) in (1..).zip(parts) {
            let mut sql = QueryBuilder::new(format!(
                "SELECT min(position), max(position), count(*) FROM {table} e WHERE "
            ));
            between(&mut sql, from, to);
            self.conditions(&mut sql);
            sql.push(format!(" GROUP BY e.position / {STRETCH}"));
            let found: Vec<(i64, i64, i64)> =
                sql.build_query_as().persistent(false).fetch_all(&mut *tx).await?;
            stretches.extend(found.iter().map(|(first, last, _)| (*first, *last)));
            events += found.iter().map(|(.., count)| count.unsigned_abs()).sum::<u64>();
            said((n, all), events);
        }
        tx.commit().await?;
        stretches.sort_unstable();
        stretches.dedup_by(|next, before| {
            let joined = next.0 <= before.1;
            if joined {
                before.1 = before.1.max(next.1);
            }
            joined
        });
        Ok((stretches, events))
    }

    /// The number of all events of an aggregate, by an index that has no positions; without those that have another one
    /// than is wanted, which are few and new. In one statement, beside writers.
    fn whole_chain(&self, (type_, id): &(String, String)) -> QueryBuilder<Postgres> {
        let count = |sql: &mut QueryBuilder<Postgres>| {
            sql.push("(SELECT count(*) FROM outbox.event e WHERE e.aggregate_type = ")
                .push_bind(type_.clone());
            sql.push(" AND e.aggregate_id = ").push_bind(id.clone());
        };
        let mut sql = QueryBuilder::new("SELECT ");
        count(&mut sql);
        sql.push(") - ");
        count(&mut sql);
        sql.push(" AND e.position > ").push_bind(self.to).push(") - ");
        count(&mut sql);
        sql.push(" AND e.position <= ").push_bind(self.to);
        let unsettled = |sql: &mut QueryBuilder<Postgres>, before: &str, after: &str| {
            sql.push(before).push_bind(self.unsettled.clone()).push("::int8multirange").push(after);
        };
        unsettled(&mut sql, " AND e.position >= lower(", ")");
        unsettled(&mut sql, " AND ", " @> e.position)");
        sql
    }

    /// Counts what is to be read, without reading it. `counted` has what was counted so far, also when this is dropped.
    pub(super) async fn count(
        &mut self,
        conn: &mut PgConnection,
        said: &Progress,
        counted: &mut u64,
    ) -> sqlx::Result<()> {
        if let Some(aggregate) = &self.range.aggregate {
            let all_of_it =
                matches!(self.range, Range { from: None, since: None, until: None, type_: None, .. });
            let sql = if all_of_it {
                self.whole_chain(aggregate)
            } else {
                let mut sql = QueryBuilder::new("SELECT count(*) FROM outbox.event e WHERE ");
                self.of_aggregate(&mut sql);
                sql
            };
            *counted = one(sql, conn).await?;
        } else if self.range.since.is_some() || self.range.until.is_some() {
            let mut said = |way, events| {
                *counted = events;
                said.along(way, events);
            };
            self.stretches(conn, &mut said).await?;
        } else {
            let first = self.from;
            while let Some(next) = next_position(conn, self.from).await?.filter(|next| *next <= self.to) {
                let up_to = next.saturating_add(COUNTED - 1).min(self.to);
                let mut sql = QueryBuilder::new("SELECT count(*) FROM outbox.event e WHERE ");
                between(&mut sql, next, up_to);
                self.conditions(&mut sql);
                *counted += one(sql, conn).await?;
                said.along((up_to.abs_diff(first), self.to.abs_diff(first)), *counted);
                let Some(next) = up_to.checked_add(1) else { return Ok(()) };
                self.from = next;
            }
        }
        self.from = self.from.max(self.to.saturating_add(1));
        Ok(())
    }
}

fn between(sql: &mut QueryBuilder<Postgres>, from: i64, to: i64) {
    sql.push("e.position BETWEEN ").push_bind(from).push(" AND ").push_bind(to);
}

async fn one(mut sql: QueryBuilder<Postgres>, conn: &mut PgConnection) -> sqlx::Result<u64> {
    let count: i64 = sql.build_query_scalar().persistent(false).fetch_one(conn).await?;
    Ok(count.unsigned_abs())
}

/// The next position from there on that has an event.
async fn next_position(conn: &mut PgConnection, from: i64) -> sqlx::Result<Option<i64>> {
    let sql = "SELECT position FROM outbox.event WHERE position >= $1 ORDER BY position LIMIT 1";
    sqlx::query_scalar(sql).bind(from).fetch_optional(conn).await
}
