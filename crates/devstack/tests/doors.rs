//! The APIs ask for keys, and do not listen beyond this machine without them unless a setting says so. All four
//! programs serve this machine's names alone, and say nothing of a database's users and names.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

use std::time::Duration;

use devstack::{
    folder::Folder,
    ports,
    program::Program,
    testing::{client, eventually, until},
};
use reqwest::StatusCode;

const PROGRAMS: [&str; 4] = ["person-api", "outbox-relay", "score-projector", "score-api"];
/// Those that have keys.
const APIS: [&str; 2] = ["person-api", "score-api"];
const SECRET: &str = "0123456789abcdef0123456789abcdef";
/// Nobody listens there: a program that waits for its servers answers all the same.
const NOWHERE: [(&str, &str); 2] =
    [("DATABASE_URL", "postgres://nobody@127.0.0.1:1/nothing"), ("AMQP_URL", "amqp://nobody@127.0.0.1:1")];

fn program(folder: &Folder, name: &str, port: u16) -> Program {
    let program = Program::new(folder, name, name, port).unwrap();
    NOWHERE.iter().fold(program, |program, (name, value)| program.env(name, value))
}

#[tokio::test]
async fn the_apis_ask_for_a_key() {
    let folder = Folder::temporary().unwrap();
    let keys = folder.path().join("keys");
    std::fs::write(&keys, format!("shop:{SECRET}\n")).unwrap();
    let client = client();
    for name in APIS {
        let mut program = program(&folder, name, ports::free()).env("API_KEYS_FILE", keys.to_str().unwrap());
        program.start().await.unwrap();
        let ask = async |path: &str, key: Option<&str>| {
            let request = client.get(format!("{}{path}", program.url()));
            let request = key.iter().fold(request, reqwest::RequestBuilder::bearer_auth);
            request.send().await.map(|answer| answer.status())
        };
        until(&format!("{name} listens"), async || ask("/live", None).await.ok() == Some(StatusCode::OK))
            .await;
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
async fn no_api_listens_beyond_this_machine_without_keys() {
    let folder = Folder::temporary().unwrap();
    for name in APIS {
        let program = program(&folder, name, ports::free());
        let mut settings = NOWHERE.to_vec();
        settings.push(("LISTEN", "0.0.0.0:0"));
        let refused = program.command(&["run"], &settings).await.expect_err(name).to_string();
        assert!(refused.contains("LISTEN: ") && refused.contains("--allow-anonymous"), "{name}: {refused}");
    }
}

/// Waits until a program answers at `/live`.
async fn until_it_listens(client: &reqwest::Client, program: &Program) {
    let live = || client.get(format!("{}/live", program.url())).send();
    until("the program listens", async || {
        live().await.map(|answer| answer.status()).ok() == Some(StatusCode::OK)
    })
    .await;
}

/// A page of somebody else's could reach it under its own name (DNS rebinding).
#[tokio::test]
async fn without_keys_only_this_machine_s_names_are_served() {
    let folder = Folder::temporary().unwrap();
    let client = client();
    for name in PROGRAMS {
        let mut program =
            program(&folder, name, ports::free()).env("ALLOWED_HOSTS", "shop.example,other.example");
        program.start().await.unwrap();
        until_it_listens(&client, &program).await;
        for (host, status) in [
            ("evil.example", 421),
            ("localhost.evil.example:80", 421),
            ("192.0.2.1", 421),
            ("localhost", 200),
            ("any.localhost:1", 200),
            ("[::1]", 200),
            ("SHOP.example", 200),
            ("other.example:80", 200),
        ] {
            for path in ["/live", "/metrics"] {
                let answer =
                    client.get(format!("{}{path}", program.url())).header("host", host).send().await.unwrap();
                assert_eq!(answer.status().as_u16(), status, "{name}: {path} for {host}");
            }
        }
        program.kill().await;
    }
}

/// Whoever has no key may ask `/ready`: it says what is wrong by its code, and names no user and no database.
#[tokio::test]
async fn what_a_database_says_is_not_repeated_to_everybody() {
    let folder = Folder::temporary().unwrap();
    let client = client();
    let url = devstack::testing::database("doors").await;
    let (server, database) = url.rsplit_once('/').unwrap();
    let (_, address) = server.rsplit_once('@').unwrap();
    let refused = [
        (format!("postgres://secret_role@{address}/{database}"), "28P01: the login is refused"),
        (format!("{server}/secret_database"), "3D000: the database does not exist"),
    ];
    for (name, (url, said)) in PROGRAMS.iter().flat_map(|name| refused.iter().map(move |case| (name, case))) {
        let mut program = Program::new(&folder, name, name, ports::free()).unwrap();
        program = program.env("DATABASE_URL", url).env("AMQP_URL", NOWHERE[1].1);
        program.start().await.unwrap();
        until_it_listens(&client, &program).await;
        let text = eventually("it says why", async || {
            let ready = client.get(format!("{}/ready", program.url())).send().await.unwrap();
            let text = ready.text().await.unwrap();
            if text.contains("SQLSTATE") { Ok(text) } else { Err(text) }
        })
        .await;
        assert!(text.contains(&format!("the database refuses: SQLSTATE {said}")), "{name}: {text}");
        assert!(!text.contains("secret_"), "{name}: {text}");
        program.kill().await;
    }
}

/// `health` is of the process that was asked for, and not of whichever has its address.
#[tokio::test]
async fn another_process_at_the_address_is_not_healthy() {
    let folder = Folder::temporary().unwrap();
    let client = client();
    for (name, other) in PROGRAMS.iter().zip(PROGRAMS.iter().cycle().skip(1)) {
        let mut running = program(&folder, name, ports::free());
        running.start().await.unwrap();
        until_it_listens(&client, &running).await;
        let address = running.url().trim_start_matches("http://").to_owned();
        let health = async |program: &str, settings: &[(&str, &str)]| {
            let asked = Program::new(&folder, "health", program, ports::free()).unwrap();
            let settings = [&[("LISTEN", address.as_str())], settings].concat();
            asked.command(&["health"], &settings).await.expect_err("its servers are nowhere").to_string()
        };
        let differs = "another process listens at ";
        for settings in [&[][..], &NOWHERE[..1]] {
            let said = health(name, settings).await;
            assert!(said.contains("not ready: ") && !said.contains(differs), "{name}: {said}");
        }
        let database = [("DATABASE_URL", "postgres://nobody@127.0.0.1:1/other")];
        let said = health(name, &database).await;
        assert!(said.contains(differs) && said.contains("it uses another database"), "{name}: {said}");
        let said = health(other, &[]).await;
        let expected = format!("its program is \"{name}\", and not \"{other}\"");
        assert!(said.contains(differs) && said.contains(&expected), "{other} at {name}: {said}");
        let own = match *name {
            "outbox-relay" => Some(("RELAY_NAME", "another")),
            "score-projector" => Some(("QUEUE", "another")),
            _ => None,
        };
        if let Some(setting) = own {
            let said = health(name, &[setting]).await;
            assert!(said.contains(differs) && said.contains("and not \"another\""), "{name}: {said}");
        }
        // One that cannot listen ends, so that nobody takes the other for it.
        let mut settings = NOWHERE.to_vec();
        settings.push(("LISTEN", &address));
        let second = Program::new(&folder, "second", name, ports::free()).unwrap();
        let ended = tokio::time::timeout(Duration::from_mins(1), second.command(&["run"], &settings));
        let said = ended.await.expect("it ends").expect_err("the address is taken").to_string();
        assert!(said.contains("LISTEN: cannot listen on "), "{name}: {said}");
        running.kill().await;
    }
}
