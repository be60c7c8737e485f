//! The events that a relay set aside, and what to do with them.

use std::{collections::BTreeMap, sync::Arc};

use chrono::{DateTime, Utc};
use maud::{Markup, html};
use outbox_relay::command::parked::{self, Group, ParkedEvent, Selection};
use sqlx::PgConnection;
use uuid::Uuid;

use super::{inbox::aggregate, time};
use crate::{
    access::{Role, User},
    job::{Action, Job, Order},
    outbox::Outbox,
    page::{Page, Refused, token},
    routes::Form,
};

/// How many events a page lists.
const LISTED: i64 = 100;
/// The longest reason that an operator may give.
const WHY: usize = 1_000;

const EVENTS: &str = "\
SELECT position, id, type, aggregate_type, aggregate_id, version, reason, detail, attempts, parked_at
FROM outbox.parked_event
WHERE relay = $1 AND state = 'parked' AND position > $2 AND ($3 = '' OR type = $3) AND ($4 = '' OR reason = $4)
ORDER BY position LIMIT $5";

#[derive(Debug, sqlx::FromRow)]
struct Listed {
    position: i64,
    id: Uuid,
    #[sqlx(rename = "type")]
    type_: String,
    aggregate_type: String,
    aggregate_id: String,
    version: i64,
    reason: String,
    detail: String,
    attempts: i32,
    parked_at: DateTime<Utc>,
}

/// Which of them a page lists.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// Of this relay name.
    pub relay: String,
    /// Of this type, unless it is empty.
    pub type_: String,
    /// With this reason, unless it is empty.
    pub reason: String,
    /// Above this position.
    pub after: i64,
}

/// The page.
pub async fn page(outbox: &Outbox, listing: &Listing, user: &User) -> Result<Page, Refused> {
    let relay = relay_of(outbox, &listing.relay)?;
    let mut conn = outbox.pool.acquire().await?;
    let groups = groups(&mut conn, &relay).await?;
    let events: Vec<Listed> = sqlx::query_as(EVENTS)
        .bind(&relay)
        .bind(listing.after)
        .bind(&listing.type_)
        .bind(&listing.reason)
        .bind(LISTED)
        .fetch_all(&mut *conn)
        .await?;
    drop(conn);
    let base = format!("/outbox/{}/parked?relay={relay}", outbox.name);
    let filtered = format!("{base}&type={}&reason={}", encoded(&listing.type_), encoded(&listing.reason));
    let body = html! {
        p { a href={ "/outbox/" (outbox.name) } { "Outbox " (outbox.name) } ", relay " (relay) }
        section #groups aria-labelledby="groups-are" {
            h2 #groups-are { "By cause" }
            @if groups.is_empty() { p { "Nothing is set aside." } } @else { (causes(&groups, &base)) }
        }
        @if user.role >= Role::Act && !groups.is_empty() { (form(outbox, &relay, listing, user)) }
        section #events aria-labelledby="events-are" {
            h2 #events-are { "Events" @if !listing.type_.is_empty() { " of type " (escape::line(&listing.type_)) } @if !listing.reason.is_empty() { ", " (listing.reason) } }
            @if !listing.type_.is_empty() || !listing.reason.is_empty() { p { a href=(base) { "All of them" } } }
            (list(&events))
            @if let Some(last) = events.last() {
                @if i64::try_from(events.len()).is_ok_and(|count| count >= LISTED) { p { a href={ (filtered) "&after=" (last.position) } { "The next ones" } } }
            }
        }
    };
    Ok(Page::still(format!("Set aside in {}", outbox.name), body))
}

async fn groups(conn: &mut PgConnection, relay: &str) -> Result<Vec<Group>, Refused> {
    parked::groups(conn, relay).await.map_err(|error| Refused::away(&format!("{error:#}")))
}

/// A relay name that is known: the only one, where none is named.
pub fn relay_of(outbox: &Outbox, name: &str) -> Result<String, Refused> {
    let seen = outbox.watch.last();
    let Some(good) = &seen.good else { return Err(Refused::away("it has not responded yet")) };
    let mut names = good.look.status.relays.iter().map(|relay| &relay.name);
    let found = if name.is_empty() { names.next() } else { names.find(|known| *known == name) };
    found.cloned().ok_or_else(Refused::unknown)
}

