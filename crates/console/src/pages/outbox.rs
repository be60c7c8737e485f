//! An outbox: its verdict, its relays, its database.

use maud::{Markup, html};
use outbox_relay::command::{span, status::RelayStatus};

use super::{findings, freshness, time};
use crate::{
    Console,
    access::{Role, User},
    broker::{Broker, Queue},
    outbox::{Look, Outbox},
    page::{Page, token},
    plot,
    verdict::{backlog, of_outbox},
    watch::Seen,
};

/// How many queues are shown.
const SHOWN: usize = 20;

/// Its page.
pub async fn page(console: &Console, outbox: &Outbox, user: &User) -> Page {
    let broker = match &console.broker {
        Some(broker) => Some((broker, broker.watch.latest().await)),
        None => None,
    };
    let subscribers = subscribers(console, outbox).await;
    let seen = outbox.watch.latest().await;
    let found = of_outbox(outbox, &seen);
    Page::live(
        format!("Outbox {}", outbox.name),
        html! {
            (freshness(&seen))
            (findings(&found))
            @if let Some(good) = &seen.good {
                @for relay in &good.look.status.relays { (of_relay(outbox, relay, user)) }
                (of_database(&good.look, &outbox.address))
            }
            @if !subscribers.is_empty() {
                section #subscribers aria-labelledby="subscribers-are" {
                    h2 #subscribers-are { "Subscribers" }
                    dl { @for (inbox, lag) in &subscribers { dt { a href={ "/inbox/" (inbox) } { "Inbox " (inbox) } } dd { (lag) } } }
                }
            }
            @if let Some((broker, seen)) = &broker { (of_broker(broker, seen)) }
            p { a href={ "/outbox/" (outbox.name) "/doctor" } { "Every check of this outbox" } }
            section #hour aria-labelledby="hour-is" {
                h2 #hour-is { "The last hour" }
                (plot::hour(&outbox.samples.all()))
            }
        },
    )
}

fn of_relay(outbox: &Outbox, relay: &RelayStatus, user: &User) -> Markup {
    html! {
        section id={ "relay-" (relay.name) } aria-label={ "Relay " (relay.name) } {
            h2 { "Relay " (relay.name) }
            dl {
                dt { "Leader" } dd { (escape::line(&relay.leader_text())) }
                dt { "Backlog" } dd { (backlog(&relay.backlog)) }
                @if let Some(rate) = &relay.rate { dt { "Rate" } dd { (rate.text()) } }
                dt { "Position" }
                dd {
                    "settled up to " (relay.position.low_water) ", read up to " (relay.position.high)
                    ", handed out up to " (relay.position.mark)
                }
                @if relay.open.ranges > 0 { dt { "Open" } dd { (relay.open.text()) } }
                @if let Some(paused) = &relay.paused {
                    dt { "Paused" }
                    dd { "since " (time(paused.since)) @if let Some(by) = &paused.by { " by " (escape::line(by)) } }
                }
                @for waiting in &relay.waiting { dt { "Waits for" } dd { (escape::line(&waiting.text())) } }
                dt { "Set aside" }
                dd { a href={ "/outbox/" (outbox.name) "/parked?relay=" (relay.name) } { (relay.parked.text()) } }
            }
            @if user.role >= Role::Act { (pause(outbox, relay, user)) }
            @if !relay.waiting_events.is_empty() {
                h3 { "Events that wait" }
                p { (relay.waiting_events.text()) }
                div.scroll { table {
                    thead { tr { th scope="col" { "Type" } th scope="col" { "Why" } th.number scope="col" { "Aggregates" } th scope="col" { "Since" } th scope="col" { "Oldest" } } }
                    tbody { @for group in &relay.waiting_events.groups { tr {
                        td { (escape::line(&group.type_)) }
                        td { (group.reason) ": " (escape::line(&group.detail)) }
                        td.number { (group.aggregates) }
                        td { (time(group.since)) }
                        td { a href={ "/find?q=" (group.oldest) } { (group.oldest) } }
                    } } }
                } }
            }
        }
    }
}

