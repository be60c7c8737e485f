//! The pages.

pub mod all;
pub mod audit;
pub mod doctor;
pub mod find;
pub mod inbox;
pub mod login;
pub mod outbox;
pub mod parked;

use chrono::{DateTime, Utc};
use maud::{Markup, html};
use outbox_relay::command::time as text_of;

use crate::{
    page::level,
    verdict::{Finding, Level},
    watch::Seen,
};

/// The verdict, and what else was found.
fn findings(findings: &[Finding]) -> Markup {
    html! {
        @if let Some((first, rest)) = findings.split_first() {
            section #verdict aria-labelledby="verdict-is" {
                h2 #verdict-is role="status" { (level(first.level)) }
                p.verdict { (first.what) }
                @if first.level != Level::Well {
                    dl {
                        dt { "Whose" } dd { (capital(first.whose)) }
                        dt { "What to do" } dd { (first.advice) }
                    }
                }
                @if !rest.is_empty() {
                    h3 { "Also" }
                    ul {
                        @for finding in rest {
                            li {
                                (level(finding.level)) " " (finding.what) " " span.dim { (capital(finding.whose)) ". " }
                                (finding.advice)
                            }
                        }
                    }
                }
            }
        }
    }
}

/// With a large first letter.
fn capital(text: &str) -> String {
    let mut rest = text.chars();
    rest.next().map_or(String::new(), |first| first.to_uppercase().chain(rest).collect())
}

/// A time, for people and for programs.
fn time(at: DateTime<Utc>) -> Markup {
    html! { time datetime=(at.to_rfc3339()) { (text_of(Some(at))) } }
}

/// When what is shown was seen, where that is not just now. And a line in which the script says that nothing comes any
/// more.
fn freshness<L>(seen: &Seen<L>) -> Markup {
    html! {
        p #freshness role="status" {}
        @if let (Some(away), Some(good)) = (&seen.away, &seen.good) {
            p.dim { "What follows was seen at " (time(good.at)) "; the database does not respond since " (time(away.since)) "." }
        } @else if let Some(good) = &seen.good {
            @if (Utc::now() - good.at).num_seconds() >= 3 {
                p.dim { "What follows was seen at " (time(good.at)) ". The database takes its time." }
            }
        }
    }
}
