//! Who did what, when and why.

use std::time::Duration;

use chrono::{DateTime, Utc};
use futures_util::future::join_all;
use maud::html;
use tokio::time::timeout;

use super::time;
use crate::{Console, audit, outbox::reason, page::Page};

/// How many rows of each database are listed.
const LISTED: i64 = 100;
/// No database takes longer to be asked.
const TIMEOUT: Duration = Duration::from_secs(6);

struct Line {
    at: DateTime<Utc>,
    operator: String,
    place: String,
    what: String,
    why: String,
}

/// What was chosen and how much it was: ` (events: 3, type: order.*)`.
fn detail(detail: &serde_json::Value) -> String {
    let known = detail.as_object().into_iter().flatten();
    let said =
        known.filter(|(_, value)| !value.is_null() && value.as_array().is_none_or(|list| !list.is_empty()));
    let said: Vec<String> = said
        .map(|(name, value)| match value.as_str() {
            Some(text) => format!("{name}: {text}"),
            None => format!("{name}: {value}"),
        })
        .collect();
    if said.is_empty() { String::new() } else { format!(" ({})", said.join(", ")) }
}

/// The page.
pub async fn page(console: &Console) -> Page {
    let of_outboxes = join_all(console.outboxes.values().map(async |outbox| {
        let place = format!("outbox {}", outbox.name);
        let rows = async {
            let mut conn = outbox.pool.acquire().await?;
            audit::last(&mut conn, LISTED).await
        };
        let rows = match timeout(TIMEOUT, rows).await {
            Ok(rows) => rows.map_err(|error| reason(&error)),
            Err(_) => Err("it did not respond in time".to_owned()),
        };
        rows.map(|rows| {
            let line = |row: audit::Row| Line {
                at: row.at,
                operator: row.operator,
                place: place.clone(),
                what: format!("{} {}{}", row.action, row.target, detail(&row.detail)),
                why: row.why,
            };
            rows.into_iter().map(line).collect::<Vec<_>>()
        })
        .map_err(|reason| format!("The {place} could not be asked: {reason}."))
    }));
    let of_inboxes = join_all(console.inboxes.values().map(async |inbox| {
        let place = format!("inbox {}", inbox.name);
        let rows = async {
            let mut conn = inbox.pool.acquire().await?;
            inbox::requests::list(&mut conn, &inbox.consumer, LISTED).await
        };
        let rows = match timeout(TIMEOUT, rows).await {
            Ok(rows) => rows.map_err(|error| reason(&error)),
            Err(_) => Err("it did not respond in time".to_owned()),
        };
        rows.map(|rows| {
            let line = |row: inbox::requests::Request| Line {
                at: row.asked_at,
                what: format!("{}: {}", super::inbox::asked(&row), super::inbox::outcome(&row)),
                operator: row.operator,
                place: place.clone(),
                why: row.why,
            };
            rows.into_iter().map(line).collect::<Vec<_>>()
        })
        .map_err(|reason| format!("The {place} could not be asked: {reason}."))
    }));
    let (of_outboxes, of_inboxes) = futures_util::future::join(of_outboxes, of_inboxes).await;
    let (mut lines, mut away) = (Vec::new(), Vec::new());
    for asked in of_outboxes.into_iter().chain(of_inboxes) {
        match asked {
            Ok(some) => lines.extend(some),
            Err(reason) => away.push(reason),
        }
    }
    lines.sort_by_key(|line| std::cmp::Reverse(line.at));
    let body = html! {
        section #audit aria-label="Actions" {
            @for reason in &away { p role="alert" { (escape::line(reason)) } }
            @if lines.is_empty() { p { "Nobody has done anything yet." } } @else { div.scroll { table {
                thead { tr { th scope="col" { "When" } th scope="col" { "Who" } th scope="col" { "Where" } th scope="col" { "What" } th scope="col" { "Why" } } }
                tbody { @for line in &lines { tr {
                    td { (time(line.at)) }
                    td { (escape::line(&line.operator)) }
                    td { (line.place) }
                    td { (escape::line(&line.what)) }
                    td { (escape::line(&line.why)) }
                } } }
            } } }
        }
    };
    Page::still("Audit", body)
}
