//! The first page: every outbox and inbox with its verdict.

use futures_util::future::join_all;
use maud::{Markup, html};

use super::{
    capital,
    inbox::{lags, queues},
};
use crate::{
    Console,
    page::{Page, level},
    verdict::{Finding, Level, backlog, of_inbox, of_outbox},
};

struct Card {
    kind: &'static str,
    name: String,
    finding: Finding,
    more: usize,
    facts: Vec<(&'static str, String)>,
}

/// All of them, the worst first.
pub async fn page(console: &Console) -> Page {
    let outboxes = console.outboxes.values().map(async |outbox| {
        let seen = outbox.watch.latest().await;
        let mut findings = of_outbox(outbox, &seen);
        let facts = seen.good.as_ref().map(|good| {
            let relays = good.look.status.relays.iter();
            relays
                .map(|relay| {
                    let rate = relay.rate.as_ref().map_or(String::new(), |rate| format!(" {}.", rate.text()));
                    ("Backlog", format!("{}{rate}", backlog(&relay.backlog)))
                })
                .collect()
        });
        let more = findings.len() - 1;
        Card {
            kind: "outbox",
            name: outbox.name.clone(),
            finding: findings.swap_remove(0),
            more,
            facts: facts.unwrap_or_default(),
        }
    });
    let inboxes = console.inboxes.values().map(async |inbox| {
        let seen = inbox.watch.latest().await;
        let mut findings = of_inbox(inbox, &seen, &queues(console, inbox).await);
        let lags = lags(console, inbox).await;
        let facts = seen.good.as_ref().map(|good| {
            let behind = lags.iter().map(|(outbox, lag)| ("Behind", format!("outbox {outbox}: {lag}")));
            let counts = [
                ("Held", good.look.held.events.to_string()),
                ("Rejected", good.look.rejected.messages.to_string()),
            ];
            behind.chain(counts).collect()
        });
        let more = findings.len() - 1;
        Card {
            kind: "inbox",
            name: inbox.name.clone(),
            finding: findings.swap_remove(0),
            more,
            facts: facts.unwrap_or_default(),
        }
    });
    let (outboxes, inboxes) = futures_util::future::join(join_all(outboxes), join_all(inboxes)).await;
    let mut cards: Vec<Card> = outboxes.into_iter().chain(inboxes).collect();
    cards.sort_by_key(|card| card.finding.level);
    let wrong = cards.iter().filter(|card| card.finding.level != Level::Well).count();
    let title = match wrong {
        0 => "Everything is well".to_owned(),
        1 => format!("1 of {} is not well", cards.len()),
        wrong => format!("{wrong} of {} are not well", cards.len()),
    };
    Page::live(
        title,
        html! {
            p #freshness role="status" {}
            @for card in &cards { (of_card(card)) }
        },
    )
}

fn of_card(card: &Card) -> Markup {
    let Card { kind, name, finding, more, facts } = card;
    html! {
        section id={ (kind) "-" (name) } aria-label={ (kind) " " (name) } {
            h2 { a href={ "/" (kind) "/" (name) } { (capital(kind)) " " (name) } ": " (level(finding.level)) }
            p.verdict { (finding.what) }
            @if finding.level != Level::Well { p { b { (capital(finding.whose)) ". " } (finding.advice) } }
            @if *more > 0 { p.dim { "And " (more) " more." } }
            dl { @for (what, fact) in facts { dt { (what) } dd { (fact) } } }
        }
    }
}