fn encoded(text: &str) -> String {
    url::form_urlencoded::byte_serialize(text.as_bytes()).collect()
}

fn causes(groups: &[Group], base: &str) -> Markup {
    html! {
        div.scroll { table {
            thead { tr { th scope="col" { "Why" } th scope="col" { "Type" } th.number scope="col" { "Events" } th scope="col" { "Oldest since" } th.number scope="col" { "Tries" } th scope="col" { "Next try" } } }
            tbody { @for group in groups { tr {
                td { (group.reason) ": " (escape::line(&group.detail)) }
                td { a href={ (base) "&type=" (encoded(&group.type_)) "&reason=" (encoded(&group.reason)) } { (escape::line(&group.type_)) } }
                td.number { (group.events) }
                td { (time(group.oldest_parked_at)) }
                td.number { (group.attempts) }
                td { @match group.next_attempt_at { Some(at) => (time(at)), None => "by hand only" } }
            } } }
        } }
    }
}

fn list(events: &[Listed]) -> Markup {
    html! {
        div.scroll { table {
            thead { tr { th scope="col" { "Event" } th scope="col" { "Type" } th scope="col" { "Aggregate" } th scope="col" { "Why" } th.number scope="col" { "Tries" } th scope="col" { "Since" } } }
            tbody { @for event in events { tr {
                td { a href={ "/find?q=" (event.id) } { (event.id) } }
                td { (escape::line(&event.type_)) }
                td { (aggregate(&event.aggregate_type, &event.aggregate_id)) ", version " (event.version) }
                td { (event.reason) ": " (escape::line(&event.detail)) }
                td.number { (event.attempts) }
                td { (time(event.parked_at)) }
            } } }
        } }
    }
}

/// The first of two steps.
fn form(outbox: &Outbox, relay: &str, listing: &Listing, user: &User) -> Markup {
    html! {
        section #act aria-labelledby="act-is" {
            h2 #act-is { "Try again, or give up" }
            p.dim {
                "The next page says which events it would be, and changes nothing. Of events that no queue takes, all of a type "
                "are tried together. Events that are given up are never published: a subscriber that follows versions waits for "
                "each of them until a baseline."
            }
            form.act method="post" action={ "/outbox/" (outbox.name) "/parked" } {
                (token(user))
                input type="hidden" name="relay" value=(relay);
                label { "Type (order.* for several)" input name="type" value=(listing.type_) maxlength="255"; }
                label { "Reason" select name="reason" {
                    option value="" { "any" }
                    @for reason in ["unroutable", "refused", "nacked", "silent"] { option value=(reason) selected[listing.reason == reason] { (reason) } }
                } }
                label { "Only the event" input name="id" maxlength="36"; }
                label { "At most a second" input name="rate" type="number" min="1" max="500" placeholder="no limit"; }
                label { "Why" input name="why" required maxlength=(WHY); }
                button name="do" value="retry" { "Try again..." }
                button.danger name="do" value="drop" { "Give up..." }
            }
        }
    }
}

/// What a form asks for.
pub fn order(form: &Form, relay: String, user: &User) -> Result<Order, Refused> {
    let wrong = |text: &str| Refused::new(poem::http::StatusCode::UNPROCESSABLE_ENTITY, text);
    let action = match form.field("do") {
        "retry" => Action::Retry,
        "drop" => Action::Drop,
        _ => return Err(wrong("The form should say what to do.")),
    };
    let text = |name: &str| Some(form.field(name).to_owned()).filter(|text| !text.is_empty());
    let id = match text("id") {
        Some(id) => vec![id.parse().map_err(|_| wrong("An event's id is a UUID."))?],
        None => Vec::new(),
    };
    let rate = match text("rate") {
        Some(rate) => {
            let rate = rate.parse().ok().filter(|rate| (1..=500).contains(rate));
            Some(rate.ok_or_else(|| wrong("At most 500 events a second can be asked for."))?)
        }
        None => None,
    };
    let (type_, reason) = (text("type"), text("reason"));
    let all = id.is_empty() && type_.is_none() && reason.is_none();
    let selection = Selection { id, type_, reason, all };
    Ok(Order { action, relay, selection, rate, operator: user.name.clone(), why: why(form)? })
}

