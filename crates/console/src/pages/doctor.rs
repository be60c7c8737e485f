//! Every check of `outbox-relay doctor` that needs the database alone.

use maud::html;
use outbox_relay::command::doctor::{Outcome, examine};

use crate::{
    outbox::Outbox,
    page::{Page, Refused, level},
    verdict::Level,
};

/// The page.
pub async fn page(outbox: &Outbox) -> Result<Page, Refused> {
    // Two connections more, so one examination at a time.
    let Ok(_one) = outbox.examining.try_acquire() else {
        return Err(Refused::away("another page examines it just now"));
    };
    let (mut conn, mut second) = (outbox.database.connect().await?, outbox.database.connect().await?);
    let checks = examine(&mut conn, &mut second, outbox.relay.as_deref()).await;
    let mut checks = checks.map_err(|error| Refused::away(&format!("{error:#}")))?;
    // The permissions are asked for as a relay needs them, which the console's role does not.
    checks.retain(|check| check.name != "permissions");
    checks.sort_by_key(|check| match check.state {
        Outcome::Problem => 0,
        Outcome::Warning => 1,
        Outcome::Skipped => 2,
        Outcome::Ok => 3,
    });
    let body = html! {
        p { a href={ "/outbox/" (outbox.name) } { "Outbox " (outbox.name) } }
        section #checks aria-label="Checks" { div.scroll { table {
            thead { tr { th scope="col" { "Check" } th scope="col" { "State" } th scope="col" { "Finding" } th scope="col" { "What to do" } } }
            tbody { @for check in &checks { tr {
                th scope="row" { (escape::line(&check.name)) }
                td { @match check.state {
                    Outcome::Problem => (level(Level::Broken)),
                    Outcome::Warning => (level(Level::Attention)),
                    Outcome::Ok => (level(Level::Well)),
                    Outcome::Skipped => "Skipped",
                } }
                td { (escape::line(&check.finding)) }
                td { (escape::line(check.advice.as_deref().unwrap_or_default())) }
            } } }
        } } }
    };
    Ok(Page::still(format!("Checks of {}", outbox.name), body))
}
