//! `doctor`'s look at what is captured: whether each capture still works, and with `--deep` whether each aggregate was
//! published as it is.

use std::collections::BTreeMap;

use anyhow::Context;
use daemon::progress::Progress;
use sqlx::PgConnection;

use super::Check;
use crate::command::{backfill::Pages, many};

/// So many faults, or aggregates, are named.
const NAMED: usize = 3;

pub(super) async fn check(conn: &mut PgConnection) -> Result<Check, sqlx::Error> {
    let name = "captures";
    let ask = "SELECT count(*), count(DISTINCT aggregate_type) FROM outbox.captured";
    let (tables, types): (i64, i64) = sqlx::query_as(ask).fetch_one(&mut *conn).await?;
    let ask =
        "SELECT aggregate_type, finding, advice FROM outbox.capture_problem ORDER BY aggregate_type, finding";
    let problems: Vec<(String, String, String)> = sqlx::query_as(ask).fetch_all(conn).await?;
    if problems.is_empty() {
        return Ok(Check::ok(
            name,
            if tables == 0 {
                "no table is captured".to_owned()
            } else {
                format!("{} of {}, and each works", many(tables, "table"), many(types, "aggregate type"))
            },
        ));
    }
    let named = problems.iter().take(NAMED).map(|(type_, finding, _)| format!("{type_}: {finding}"));
    let more = match problems.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!("; and {more} more: SELECT * FROM outbox.capture_problem"),
    };
    let finding = format!(
        "{} of what is captured: {}{more}",
        many(i64::try_from(problems.len()).unwrap_or(i64::MAX), "problem"),
        named.collect::<Vec<_>>().join("; ")
    );
    let mut advice: Vec<&str> =
        problems.iter().take(NAMED).map(|(.., advice)| advice.trim_end_matches('.')).collect();
    advice.dedup();
    Ok(Check::problem(name, finding, advice.join(". ")))
}

/// Compares each captured aggregate with its last event, by the hash of its body.
pub(super) async fn compare(conn: &mut PgConnection, said: &Progress) -> anyhow::Result<Vec<Check>> {
    let ask = "SELECT DISTINCT aggregate_type FROM outbox.captured ORDER BY 1";
    let Ok(types) = sqlx::query_scalar::<_, String>(ask).fetch_all(&mut *conn).await else {
        return Ok(Vec::new());
    };
    let mut checks = Vec::new();
    for type_ in types {
        said.step(format!("comparing {type_}"), "aggregate");
        let (mut compared, mut counts, mut named) = (0, BTreeMap::<String, i64>::new(), Vec::new());
        let mut pages = Pages::differing(&type_);
        while let Some(page) = pages.next(conn).await.with_context(|| format!("{type_} could not be read"))? {
            compared += page.looked;
            said.count(i64::unsigned_abs(compared));
            for (id, differs) in page.differs {
                if named.len() < NAMED {
                    named.push(format!("{type_}/{id} ({differs})"));
                }
                *counts.entry(differs).or_default() += 1;
            }
        }
        let name = format!("captured {type_}");
        let all: i64 = counts.values().sum();
        checks.push(if all == 0 {
            Check::ok(
                name,
                format!(
                    "each is as its last event says; compared: {}",
                    many(compared, "aggregate")
                ),
            )
        } else {
            let kinds: Vec<String> = counts.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
            let more = if all > i64::try_from(named.len()).unwrap_or(0) { ", ..." } else { "" };
            Check::problem(
                name,
                format!(
                    "{} not published as they are now ({}): {}{more}; compared: {}",
                    many(all, "aggregate"),
                    kinds.join(", "),
                    named.join(", "),
                    many(compared, "aggregate")
                ),
                format!(
                    "run: outbox-relay backfill {type_} --differing; or of one: SELECT outbox.publish_state(type, id). \
                     What is new may be older than its capture, and then it was never published"
                ),
            )
        });
    }
    Ok(checks)
}