/// How far each inbox that follows it is behind.
async fn subscribers(console: &Console, outbox: &Outbox) -> Vec<(String, String)> {
    let mut lags = Vec::new();
    for follows in console.follows.iter().filter(|follows| follows.outbox.name == outbox.name) {
        let seen = follows.watch.latest().await;
        let lag = seen.good.as_ref().filter(|_| seen.away.is_none()).and_then(|good| good.look.text());
        lags.extend(lag.map(|lag| (follows.inbox.name.clone(), lag)));
    }
    lags
}

/// The queues of the broker with most messages.
fn of_broker(broker: &Broker, seen: &Seen<Vec<Queue>>) -> Markup {
    html! {
        section #queues aria-labelledby="queues-are" {
            h2 #queues-are { "Queues at " (broker.address) }
            @if let Some(away) = &seen.away {
                p role="alert" { "The management API cannot be asked since " (time(away.since)) ": " (escape::line(&away.reason)) "." }
            } @else if let Some(good) = &seen.good {
                @if good.look.is_empty() { p { "There is no queue: nobody subscribes." } } @else { div.scroll { table {
                    thead { tr { th scope="col" { "Queue" } th.number scope="col" { "Ready" } th.number scope="col" { "With consumers" } th.number scope="col" { "Consumers" } th scope="col" { "State" } } }
                    tbody { @for queue in good.look.iter().take(SHOWN) { tr {
                        td { (escape::line(&queue.name)) }
                        td.number { (queue.messages_ready) }
                        td.number { (queue.messages_unacknowledged) }
                        td.number { (queue.consumers) }
                        td { (queue.state.as_deref().unwrap_or_default()) }
                    } } }
                } } }
            }
        }
    }
}

fn pause(outbox: &Outbox, relay: &RelayStatus, user: &User) -> Markup {
    let (path, text, class) = match relay.paused {
        Some(_) => ("resume", "Resume", ""),
        None => ("pause", "Pause", "danger"),
    };
    html! {
        form.act method="post" action={ "/outbox/" (outbox.name) "/" (path) } {
            (token(user))
            input type="hidden" name="relay" value=(relay.name);
            label { "Why" input name="why" required maxlength="1000" autocomplete="off"; }
            button class=(class) { (text) " " (relay.name) }
        }
    }
}

fn of_database(look: &Look, address: &str) -> Markup {
    let holders = &look.status.lock_holders;
    html! {
        section #database aria-labelledby="database-is" {
            h2 #database-is { "Database" }
            dl {
                dt { "Address" } dd { (address) }
                dt { "Source" }
                dd {
                    @match (&look.overview.source, look.overview.incarnation) {
                        (Some(source), Some(incarnation)) if incarnation > 1 => { (source) ", incarnation " (incarnation) }
                        (Some(source), _) => { (source) }
                        _ => { "none" }
                    }
                }
                dt { "Partitions" }
                dd {
                    @match look.overview.partitions_end {
                        Some(end) => { (end - look.overview.last_position - 1) " positions ahead of the last one" }
                        None => { "none ahead" }
                    }
                }
                @if look.overview.pending_erasures > 0 {
                    dt { "Erasures" } dd { (look.overview.pending_erasures) " under way" }
                }
                dt { "Outbox lock" }
                dd {
                    @if holders.is_empty() { "held by nobody" } @else {
                        ul { @for holder in holders.iter().take(10) { li { (escape::line(&holder.text())) } } }
                        @if holders.len() > 10 { "and " (holders.len() - 10) " more, all younger" }
                    }
                }
                dt { "Long transactions" }
                dd {
                    @if look.long_transactions.is_empty() { "none" } @else {
                        ul { @for open in &look.long_transactions { li {
                            "pid " (open.pid) " ("
                            (escape::line(open.application_name.as_deref().filter(|name| !name.is_empty()).unwrap_or("without a name")))
                            @if let Some(state) = &open.state { ", " (state) } "), for " (span(open.seconds))
                        } } }
                    }
                }
                @for table in &look.unvacuumed {
                    dt { "Dead rows" }
                    dd {
                        (escape::line(&table.name)) ": " (table.dead) " dead, " (table.live) " live, vacuumed "
                        @if let Some(at) = table.vacuumed_at { (time(at)) } @else { "never" }
                    }
                }
            }
        }
    }
}
