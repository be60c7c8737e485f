//! The commands that the READMEs of the examples print, run as they stand, but for where the servers, the build and the
//! packages are.

use std::{path::Path, process::Stdio};

use devstack::{
    binary, ports,
    testing::{DEADLINE, Place},
};
use tokio::{process::Command, time::timeout};

use crate::packages::{self, source};

/// What takes the place of programs that a reader runs once. `sleep 3` waits until the copy equals the table.
const STAND_INS: &str = r#"
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
make() { printf 'export %s=%q\n' PERSON_DATABASE_URL "$POSTGRES" AMQP_URL "$BROKER" RABBITMQ_MANAGEMENT_URL "$MANAGEMENT"; }
cargo() { true; }
python3() { true; }
npm() { true; }
sleep() {
    [ "$1" = 3 ] || { command sleep "$1"; return; }
    until [ "$(psql -At "$COPY_URL" -c 'SELECT id, body FROM copy ORDER BY id::bigint')" = \
            "$(psql -At "$DATABASE_URL" -c 'SELECT id, order_body(id)::jsonb FROM orders ORDER BY id')" ]; do command sleep 0.2; done
}
"#;

/// Runs all blocks of shell of a README in one shell, and returns what they show.
async fn run(folder: &str) -> String {
    let page = std::fs::read_to_string(source(folder).join("README.md")).unwrap();
    let blocks = page.split("```sh\n").skip(1).map(|rest| rest.split_once("```").unwrap().0);
    let blocks = blocks.collect::<Vec<_>>().join("\n");
    let place = Place::around();
    let broker = place.virtual_host("examples_readme").await;
    let (_, vhost) = broker.rsplit_once('/').unwrap();
    let programs = binary::find("outbox-relay").unwrap();
    let programs = programs.parent().unwrap().to_str().unwrap();
    let address = || format!("127.0.0.1:{}", ports::free());
    let health = address();
    let mut script = blocks
        .replace("%2f", vhost)
        .replace("$PWD/target/debug", programs)
        .replace("target/debug/", &format!("{programs}/"))
        .replace("target/python/", &format!("{}/venv/", packages::python().await.display()))
        .replace("node docs/examples/node/", &format!("node {}/", packages::node().await.display()))
        .replace("127.0.0.1:8010", &health);
    for port in ["8014", "8015", "8016"] {
        script = script.replace(&format!("127.0.0.1:{port}"), &address());
    }
    let mut bash = Command::new("bash");
    bash.args(["-eu", "-c", &format!("{STAND_INS}{script}")]).stdin(Stdio::null()).kill_on_drop(true);
    bash.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")).env_remove("DATABASE_URL");
    bash.env("POSTGRES", format!("{}/postgres", place.postgres))
        .env("BROKER", &broker)
        .env("LISTEN", &health);
    bash.env("MANAGEMENT", &place.management).env("LOG", "error").env("PYTHONDONTWRITEBYTECODE", "1");
    let output = timeout(DEADLINE, bash.output()).await.expect("the commands end").unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{folder}: {said}\n{}", String::from_utf8_lossy(&output.stderr));
    said
}

#[tokio::test]
async fn in_sql() {
    let said = run("sql").await;
    assert!(said.contains("order.deleted"), "{said}");
}

#[tokio::test]
async fn in_python() {
    let said = run("python").await;
    assert_eq!(said.matches(r#""price": 1}"#).count(), 2, "{said}");
}

#[tokio::test]
async fn in_javascript() {
    let said = run("node").await;
    assert!(said.contains(r#""total": 1000"#), "{said}");
}

#[tokio::test]
async fn in_rust() {
    let said = run("rust").await;
    assert!(said.contains(r#""total": 1000"#), "{said}");
}
