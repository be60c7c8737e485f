//! The commands of `docs/getting-started.md`, run as they stand.

use std::path::Path;

use devstack::{
    ports,
    testing::{DEADLINE, Place},
};
use tokio::process::Command;

/// The blocks of shell of a page, from one heading to another.
fn printed(page: &str, from: &str, to: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(page);
    let text = std::fs::read_to_string(path).unwrap();
    let (_, text) = text.split_once(&format!("\n## {from}")).unwrap();
    let (text, _) = text.split_once(&format!("\n## {to}")).unwrap();
    let blocks = text.split("```sh\n").skip(1).map(|rest| rest.split_once("```").unwrap().0);
    blocks.collect::<Vec<_>>().join("\n")
}

/// The five minutes, but for the first lines and the last: where the servers are, and what is left at the end.
#[tokio::test]
async fn the_tour_shows_what_it_says() {
    let tour = printed("getting-started.md", "1. ", "4. ");
    let tables = tour.find("psql -q \"$DATABASE_URL\" <<'SQL'\nCREATE TABLE").unwrap();
    let tour = &tour[tables..];
    let place = Place::around();
    let (database, broker) = (place.database("relay_tour").await, place.virtual_host("relay_tour").await);
    let (_, vhost) = broker.rsplit_once('/').unwrap();
    let management = format!("{}/api", place.management);
    let program = Path::new(env!("CARGO_BIN_EXE_outbox-relay")).parent().unwrap();
    let path = format!("{}:{}", program.display(), std::env::var("PATH").unwrap());
    let listen = format!("127.0.0.1:{}", ports::free());
    assert_eq!(tour.matches("127.0.0.1:8012").count(), 2, "{tour}");
    let tour = tour.replace("%2f", vhost).replace("127.0.0.1:8012", &listen);
    let script = format!("trap 'kill $relay; wait' EXIT\n{tour}");
    let mut bash = Command::new("bash");
    bash.args(["-eu", "-c", &script]).env("PATH", path).env("LOG", "error");
    bash.env("DATABASE_URL", &database)
        .env("AMQP_URL", &broker)
        .env("MANAGEMENT", management)
        .kill_on_drop(true);
    let done = tokio::time::timeout(DEADLINE, bash.output());
    let done = done.await.expect("the tour ends").unwrap();
    let said = String::from_utf8(done.stdout).unwrap();
    assert!(done.status.success(), "{said}\n{}", String::from_utf8_lossy(&done.stderr));
    let messages: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    // Between aggregates there is no order.
    let mut messages: Vec<&serde_json::Value> = messages.as_array().unwrap().iter().collect();
    messages.sort_by_key(|message| message["properties"]["headers"]["aggregate_id"].to_string());
    let told: Vec<String> = messages
        .iter()
        .map(|message| {
            let body: serde_json::Value = serde_json::from_str(message["payload"].as_str().unwrap()).unwrap();
            let key = message["routing_key"].as_str().unwrap();
            format!("{key} {} {} {}", body["id"], body["status"], body["total"])
        })
        .collect();
    assert_eq!(
        told,
        [
            r#"order.baseline 1 "open" 10"#,
            r#"order.changed 1 "paid" 10"#,
            r#"order.deleted "1" null null"#,
            r#"order.new 2 "open" 12"#,
            r#"order.changed 2 "paid" 12"#,
        ]
    );
}
