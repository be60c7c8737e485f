//! What each route does.

use std::{str::FromStr, sync::Arc};

use outbox_relay::command::pause;
use poem::{Request, http::StatusCode};
use serde_json::json;
use url::form_urlencoded;

use crate::{
    Console,
    access::{Role, User},
    audit::{self, Entry},
    inbox::Inbox,
    job::NotBegun,
    outbox::Outbox,
    page::{Page, Refused},
    pages::{self, parked::Listing},
    routes::Form,
};

/// What is looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) enum View {
    All,
    Outbox,
    Doctor,
    Parked,
    Job,
    Inbox,
    Find,
    Audit,
}

/// What is done.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Act {
    Parked,
    Pause,
    Resume,
    Body,
    StopJob,
    Redrive,
    StopRequest,
}

/// What an action comes to.
pub(crate) enum Done {
    /// A page that says more.
    Page(Page),
    /// The page on which the result is seen.
    GoTo(String),
}

/// A parameter of the query; empty where there is none.
pub(crate) fn query(request: &Request, name: &str) -> String {
    let pairs = form_urlencoded::parse(request.uri().query().unwrap_or_default().as_bytes());
    let mut found = pairs.filter(|(other, _)| other == name);
    found.next().map_or(String::new(), |(_, value)| value.trim().to_owned())
}

impl Console {
    fn outbox(&self, name: &str) -> Result<&Arc<Outbox>, Refused> {
        self.outboxes.get(name).ok_or_else(Refused::unknown)
    }

    fn inbox(&self, name: &str) -> Result<&Arc<Inbox>, Refused> {
        self.inboxes.get(name).ok_or_else(Refused::unknown)
    }
}

/// The page that a request asks for. `name`: of the path.
pub(crate) async fn show(
    console: &Console,
    view: View,
    name: &str,
    request: &Request,
    user: &User,
) -> Result<Page, Refused> {
    let query = |name| query(request, name);
    match view {
        View::All => Ok(pages::all::page(console).await),
        View::Outbox => Ok(pages::outbox::page(console, console.outbox(name)?, user).await),
        View::Doctor => pages::doctor::page(console.outbox(name)?).await,
        View::Parked => {
            let after = query("after").parse().unwrap_or_default();
            let listing =
                Listing { relay: query("relay"), type_: query("type"), reason: query("reason"), after };
            pages::parked::page(console.outbox(name)?, &listing, user).await
        }
        View::Job => {
            let job = name.parse().ok().and_then(|id| console.jobs.get(id));
            Ok(pages::parked::job(&job.ok_or_else(Refused::unknown)?, user))
        }
        View::Inbox => Ok(pages::inbox::page(console, console.inbox(name)?, user).await),
        View::Find => Ok(pages::find::page(console, &query("q"), query("scan") == "1", user).await),
        View::Audit => Ok(pages::audit::page(console).await),
    }
}

/// Does what a form asks for. `name`: of the path.
pub(crate) async fn act(
    console: &Console,
    act: Act,
    name: &str,
    form: &Form,
    user: &User,
) -> Result<Done, Refused> {
    match act {
        Act::Parked => parked(console, console.outbox(name)?, form, user).await,
        Act::Pause => set_paused(console.outbox(name)?, form, user, true).await,
        Act::Resume => set_paused(console.outbox(name)?, form, user, false).await,
        Act::Body => body(console.outbox(name)?, form, user).await,
        Act::StopJob => {
            let job = name.parse().ok().and_then(|id| console.jobs.get(id)).ok_or_else(Refused::unknown)?;
            job.stop();
            Ok(Done::GoTo(format!("/job/{}", job.id)))
        }
        Act::Redrive => redrive(console.inbox(name)?, form, user).await,
        Act::StopRequest => {
            let inbox = console.inbox(name)?;
            let id = number(form.field("request"))?;
            let mut conn = inbox.pool.acquire().await?;
            inbox::requests::stop(&mut conn, &inbox.consumer, id).await?;
            inbox.watch.is_stale();
            Ok(Done::GoTo(format!("/inbox/{}", inbox.name)))
        }
    }
}

fn number<N: FromStr>(text: &str) -> Result<N, Refused> {
    text.parse().map_err(|_| Refused::new(StatusCode::UNPROCESSABLE_ENTITY, "The form lacks a number."))
}

