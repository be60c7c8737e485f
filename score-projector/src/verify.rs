//! `verify`: recomputes the read model from its entries and compares it with the inbox.

use std::{collections::BTreeSet, fmt::Write, time::Duration};

use anyhow::Context;
use daemon::{
    command::{CommandArgs, Verdict, many},
    progress::Progress,
};
use futures_util::TryStreamExt;
use rust_decimal::Decimal;
use serde::Serialize;
use sqlx::{AssertSqlSafe, Connection, FromRow, PgConnection, Row};
use uuid::Uuid;

use crate::{batch::entry::Entry, schema, score};

/// Settings of `verify`.
#[derive(Debug, clap::Args)]
pub struct VerifyArgs {
    /// The database and the output format.
    #[command(flatten)]
    pub common: CommandArgs,
}

/// Persons of one page, which is one snapshot.
const PAGE: i64 = 2_000;
/// Persons that are read whole at a time.
const WHOLE: usize = 100;
/// How many mismatches are named.
const NAMED: usize = 100;
/// How many persons of earlier incarnations are counted.
const LEFT_BEHIND: i32 = 10_001;
/// For one page, and for a person with very many entries.
const STATEMENT_TIMEOUT: Duration = Duration::from_mins(1);

/// A row that is wrong.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Mismatch {
    person: Uuid,
    #[serde(skip_serializing_if = "Option::is_none")]
    entry: Option<Uuid>,
    what: String,
}

/// What was compared, and what differs.
#[derive(Debug, Default, Serialize)]
struct Report {
    persons: u64,
    entries: u64,
    mismatches: u64,
    /// The first of them.
    named: BTreeSet<Mismatch>,
}

impl Report {
    fn add(&mut self, mismatch: Mismatch) {
        self.mismatches += 1;
        if self.named.len() < NAMED {
            self.named.insert(mismatch);
        }
    }
}

/// A person while their rows come in.
struct Tally {
    id: Uuid,
    total: Decimal,
    sum: Decimal,
}

/// The version of the person `p` in the inbox: the same one, if any of its chains has it.
const IN_INBOX: &str = "
LEFT JOIN LATERAL (
    SELECT version FROM inbox.aggregate
    WHERE consumer = (SELECT consumer FROM score.model WHERE role = 'live')
      AND aggregate_type = $1 AND aggregate_id = p.id::text
    ORDER BY version = p.version DESC, updated_at DESC LIMIT 1) AS a ON true";

/// One page, summed up by the server: the last person, how many persons and entries, and the persons of whom anything seems
/// wrong. Each of these is then judged by [`score::of`]. The entries of each person are found by their index: for a join,
/// the planner reads the whole table for each page.
const SUMS: &str = "
SELECT (array_agg(p.id ORDER BY p.id DESC))[1], count(*), coalesce(sum(e.entries), 0)::bigint,
       coalesce(array_agg(p.id) FILTER (WHERE a.version IS DISTINCT FROM p.version OR e.sum <> p.total OR e.wrong), '{}')
FROM (SELECT id, total, version FROM score.person WHERE id > $2 ORDER BY id LIMIT $3) AS p
     {in_inbox}
     CROSS JOIN LATERAL (
         SELECT count(*) AS entries, coalesce(sum(score), 0) AS sum,
                coalesce(bool_or(score IS DISTINCT FROM score.of_item(type, value)), false) AS wrong
         FROM score.entry WHERE person_id = p.id) AS e";

/// Some persons with all of their entries, in one snapshot.
const ROWS: &str = "
SELECT p.id AS person, p.total, p.version, a.version AS inbox, e.*
FROM (SELECT id, total, version FROM score.person WHERE id = ANY ($2)) AS p
     {in_inbox}
     LEFT JOIN LATERAL (SELECT * FROM score.entry WHERE person_id = p.id OFFSET 0) e ON true
ORDER BY p.id";

/// Reads all persons, page by page. It may run beside consumers: what it compares is of one snapshot.
pub async fn verify(args: &VerifyArgs) -> anyhow::Result<Verdict> {
    let mut conn =
        args.common.connect("score-projector verify", &schema::needed(), STATEMENT_TIMEOUT).await?;
    let mut report = Report::default();
    let progress = Progress::new("verifying", "person");
    let all: i64 =
        sqlx::query_scalar("SELECT reltuples::bigint FROM pg_class WHERE oid = 'score.person'::regclass")
            .fetch_one(&mut conn)
            .await?;
    let mut last = Uuid::nil();
    while let Some(end) =
        page(&mut conn, last, &mut report).await.context("the read model could not be read")?
    {
        last = end;
        progress.at(report.persons, all.unsigned_abs().max(report.persons));
    }
    left_behind(&mut conn, &mut report).await.context("the inbox could not be read")?;
    conn.close().await?;
    drop(progress);
    args.common.answer(&report, || text(&report))?;
    Ok(if report.mismatches == 0 { Verdict::Ok } else { Verdict::Attention })
}

