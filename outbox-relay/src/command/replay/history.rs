//! What a replay reads: the events that are stored, page after page, without those that the live relay will publish
//! itself.

use anyhow::Context;
use chrono::{DateTime, Utc};
use futures_util::TryStreamExt;
use sqlx::PgConnection;

use crate::{
    command::when,
    event::Event,
    row::{self, Row, Unreadable},
    rules::matches,
};

/// Events of one page at most, and bytes of them, but for an event that is larger by itself.
const PAGE: usize = 100;
const PAGE_BYTES: usize = 16 << 20;
/// Events of the first page: the server sends all of a page, whatever is taken of it.
const FIRST_PAGE: usize = 10;

/// Which events; all conditions hold.
#[derive(Debug, clap::Args)]
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

/// A page, by the primary key; of one aggregate, by the partitions' unique indexes. Only what the relay
/// has settled: the rest it will publish itself.
const READ: &str = "
SELECT e.position, e.id, e.aggregate_type, e.aggregate_id, e.version, e.type, e.payload::text, e.headers, e.created_at
FROM outbox.readable e
WHERE e.position BETWEEN $1 AND $2 AND NOT $3::int8multirange @> e.position
  AND ($4::timestamptz IS NULL OR e.created_at >= $4) AND ($5::timestamptz IS NULL OR e.created_at < $5)
  AND ($6::text IS NULL OR (e.aggregate_type, e.aggregate_id) = ($6, $7))
ORDER BY e.position LIMIT $8";

/// What is left to be read.
pub(super) struct History<'a> {
    range: &'a Range,
    /// The last position.
    pub(super) to: i64,
    /// Positions that the live relay has not settled, as PostgreSQL writes ranges: the driver has no type for them.
    unsettled: String,
    /// No page has more events.
    most: usize,
    /// Events that the next page asks for: twice what the last one took, unless its bytes were too many.
    page: usize,
}

/// Events that were read together.
pub(super) struct Read {
    /// The first position of all rows, and the last.
    pub(super) positions: (i64, i64),
    /// Of the types that are wanted.
    pub(super) events: Vec<Event>,
    /// Rows that are no events.
    pub(super) unreadable: Vec<Unreadable>,
}

impl<'a> History<'a> {
    /// What the relay `name` has published of `range`; a page has `most` events at most.
    pub(super) async fn of(
        conn: &mut PgConnection,
        name: &str,
        range: &'a Range,
        most: usize,
    ) -> anyhow::Result<Self> {
        let (high, unsettled): (i64, String) =
            sqlx::query_as("SELECT high, open::text FROM outbox.relay WHERE name = $1")
                .bind(name)
                .fetch_one(conn)
                .await
                .context("the relay's progress could not be read")?;
        let to = range.to.map_or(high, |to| to.min(high));
        Ok(Self { range, to, unsettled, most, page: FIRST_PAGE })
    }

    /// The next page, from a position on. None at the end.
    pub(super) async fn read(&mut self, conn: &mut PgConnection, from: i64) -> anyhow::Result<Option<Read>> {
        let (type_, id) = self.range.aggregate.clone().unzip();
        let mut rows = sqlx::query_as::<_, Row>(READ)
            .bind(from)
            .bind(self.to)
            .bind(&self.unsettled)
            .bind(self.range.since)
            .bind(self.range.until)
            .bind(type_)
            .bind(id)
            .bind(i64::try_from(self.page.min(self.most))?)
            .fetch(conn);
        let (mut page, mut bytes) = (Vec::new(), 0);
        while let Some(row) = rows.try_next().await.context("the events could not be read")? {
            bytes += row.size();
            page.push(row);
            if bytes >= PAGE_BYTES {
                break;
            }
        }
        self.page = if bytes < PAGE_BYTES { PAGE.min(self.page * 2) } else { page.len() };
        let (Some(first), Some(last)) = (page.first(), page.last()) else { return Ok(None) };
        let positions = (first.position(), last.position());
        let (mut events, unreadable) = row::split(page);
        if let Some(pattern) = &self.range.type_ {
            events.retain(|event| matches(pattern, &event.type_));
        }
        Ok(Some(Read { positions, events, unreadable }))
    }
}
