//! Find an event or an aggregate: its way on one line of time.

use maud::{Markup, html};
use outbox_relay::command::trace::Target;

use super::{inbox::aggregate, time};
use crate::{
    Console,
    access::{Role, User},
    page::{Page, token},
    way::{EVENTS, Found, Step, Way, find},
};

/// What was found of `query`. `scan`: also where the id's time is not that of its row.
pub async fn page(console: &Console, query: &str, scan: bool, user: &User) -> Page {
    if query.is_empty() {
        return Page::still(
            "Find",
            html! { p { "Type the id of an event (AMQP's message id), or an aggregate: TYPE/ID." } },
        );
    }
    let target: Target = match query.parse() {
        Ok(target) => target,
        Err(rule) => {
            return Page::still("Find", html! { p role="alert" { "This is nothing to find: " (rule) "." } });
        }
    };
    let found = find(console, &target, scan).await;
    let title = match &target {
        Target::Event(id) => format!("Event {id}"),
        Target::Aggregate(type_, id) => format!("Aggregate {type_}/{id}"),
    };
    Page::live(
        title,
        html! {
            p #freshness role="status" {}
            (result(&target, &found, scan, user))
        },
    )
}

fn result(target: &Target, found: &Found, scan: bool, user: &User) -> Markup {
    html! {
        section #found {
            @for reason in &found.away { p role="alert" { (reason) } }
            @if found.ways.is_empty() {
                p.verdict {
                    @match target {
                        Target::Aggregate(..) => "No event of this aggregate is stored in an outbox, or held in an inbox, of this console.",
                        Target::Event(_) => "This event is stored in no outbox, and held in no inbox, of this console.",
                    }
                }
                p { "It belongs to another database, its transaction did not commit, or its partition was retired." }
                @if let (Target::Event(id), false) = (target, scan) {
                    p { a href={ "/find?scan=1&q=" (id) } { "Search all stored events" } ", also where the id's time is not that of the event." }
                }
            }
            @if !found.inboxes.is_empty() {
                ul { @for step in &found.inboxes { li { (place(step)) } } }
            }
            @for way in &found.ways { (of_way(way, matches!(target, Target::Event(_)), user)) }
            @if i64::try_from(found.ways.len()).is_ok_and(|count| count >= EVENTS) {
                p.dim { "These are the last " (EVENTS) ". outbox-relay trace shows more." }
            }
        }
    }
}

fn of_way(way: &Way, is_alone: bool, user: &User) -> Markup {
    html! {
        h2 { "Version " (way.version) ": " (escape::line(&way.type_)) }
        p.dim {
            @if is_alone { "Of " (aggregate(&way.aggregate.0, &way.aggregate.1)) } @else {
                a href={ "/find?q=" (way.id) } { (way.id) }
            }
        }
        ol.way { @for step in &way.steps { li { (place(step)) } } }
        @if is_alone && user.role >= Role::Bodies {
            @if let Some((outbox, position)) = &way.stored {
                form.act method="post" action={ "/outbox/" (outbox) "/body" } {
                    (token(user))
                    input type="hidden" name="position" value=(position);
                    label { "Why" input name="why" required maxlength="1000" autocomplete="off"; }
                    button { "Show the body" }
                }
            }
        }
    }
}

fn place(step: &Step) -> Markup {
    html! {
        @if let Some(at) = step.at { (time(at)) " " }
        b { (step.place) } ": "
        @if step.is_trouble { span.level.attention { span aria-hidden="true" { "\u{26a0}" } " " } }
        (escape::line(&step.text))
    }
}

/// The body of an event, which was noted in the audit.
pub fn body(outbox: &str, position: i64, body: Option<&str>) -> Page {
    let text = html! {
        section #body aria-label="Body" {
            p.dim { "This reading is in the audit, with your name and your reason." }
            @match body {
                // Line breaks stay; what is invisible becomes visible.
                Some(body) => pre { (escape::lines(body)) },
                None => p { "There is no event at this position any more." },
            }
            p { a href={ "/outbox/" (outbox) } { "Outbox " (outbox) } }
        }
    };
    Page::still(format!("Body of the event at position {position}"), text)
}