async fn parked(console: &Console, outbox: &Arc<Outbox>, form: &Form, user: &User) -> Result<Done, Refused> {
    let relay = pages::parked::relay_of(outbox, form.field("relay"))?;
    let order = pages::parked::order(form, relay, user)?;
    let events = pages::parked::chosen(outbox, &order).await?;
    // Two operators may do the same: what is done is what was confirmed.
    let confirmed: Option<usize> = form.field("count").parse().ok();
    if events.is_empty() || confirmed != Some(events.len()) {
        return Ok(Done::Page(pages::parked::confirm(outbox, &order, &events, form, user)));
    }
    match console.jobs.begin(outbox, order, events) {
        Ok(job) => Ok(Done::GoTo(format!("/job/{}", job.id))),
        Err(NotBegun::Busy(job)) => Err(Refused::new(
            StatusCode::CONFLICT,
            format!(
                "{} has begun to {} events of this outbox, and it goes on. Nothing was changed. Wait for its end, or stop \
                 it: /job/{}",
                job.order.operator,
                job.order.action.as_str(),
                job.id
            ),
        )),
        Err(NotBegun::TooMany) => Err(Refused::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "Too many actions are under way. Nothing was changed. Wait for the end of one.",
        )),
    }
}

async fn set_paused(outbox: &Outbox, form: &Form, user: &User, pauses: bool) -> Result<Done, Refused> {
    let relay = pages::parked::relay_of(outbox, form.field("relay"))?;
    let why = pages::parked::why(form)?;
    let mut conn = outbox.pool.acquire().await?;
    let action = if pauses { "pause" } else { "resume" };
    let entry = Entry { operator: &user.name, action, target: &relay, why: &why };
    audit::add(&mut conn, entry, json!({})).await?;
    let by = pauses.then(|| format!("{} ({why})", user.name));
    let set = pause::set(&mut conn, &relay, by.as_deref()).await;
    set.map_err(|error| Refused::away(&format!("{error:#}")))?;
    outbox.watch.is_stale();
    Ok(Done::GoTo(format!("/outbox/{}", outbox.name)))
}

async fn body(outbox: &Outbox, form: &Form, user: &User) -> Result<Done, Refused> {
    if user.role < Role::Bodies {
        let text = "Your role may not see bodies. Roles stand in the table [role] of the console's file.";
        return Err(Refused::new(StatusCode::FORBIDDEN, text));
    }
    let position: i64 = number(form.field("position"))?;
    let why = pages::parked::why(form)?;
    let mut conn = outbox.pool.acquire().await?;
    // It writes the audit's row itself.
    let body: Option<String> = sqlx::query_scalar("SELECT outbox.show_body($1, $2, $3)")
        .bind(position)
        .bind(&user.name)
        .bind(&why)
        .fetch_one(&mut *conn)
        .await?;
    Ok(Done::Page(pages::find::body(&outbox.name, position, body.as_deref())))
}

async fn redrive(inbox: &Inbox, form: &Form, user: &User) -> Result<Done, Refused> {
    let wrong = |text: &str| Refused::new(StatusCode::UNPROCESSABLE_ENTITY, text);
    let text = |name: &str| Some(form.field(name).to_owned()).filter(|text| !text.is_empty());
    let aggregate = match text("aggregate") {
        Some(aggregate) => match aggregate.split_once('/') {
            Some((type_, id)) if !type_.is_empty() && !id.is_empty() => {
                Some((type_.to_owned(), id.to_owned()))
            }
            _ => return Err(wrong("An aggregate is TYPE/ID.")),
        },
        None => None,
    };
    let reason = text("reason");
    if reason.as_ref().is_some_and(|reason| !["poison", "gap", "trying", "behind"].contains(&reason.as_str()))
    {
        return Err(wrong("There is no such reason."));
    }
    let dry_run = match form.field("dry") {
        "yes" => true,
        "no" => false,
        _ => return Err(wrong("The form should say whether it is a dry run.")),
    };
    let why = pages::parked::why(form)?;
    let filter = inbox::held::Filter { aggregate, reason, error: text("error") };
    let ask = inbox::requests::Ask { filter: &filter, dry_run, operator: &user.name, why: &why };
    let mut conn = inbox.pool.acquire().await?;
    inbox::requests::ask(&mut conn, &inbox.consumer, &ask).await?;
    inbox.watch.is_stale();
    Ok(Done::GoTo(format!("/inbox/{}", inbox.name)))
}