/// The reason that a form gives.
pub fn why(form: &Form) -> Result<String, Refused> {
    let why = form.field("why");
    if why.is_empty() || why.chars().count() > WHY {
        let text = "Say why: it is written to the audit, with your name.";
        return Err(Refused::new(poem::http::StatusCode::UNPROCESSABLE_ENTITY, text));
    }
    Ok(why.to_owned())
}

/// What the order chooses now.
pub async fn chosen(outbox: &Outbox, order: &Order) -> Result<Vec<ParkedEvent>, Refused> {
    let mut conn = outbox.pool.acquire().await?;
    let events = parked::selected(&mut conn, &order.relay, &order.selection).await;
    events.map_err(|error| Refused::away(&format!("{error:#}")))
}

/// The second step: what it would be. `before`: how many it was when the operator confirmed.
pub fn confirm(outbox: &Outbox, order: &Order, events: &[ParkedEvent], form: &Form, user: &User) -> Page {
    let (verb, class) = match order.action {
        Action::Retry => ("tried again", ""),
        Action::Drop => ("given up, and never published", "danger"),
    };
    let mut types: BTreeMap<&str, usize> = BTreeMap::new();
    for event in events {
        *types.entry(&event.type_).or_default() += 1;
    }
    let body = html! {
        section #confirm aria-label="What it would be" {
            @if !form.field("count").is_empty() {
                p role="alert" { "Meanwhile it is another number of events than you confirmed: " (form.field("count")) ". Nothing was changed." }
            }
            @if events.is_empty() { p.verdict { "Nothing that is set aside matches." } } @else {
                p.verdict { (events.len()) @if events.len() == 1 { " event" } @else { " events" } " would be " (verb) "." }
                ul { @for (type_, count) in &types { li { (count) " of type " (escape::line(type_)) } } }
                p { "The oldest: " @for event in events.iter().take(5) { a href={ "/find?q=" (event.id) } { (event.id) } " " } }
                form.act method="post" action={ "/outbox/" (outbox.name) "/parked" } {
                    (token(user))
                    @for name in ["relay", "do", "type", "reason", "id", "rate", "why"] { input type="hidden" name=(name) value=(form.field(name)); }
                    input type="hidden" name="count" value=(events.len());
                    button class=(class) { "Do it" }
                }
            }
            p { a href={ "/outbox/" (outbox.name) "/parked?relay=" (order.relay) } { "Back" } }
        }
    };
    Page::still(format!("Set aside in {}", outbox.name), body)
}

/// An action that goes on, or has ended.
pub fn job(job: &Arc<Job>, user: &User) -> Page {
    let (done, all) = (job.done(), job.all);
    let end = job.end();
    let body = html! {
        section #job aria-label="Progress" {
            p.verdict role="status" {
                @match &end {
                    Some((_, said)) => { "It is " (said) ": " (done) " of " (all) " events." }
                    None => { (done) " of " (all) " events so far." }
                }
            }
            progress max=(all.max(1)) value=(done) aria-label="Progress" {}
            dl {
                dt { "What" } dd { (job.order.action.as_str()) " in outbox " (job.outbox) ", relay " (job.order.relay) }
                dt { "Who" } dd { (job.order.operator) }
                dt { "Why" } dd { (escape::line(&job.order.why)) }
                dt { "Began" } dd { (time(job.began)) }
                @if let Some((at, _)) = &end { dt { "Ended" } dd { (time(*at)) } }
            }
            @if end.is_none() && user.role >= Role::Act {
                form.act method="post" action={ "/job/" (job.id) "/stop" } { (token(user)) button { "Stop" } }
            }
            p { a href={ "/outbox/" (job.outbox) } { "Outbox " (job.outbox) } }
        }
    };
    if end.is_some() { Page::still("Action", body) } else { Page::live("Action", body) }
}
