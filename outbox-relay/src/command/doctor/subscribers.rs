//! `doctor`'s look for the expected subscribers: the same as the relay's own.

use crate::subscribers::{Expectations, Fault, Found, Passive, Subscribers};

use super::Check;

/// A check for each expected queue; none when no subscriber is expected.
pub(super) async fn checks(subscribers: Option<Subscribers>, expected: Option<&Expectations>) -> Vec<Check> {
    let skipped = |why: &str| -> Vec<Check> {
        let expected = expected.into_iter().flat_map(|expected| &expected.0);
        expected.map(|expectation| Check::skipped(name(&expectation.queue), why)).collect()
    };
    let Some(subscribers) = subscribers else {
        return skipped("AMQP_URL (or AMQP_URL_FILE) is not set");
    };
    let mut passive = Passive::new("outbox-relay doctor");
    let looked = subscribers.look(&mut passive).await;
    passive.close().await;
    match looked {
        Ok(looked) => {
            let management = looked
                .management
                .map(|Fault { finding, advice }| Check::problem("management API", finding, advice));
            management.into_iter().chain(looked.found.into_iter().map(check)).collect()
        }
        Err(_) => skipped("the broker cannot be reached"),
    }
}

fn name(queue: &str) -> String {
    format!("subscriber {queue}")
}

fn check(found: Found) -> Check {
    let name = name(&found.queue);
    if found.faults.is_empty() {
        return Check::ok(name, found.known);
    }
    let all = |of: fn(&Fault) -> &str| found.faults.iter().map(of).collect::<Vec<_>>().join("; ");
    let also = if found.known.is_empty() { String::new() } else { format!("; {}", found.known) };
    Check::problem(name, format!("{}{also}", all(|fault| &fault.finding)), all(|fault| &fault.advice))
}
