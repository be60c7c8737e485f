//! An inbox: what is held and rejected.

use std::fmt::Write as _;

use inbox::requests::Request;
use maud::{Markup, html};
use outbox_relay::command::many;

use super::{findings, freshness, time};
use crate::{
    Console,
    access::{Role, User},
    broker::{QUEUES, Queue},
    inbox::{Inbox, Look},
    page::{Page, token},
    verdict::of_inbox,
};

/// Its page.
pub async fn page(console: &Console, inbox: &Inbox, user: &User) -> Page {
    let seen = inbox.watch.latest().await;
    let queues = queues(console, inbox).await;
    let found = of_inbox(inbox, &seen, &queues);
    let lags = lags(console, inbox).await;
    Page::live(
        format!("Inbox {}", inbox.name),
        html! {
            (freshness(&seen))
            (findings(&found))
            @if let Some(good) = &seen.good { (of_look(inbox, &good.look, &lags, &queues, user)) }
        },
    )
}

fn of_look(inbox: &Inbox, look: &Look, lags: &[(String, String)], queues: &Queues, user: &User) -> Markup {
    html! {
        section #follows aria-labelledby="follows-is" {
            h2 #follows-is { "What it follows" }
            dl {
                dt { "Consumer" } dd { (inbox.consumer) }
                @for (name, incarnation) in &look.sources {
                    dt { "Source" } dd { (escape::line(name)) @if *incarnation > 1 { ", incarnation " (incarnation) } }
                }
                @for (outbox, lag) in lags { dt { "Behind outbox " (outbox) } dd { (lag) } }
                @for (name, queue) in &queues.found {
                    dt { "Queue " (name) }
                    dd {
                        @match queue {
                            Some(queue) => {
                                (queue.messages_ready) " messages ready, " (queue.messages_unacknowledged) " with consumers, "
                                (many(queue.consumers, "consumer"))
                            }
                            None => "not among the queues of the broker",
                        }
                    }
                }
                @if let Some(reason) = &queues.away { dt { "Broker" } dd { (reason) } }
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
            @if user.role >= Role::Act && !look.held.groups.is_empty() { (redrive(inbox, look, user)) }
            @if look.held.more > 0 { p.dim { "And " (look.held.more) " more causes." } }
        }
        @if !look.requests.is_empty() { (requests(inbox, &look.requests, user)) }
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

/// The queues of an inbox at the broker.
#[derive(Debug, Default)]
pub struct Queues {
    /// Each with what the broker knows of it.
    pub found: Vec<(String, Option<Queue>)>,
    /// Why the broker cannot be asked.
    pub away: Option<String>,
}

/// What the broker says of the queues of an inbox; nothing where its management API is not known.
pub(super) async fn queues(console: &Console, inbox: &Inbox) -> Queues {
    let Some(broker) = console.broker.as_ref().filter(|_| !inbox.queues.is_empty()) else {
        return Queues::default();
    };
    let seen = broker.watch.latest().await;
    if let Some(away) = &seen.away {
        let reason = format!(
            "The management API at {} cannot be asked: {}",
            broker.address,
            escape::line(&away.reason)
        );
        return Queues { found: Vec::new(), away: Some(reason) };
    }
    let Some(good) = &seen.good else { return Queues::default() };
    let find = |name: &String| (name.clone(), good.look.iter().find(|queue| queue.name == *name).cloned());
    // Of very many queues, those with most messages are known, and of another one nothing is.
    let all = good.look.len() < QUEUES;
    let found = inbox.queues.iter().map(find).filter(|(_, queue)| all || queue.is_some());
    Queues { found: found.collect(), away: None }
}

/// How far an inbox is behind each outbox that it follows.
pub(super) async fn lags(console: &Console, inbox: &Inbox) -> Vec<(String, String)> {
    let mut lags = Vec::new();
    for follows in console.follows.iter().filter(|follows| follows.inbox.name == inbox.name) {
        let seen = follows.watch.latest().await;
        let text = match (&seen.away, &seen.good) {
            (Some(away), _) => Some(format!("unknown: {}", escape::line(&away.reason))),
            (None, Some(good)) => good.look.text(),
            (None, None) => None,
        };
        lags.extend(text.map(|text| (follows.outbox.name.clone(), text)));
    }
    lags
}

/// Asks the subscriber: only it has the handler.
fn redrive(inbox: &Inbox, look: &Look, user: &User) -> Markup {
    html! {
        h3 { "Apply them again" }
        p.dim {
            "The subscriber does it, with its own handler, beside what it consumes. A dry run calls the handler and rolls back."
        }
        form.act method="post" action={ "/inbox/" (inbox.name) "/redrive" } {
            (token(user))
            label { "Which" select name="reason" {
                option value="" { "all that are held" }
                @if look.held.groups.iter().any(|group| group.reason != "gap") { option value="poison" { "those that the handler refused" } }
            } }
            label { "With an error that contains" input name="error" maxlength="1000" autocomplete="off"; }
            label { "Of the aggregate (TYPE/ID)" input name="aggregate" maxlength="600" autocomplete="off"; }
            label { "Why" input name="why" required maxlength="1000" autocomplete="off"; }
            button name="dry" value="yes" { "Dry run" }
            button.danger name="dry" value="no" { "Apply again" }
        }
    }
}

/// What operators asked for.
fn requests(inbox: &Inbox, requests: &[Request], user: &User) -> Markup {
    html! {
        section #requests aria-labelledby="requests-are" {
            h2 #requests-are { "Asked for" }
            div.scroll { table {
                thead { tr { th scope="col" { "When" } th scope="col" { "Who" } th scope="col" { "What" } th scope="col" { "Why" } th scope="col" { "Outcome" } } }
                tbody { @for request in requests { tr {
                    td { (time(request.asked_at)) }
                    td { (escape::line(&request.operator)) }
                    td { (escape::line(&asked(request))) }
                    td { (escape::line(&request.why)) }
                    td {
                        (escape::line(&outcome(request)))
                        @if !request.errors.is_empty() { ul { @for (error, count) in request.errors.iter().take(10) { li { (count) ": " (escape::line(error)) } } } }
                        @if request.ended_at.is_none() && !request.stop && user.role >= Role::Act {
                            form.act method="post" action={ "/inbox/" (inbox.name) "/stop" } {
                                (token(user))
                                input type="hidden" name="request" value=(request.id);
                                button { "Stop" }
                            }
                        }
                    }
                } } }
            } }
        }
    }
}

/// What a request asks for, for people.
pub(super) fn asked(request: &Request) -> String {
    let mut text = if request.dry_run { "dry run of a redrive" } else { "redrive" }.to_owned();
    if let (Some(type_), Some(id)) = (&request.aggregate_type, &request.aggregate_id) {
        let _ = write!(text, " of {type_}/{id}");
    }
    if let Some(reason) = &request.reason {
        let _ = write!(text, ", {reason}");
    }
    if let Some(error) = &request.error {
        let _ = write!(text, ", with {error:?}");
    }
    text
}

/// What came of it, for people.
pub(super) fn outcome(request: &Request) -> String {
    let Request { aggregates, applied, refused, held, dry_run, .. } = request;
    let counts = format!(
        "{applied} {}, {} tried, {refused} refused again, {} still held",
        if *dry_run { "would be applied" } else { "applied" },
        many(*aggregates, "aggregate"),
        many(*held, "event")
    );
    match (&request.outcome, &request.failure, request.taken_at) {
        (Some(outcome), Some(failure), _) => format!("{outcome}: {failure}; {counts}"),
        (Some(outcome), None, _) => format!("{outcome}: {counts}"),
        (None, _, None) => "no process of the subscriber has begun with it yet".to_owned(),
        (None, ..) if request.stop => format!("stopping: {counts}"),
        (None, ..) => format!("under way: {counts}"),
    }
}

/// An aggregate, with the way to its line of time.
pub(super) fn aggregate(type_: &str, id: &str) -> Markup {
    let query: String = url::form_urlencoded::byte_serialize(format!("{type_}/{id}").as_bytes()).collect();
    html! { a href={ "/find?q=" (query) } { (escape::line(type_)) "/" (escape::line(id)) } }
}
