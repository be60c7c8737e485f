//! `doctor`'s look at the relays: leader, pause, and what waits or is set aside.

use sqlx::PgConnection;

use super::Check;
use crate::command::{
    many, span,
    state::{self, RelayRow, Undelivered, Waiting, WaitingGroup},
    time,
};

/// The checks of all relay names, or of the one called `name`.
pub(super) async fn relays(conn: &mut PgConnection, name: Option<&str>) -> Result<Vec<Check>, sqlx::Error> {
    let relays = state::relays(conn, name).await?;
    Ok(relays.iter().flat_map(|(row, undelivered)| relay(row, undelivered)).collect())
}

/// The checks of one relay name.
fn relay(row: &RelayRow, Undelivered { parked, waiting: events }: &Undelivered) -> Vec<Check> {
    let name = |what| format!("relay {}, {what}", row.name);
    let mut checks = vec![leader(name("leader"), row)];
    checks.push(match row.paused_at {
        None => Check::ok(name("paused"), "no"),
        Some(since) => {
            let by = row.paused_by.as_ref().map_or(String::new(), |by| format!(" by {by}"));
            let finding = format!("since {}{by}", time(Some(since)));
            Check::warning(name("paused"), finding, "it goes on with: outbox-relay resume")
        }
    });
    // The pause has its own check, and a leader that is gone waits for nothing.
    let waiting = row.waiting.iter().filter(|waiting| row.leads && waiting.part != "paused");
    let waiting: Vec<_> = waiting.map(Waiting::text).collect();
    checks.push(if !row.leads {
        Check::skipped(name("waiting"), "no relay leads")
    } else if waiting.is_empty() {
        Check::ok(name("waiting"), "for nothing")
    } else {
        Check::problem(
            name("waiting"),
            waiting.join("; "),
            "do what the reason says; it goes on by itself then",
        )
    });
    checks.push(if parked.all() == 0 {
        Check::ok(name("parked"), "nothing is set aside")
    } else {
        let finding = format!("{} set aside: {}", many(parked.all(), "event"), parked.text());
        let advice = "outbox-relay parked list tells why. Unroutable ones are published by themselves once a queue \
                      takes them";
        Check::warning(name("parked"), finding, advice)
    });
    checks.push(if events.is_empty() {
        Check::ok(name("waiting events"), "none")
    } else {
        let groups: Vec<String> = events.groups.iter().map(WaitingGroup::text).collect();
        let mut advice: Vec<String> = events.groups.iter().map(WaitingGroup::advice).collect();
        advice.sort_unstable();
        advice.dedup();
        let advice = format!(
            "{}. They are published by themselves once they are taken; outbox-relay parked list tells more",
            advice.join("; ")
        );
        Check::warning(name("waiting events"), format!("{}: {}", events.text(), groups.join("; ")), advice)
    });
    checks
}

fn leader(name: String, row: &RelayRow) -> Check {
    let age = row.heartbeat_age_seconds.map(span);
    let who = row.leader.as_deref().unwrap_or("somebody");
    match (row.leads, row.leader_pid, age) {
        (true, _, Some(age)) => Check::ok(name, format!("{who}, heartbeat {age} ago")),
        (_, Some(pid), Some(age)) => Check::problem(
            name,
            format!("{who} holds the leader's lock but its last heartbeat was {age} ago"),
            format!(
                "another relay that runs takes over by itself, if its role is the same; otherwise run: SELECT \
                 pg_terminate_backend({pid})"
            ),
        ),
        (_, _, Some(age)) => Check::problem(
            name,
            format!("no leader; the last was {who}, heartbeat {age} ago"),
            "start outbox-relay run with this name; if it runs, its /ready tells what it waits for",
        ),
        (_, _, None) => Check::problem(
            name,
            "no relay has led under this name yet",
            "start outbox-relay run with this name",
        ),
    }
}
