//! The examples of `docs/examples` and the commands of `docs/getting-started.md`, run as they stand, by a role that may
//! append events and make its own tables.

use std::path::Path;

use devstack::testing::Place;
use sqlx::{AssertSqlSafe, Executor};
use tokio::process::Command;

use crate::stack::{Relay, Stack, eventually, output};

fn example(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/examples").join(name);
    path.to_str().unwrap().to_owned()
}

/// A Python that has psycopg2, which crates/devstack/install sees to.
async fn python() -> Command {
    for python in ["python3", "/usr/bin/python3"] {
        let asked = Command::new(python).args(["-c", "import psycopg2"]).output().await;
        if asked.is_ok_and(|asked| asked.status.success()) {
            return Command::new(python);
        }
    }
    panic!("no python3 has psycopg2: run crates/devstack/install tests")
}

/// psql with these arguments, as the role that writes.
fn psql(stack: &Stack, args: &[&str]) -> Command {
    psql_at(&stack.writer_url, args)
}

fn psql_at(url: &str, args: &[&str]) -> Command {
    let mut psql = Command::new("psql");
    // The address would show the password in the list of processes.
    psql.env("PGSERVICEFILE", "/dev/null").env("PGOPTIONS", "-c client_min_messages=warning");
    psql.args(["-v", "ON_ERROR_STOP=1", "-qX"]).args(args);
    for (name, value) in parts(url) {
        psql.env(name, value);
    }
    psql
}

async fn stack(name: &str) -> Stack {
    let stack = Stack::new(name).await;
    let (writer, _) = stack.writer_url.trim_start_matches("postgres://").split_once(':').unwrap();
    stack.admin.execute(AssertSqlSafe(format!("GRANT CREATE ON SCHEMA public TO {writer}"))).await.unwrap();
    stack
}

/// Services in other languages need nothing of ours: what they commit arrives, and nothing else. The samples do not
/// get into each other's way, or into their own when they are run again.
#[tokio::test]
async fn in_sql_and_in_python() {
    let stack = stack("relay_examples").await;
    let mut orders = stack.subscribe("order.#").await;
    let _relay = Relay::ready(&mut stack.command("run")).await;
    for _ in 0..2 {
        assert_eq!(output(&mut psql(&stack, &["-f", &example("order.sql")])).await, "exit code: 0");
        let mut python = python().await;
        python.arg(example("order.py")).env("DATABASE_URL", &stack.writer_url);
        assert_eq!(output(&mut python).await, "exit code: 0");
    }
    let arrived: Vec<String> = orders
        .count(12)
        .await
        .iter()
        .map(|m| {
            format!("{} {} v{} {}", m.key, m.header("aggregate_id"), m.header("aggregate_version"), m.body)
        })
        .collect();
    let filters =
        vec![(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "ID"), (r"ink \d+", "ink N")];
    insta::with_settings!({filters => filters}, {
        insta::assert_snapshot!(arrived.join("\n"));
    });
}

