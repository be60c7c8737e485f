//! The plain consumer of `docs/examples` and the bindings that `docs/events.md` prints, run as they stand against a broker
//! on which nothing is declared yet.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::json;

use crate::{
    examples::{Program, World, event, id, python},
    support::until,
};

/// The snippet whose fence says `python LABEL`.
fn printed(label: &str) -> String {
    let document =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/events.md")).unwrap();
    let (_, rest) = document.split_once(&format!("```python {label}\n")).unwrap();
    rest.split_once("\n```").unwrap().0.to_owned()
}

/// A file of this test run, which does not exist yet.
fn file(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_file(&path);
    path
}

/// Closes the connections of Python programs to this virtual host, as a broker that restarts does.
async fn close_connections(world: &World) {
    let server = std::env::var(devstack::testing::MANAGEMENT_URL).unwrap();
    let (_, vhost) = world.amqp.rsplit_once('/').unwrap();
    let client = reqwest::Client::new();
    until("a connection is closed", async || {
        let list = client.get(format!("{server}/api/vhosts/{vhost}/connections")).send().await.unwrap();
        let list: serde_json::Value = list.json().await.unwrap();
        let mut closed = false;
        for connection in list.as_array().unwrap() {
            if connection["client_properties"]["product"].as_str().unwrap_or_default().contains("Pika") {
                let name = connection["name"].as_str().unwrap().replace(' ', "%20").replace('>', "%3E");
                let answer = client.delete(format!("{server}/api/connections/{name}")).send().await;
                closed |= answer.is_ok_and(|answer| answer.status().is_success());
            }
        }
        closed
    })
    .await;
}

#[tokio::test]
async fn the_plain_consumer_goes_on_after_erased_events_and_restarts() {
    let world = World::new("printed_plain").await;
    let (output, seen) = (file("plain.out"), file("plain.db"));
    let plain = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/examples/plain.py");
    let start = || -> Program {
        let to = File::options().create(true).append(true).open(&output).unwrap();
        let mut command = python();
        command.arg(&plain).env("SEEN", &seen).env("AMQP_URL", &world.amqp);
        world.start_into(&mut command, to)
    };
    let shows = async |wanted: &str| {
        until("it prints", async || {
            let text = fs::read_to_string(&output).unwrap_or_default();
            let lines: Vec<&str> =
                text.lines().filter(|line| !line.starts_with("the broker is away")).collect();
            lines.join(", ") == wanted
        })
        .await;
    };
    let income = |n: u128, value: u32| {
        let body = json!({"id": id(n), "value": value, "person": {"id": id(n), "cpf": 11111}});
        event("income.new", id(n), 1, &body, None)
    };
    let first = start();
    world.until_consumed("my-incomes").await;
    let (one, erased) =
        (income(1, 10), event("income.new", id(2), 1, &json!({"id": id(2), "erased": true}), Some("erased")));
    for event in [&one, &erased, &one, &income(3, 30)] {
        world.publish(event).await;
    }
    shows("11111 10, 11111 30").await;
    close_connections(&world).await;
    world.publish(&income(4, 40)).await;
    shows("11111 10, 11111 30, 11111 40").await;
    // It prints before it commits, and is killed after that.
    until("what was printed is committed", async || {
        let count = "import os, sqlite3\nstore = sqlite3.connect(os.environ['SEEN'])\n\
                     print(*store.execute('SELECT count(*) FROM seen').fetchone())";
        let output = python().args(["-c", count]).env("SEEN", &seen).output().unwrap();
        String::from_utf8_lossy(&output.stdout).trim() == "4"
    })
    .await;
    drop(first);
    // Its own restart: what it has seen, it knows.
    let _second = start();
    world.until_consumed("my-incomes").await;
    world.publish(&one).await;
    world.publish(&income(5, 50)).await;
    shows("11111 10, 11111 30, 11111 40, 11111 50").await;
}

#[tokio::test]
async fn whoever_follows_versions_binds_on_a_new_broker() {
    let world = World::new("printed_follow").await;
    let connect = "import os, pika\n\
                   channel = pika.BlockingConnection(pika.URLParameters(os.environ['AMQP_URL'])).channel()\n";
    for _ in 0..2 {
        let mut command: Command = python();
        command.args(["-c", &(connect.to_owned() + &printed("follow"))]).env("AMQP_URL", &world.amqp);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    // Mandatory: it fails when no queue takes it.
    let body = json!({"id": id(1), "what": "a type of tomorrow"});
    world.publish(&event("person.married", id(1), 1, &body, None)).await;
}
