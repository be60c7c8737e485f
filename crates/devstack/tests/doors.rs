//! What stands in front is the same for all four programs: who has no key does not come in, and none of them
//! listens beyond this machine without keys unless it is told to.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

use std::time::Duration;

use devstack::{folder::Folder, ports, program::Program};
use reqwest::StatusCode;

const PROGRAMS: [&str; 4] = ["person-api", "outbox-relay", "score-projector", "score-api"];
const SECRET: &str = "0123456789abcdef0123456789abcdef";
/// Nobody listens there: a program that waits for its servers answers all the same.
const NOWHERE: [(&str, &str); 2] =
    [("DATABASE_URL", "postgres://nobody@127.0.0.1:1/nothing"), ("AMQP_URL", "amqp://nobody@127.0.0.1:1")];

fn program(folder: &Folder, name: &str, port: u16) -> Program {
    let program = Program::new(folder, name, name, port).unwrap();
    NOWHERE.iter().fold(program, |program, (name, value)| program.env(name, value))
}

#[tokio::test]
async fn every_program_asks_for_a_key() {
    let folder = Folder::temporary().unwrap();
    let keys = folder.path().join("keys");
    std::fs::write(&keys, format!("shop:{SECRET}\n")).unwrap();
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(20)).build().unwrap();
    for name in PROGRAMS {
        let mut program = program(&folder, name, ports::free()).env("API_KEYS_FILE", keys.to_str().unwrap());
        program.start().await.unwrap();
        let ask = async |path: &str, key: Option<&str>| {
            let request = client.get(format!("{}{path}", program.url()));
            let request = key.iter().fold(request, reqwest::RequestBuilder::bearer_auth);
            request.send().await.map(|answer| answer.status())
        };
        let listens = async {
            while ask("/live", None).await.ok() != Some(StatusCode::OK) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), listens).await.expect("it listens");
        for (path, key, status) in [
            ("/ready", None, 503),
            ("/metrics", None, 401),
            ("/metrics", Some("another"), 401),
            ("/metrics", Some(SECRET), 200),
            ("/nowhere", None, 401),
            ("/nowhere", Some(SECRET), 404),
        ] {
            let answer = ask(path, key).await.unwrap();
            assert_eq!(answer.as_u16(), status, "{name}: {path} with {key:?}");
        }
        program.kill().await;
    }
}

#[tokio::test]
async fn none_listens_beyond_this_machine_without_keys() {
    let folder = Folder::temporary().unwrap();
    for name in PROGRAMS {
        let program = program(&folder, name, ports::free());
        let mut settings = NOWHERE.to_vec();
        settings.push(("LISTEN", "0.0.0.0:0"));
        let refused = program.command(&["run"], &settings).await.expect_err(name).to_string();
        assert!(refused.contains("LISTEN: ") && refused.contains("--allow-anonymous"), "{name}: {refused}");
    }
}