/// Two that change one order at the same time: the last event has the lines of both. A body that is read in the
/// statement that locks would lack one of them.
#[tokio::test]
async fn the_last_event_has_what_both_have_written() {
    let stack = stack("relay_examples_race").await;
    let text = std::fs::read_to_string(example("order.sql")).unwrap();
    let (before, rest) = text.split_once("-- A change.").unwrap();
    let (change, _) = rest.split_once("-- What is rolled back").unwrap();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (create, change_file) = (folder.join("order-create.sql"), folder.join("order-change.sql"));
    std::fs::write(&create, before).unwrap();
    std::fs::write(&change_file, format!("--{change}")).unwrap();
    assert_eq!(output(&mut psql(&stack, &["-f", create.to_str().unwrap()])).await, "exit code: 0");
    let id: String =
        sqlx::query_scalar("SELECT id FROM customer_order").fetch_one(&stack.writer).await.unwrap();

    // Whoever holds the row lets both of them come to the lock.
    let mut holder = stack.admin.begin().await.unwrap();
    holder.execute("SELECT FROM customer_order FOR UPDATE").await.unwrap();
    let id = format!("id={id}");
    let mut first = psql(&stack, &["-v", &id, "-f", change_file.to_str().unwrap()]);
    let mut second = psql(&stack, &["-v", &id, "-f", change_file.to_str().unwrap()]);
    let (first, second, ()) = tokio::join!(output(&mut first), output(&mut second), async {
        let blocked = "SELECT count(*) FROM pg_stat_activity
                       WHERE datname = current_database() AND wait_event_type = 'Lock'";
        eventually("both wait for the lock", async || {
            (sqlx::query_scalar::<_, i64>(blocked).fetch_one(&stack.admin).await.unwrap() == 2).then_some(())
        })
        .await;
        holder.rollback().await.unwrap();
    });
    assert_eq!((&*first, &*second), ("exit code: 0", "exit code: 0"));
    let lines = "SELECT json_array_length(payload -> 'lines') FROM outbox.event ORDER BY version";
    let lines: Vec<i32> = sqlx::query_scalar(lines).fetch_all(&stack.admin).await.unwrap();
    assert_eq!(lines, [1, 2, 3]);
}

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
    let tour = printed("getting-started.md", "2. ", "4. ");
    let place = Place::around();
    let (database, broker) = (place.database("relay_tour").await, place.virtual_host("relay_tour").await);
    let (_, vhost) = broker.rsplit_once('/').unwrap();
    let management = format!("{}/api", place.management);
    let program = Path::new(env!("CARGO_BIN_EXE_outbox-relay")).parent().unwrap();
    let path = format!("{}:{}", program.display(), std::env::var("PATH").unwrap());
    let listen = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    assert_eq!(tour.matches("127.0.0.1:8012").count(), 2, "{tour}");
    let tour = tour.replace("%2f", vhost).replace("127.0.0.1:8012", &listen);
    let script = format!("trap 'kill $relay; wait' EXIT\n{tour}");
    let mut bash = Command::new("bash");
    bash.args(["-eu", "-c", &script]).env("PATH", path).env("LOG", "error");
    bash.env("DATABASE_URL", &database)
        .env("AMQP_URL", &broker)
        .env("MANAGEMENT", management)
        .kill_on_drop(true);
    let done = tokio::time::timeout(std::time::Duration::from_mins(2), bash.output());
    let done = done.await.expect("the tour ends").unwrap();
    let said = String::from_utf8(done.stdout).unwrap();
    assert!(done.status.success(), "{said}\n{}", String::from_utf8_lossy(&done.stderr));
    let messages: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    // Between aggregates there is no order.
    let mut bodies: Vec<&str> =
        messages.as_array().unwrap().iter().map(|message| message["payload"].as_str().unwrap()).collect();
    bodies.sort_by_key(|body| body.contains("tour-2"));
    assert_eq!(
        bodies,
        [r#"{"id":"tour-1","total":10}"#, r#"{"id":"tour-1","total":12}"#, r#"{"id":"tour-2","total":7}"#,]
    );
    // The other samples count the versions of orders themselves, so they have an outbox of their own.
    let database = place.database("relay_samples").await;
    let mut migrate = Command::new(env!("CARGO_BIN_EXE_outbox-relay"));
    migrate.args(["migrate", "--source", "shop"]).env("DATABASE_URL", &database);
    assert!(output(&mut migrate).await.starts_with("exit code: 0"));
    assert_eq!(output(&mut psql_at(&database, &["-f", &example("order.sql")])).await, "exit code: 0");
    let mut python = python().await;
    python.arg(example("order.py")).env("DATABASE_URL", &database);
    assert_eq!(output(&mut python).await, "exit code: 0");
}

/// A URL, as the variables that libpq reads.
fn parts(url: &str) -> [(&'static str, String); 5] {
    let url = reqwest::Url::parse(url).unwrap();
    [
        ("PGUSER", url.username().to_owned()),
        ("PGPASSWORD", url.password().unwrap_or_default().to_owned()),
        ("PGHOST", url.host_str().unwrap().to_owned()),
        ("PGPORT", url.port().unwrap().to_string()),
        ("PGDATABASE", url.path().trim_start_matches('/').to_owned()),
    ]
}
