//! An inbox: what is held and rejected.

use maud::{Markup, html};

use super::{findings, freshness, time};
use crate::{
    inbox::{Inbox, Look},
    page::Page,
    verdict::of_inbox,
};

/// Its page.
pub async fn page(inbox: &Inbox) -> Page {
    let seen = inbox.watch.latest().await;
    let found = of_inbox(inbox, &seen);
    Page::live(
        format!("Inbox {}", inbox.name),
        html! {
            (freshness(&seen))
            (findings(&found))
            @if let Some(good) = &seen.good { (of_look(inbox, &good.look)) }
        },
    )
}

fn of_look(inbox: &Inbox, look: &Look) -> Markup {
    html! {
        section #follows aria-labelledby="follows-is" {
            h2 #follows-is { "What it follows" }
            dl {
                dt { "Consumer" } dd { (inbox.consumer) }
                @for (name, incarnation) in &look.sources {
                    dt { "Source" } dd { (escape::line(name)) @if *incarnation > 1 { ", incarnation " (incarnation) } }
                }
                dt { "Database" } dd { (inbox.address) }
            }
        }
        section #held aria-labelledby="held-is" {
            h2 #held-is { "Held: " (look.held.events) }
            @if !look.held.groups.is_empty() { div.scroll { table {
                thead { tr { th scope="col" { "Why" } th.number scope="col" { "Events" } th.number scope="col" { "Aggregates" } th.number scope="col" { "Tries" } th scope="col" { "Since" } th scope="col" { "Oldest" } } }
                tbody { @for group in &look.held.groups { tr {
                    td { (group.reason) @if let Some(error) = &group.error { ": " (escape::line(error)) } }
                    td.number { (group.events) }
                    td.number { (group.aggregates) }
                    td.number { (group.attempts) }
                    td { (time(group.first_at)) }
                    td { (aggregate(&group.oldest.aggregate_type, &group.oldest.aggregate_id)) ", version " (group.version) }
                } } }
            } } }
            @if look.held.more > 0 { p.dim { "And " (look.held.more) " more causes." } }
        }
        section #rejected aria-labelledby="rejected-is" {
            h2 #rejected-is { "Rejected: " (look.rejected.messages) }
            @if !look.rejected.groups.is_empty() { div.scroll { table {
                thead { tr { th scope="col" { "Why" } th.number scope="col" { "Messages" } th.number scope="col" { "Deliveries" } th scope="col" { "Last" } } }
                tbody { @for group in &look.rejected.groups { tr {
                    td { (group.reason) ": " (escape::line(&group.detail)) }
                    td.number { (group.messages) }
                    td.number { (group.deliveries) }
                    td { (time(group.last_at)) }
                } } }
            } } }
        }
    }
}

/// An aggregate, with the way to its line of time.
pub(super) fn aggregate(type_: &str, id: &str) -> Markup {
    let query: String = url::form_urlencoded::byte_serialize(format!("{type_}/{id}").as_bytes()).collect();
    html! { a href={ "/find?q=" (query) } { (escape::line(type_)) "/" (escape::line(id)) } }
}