/// Persons whose chain belongs to an earlier incarnation of their source. They are right for themselves, but the source
/// may not have them any more.
async fn left_behind(conn: &mut PgConnection, report: &mut Report) -> sqlx::Result<()> {
    let left: Vec<(String, String)> = sqlx::query_as(
        "SELECT aggregate_id, inbox.spell(source_name, incarnation)
         FROM inbox.some_left_behind((SELECT consumer FROM score.model WHERE role = 'live'), $1)
         WHERE aggregate_type = $2 AND version > 0",
    )
    .bind(LEFT_BEHIND)
    .bind(events::AGGREGATE_PERSON)
    .fetch_all(conn)
    .await?;
    for (person, source) in left {
        let what = format!("it is from {source}, and its source has begun a newer incarnation since");
        report.add(Mismatch { person: person.parse().unwrap_or_default(), entry: None, what });
    }
    Ok(())
}

/// Verifies one page and returns its last person.
async fn page(conn: &mut PgConnection, after: Uuid, report: &mut Report) -> anyhow::Result<Option<Uuid>> {
    let (end, persons, entries, suspects): (Option<Uuid>, i64, i64, Vec<Uuid>) =
        sqlx::query_as(AssertSqlSafe(SUMS.replace("{in_inbox}", IN_INBOX)))
            .bind(events::AGGREGATE_PERSON)
            .bind(after)
            .bind(PAGE)
            .fetch_one(&mut *conn)
            .await?;
    report.persons += persons.unsigned_abs();
    report.entries += entries.unsigned_abs();
    for some in suspects.chunks(WHOLE) {
        persons_of(conn, some, report).await?;
    }
    Ok(end)
}

/// Looks at some persons and all of their entries. The rows are streamed, since a person may have very many.
async fn persons_of(conn: &mut PgConnection, ids: &[Uuid], report: &mut Report) -> anyhow::Result<()> {
    let mut rows = sqlx::query(AssertSqlSafe(ROWS.replace("{in_inbox}", IN_INBOX)))
        .bind(events::AGGREGATE_PERSON)
        .bind(ids)
        .fetch(conn);
    let mut tally: Option<Tally> = None;
    while let Some(row) = rows.try_next().await? {
        let person: Uuid = row.try_get("person")?;
        if tally.as_ref().is_none_or(|tally| tally.id != person) {
            close(tally.as_ref(), report);
            let (version, inbox): (i64, Option<i64>) = (row.try_get("version")?, row.try_get("inbox")?);
            if inbox != Some(version) {
                let applied = inbox.map_or("nothing".to_owned(), |inbox| format!("version {inbox}"));
                let what = format!("it is at version {version}, but the inbox has applied {applied}");
                report.add(Mismatch { person, entry: None, what });
            }
            tally = Some(Tally { id: person, total: row.try_get("total")?, sum: Decimal::ZERO });
        }
        if row.try_get::<Option<Uuid>, _>("id")?.is_some()
            && let Some(tally) = &mut tally
        {
            let entry = Entry::from_row(&row)?;
            tally.sum += Decimal::from(entry.score);
            match score::of(entry.kind, entry.value) {
                Some(score) if score == entry.score => {}
                right => {
                    let right = right.map_or("none".to_owned(), |right| right.to_string());
                    let what = format!("its score is {}, but its value gives {right}", entry.score);
                    report.add(Mismatch { person, entry: Some(entry.id), what });
                }
            }
        }
    }
    close(tally.as_ref(), report);
    Ok(())
}

/// Compares the total with the sum, after the last entry of a person.
fn close(tally: Option<&Tally>, report: &mut Report) {
    if let Some(&Tally { id, total, sum }) = tally
        && total != sum
    {
        let what = format!("its total is {total}, but its entries add up to {sum}");
        report.add(Mismatch { person: id, entry: None, what });
    }
}

fn text(report: &Report) -> String {
    let entries = if report.entries == 1 { "entry" } else { "entries" };
    let mut text = format!("{} with {} {entries}", many(report.persons, "person"), report.entries);
    if report.mismatches == 0 {
        return text + ": every total is the sum of its entries, and every version is the inbox's";
    }
    let _ = writeln!(text, ", {} mismatches", report.mismatches);
    for Mismatch { person, entry, what } in &report.named {
        let _ = match entry {
            Some(entry) => writeln!(text, "  person {person}, entry {entry}: {what}"),
            None => writeln!(text, "  person {person}: {what}"),
        };
    }
    text
}
