//! What the tests of the whole system share: requests, and waiting with an end.

#![expect(dead_code, reason = "each test binary uses a part of it")]

use std::{fmt::Write, time::Duration};

use devstack::{
    binary::find,
    folder::Folder,
    servers::Setup,
    stack::{Addresses, Stack},
    testing::eventually,
};
use serde_json::Value;
use tokio::process::Command;

/// A stack of this test's own.
pub(crate) async fn stack() -> Stack {
    let folder = Folder::temporary().unwrap();
    Box::pin(Stack::start(folder, Setup::QUIET)).await.unwrap_or_else(|error| panic!("{error:#}"))
}

/// Runs a line as it is printed, and returns how it ended and what it said. Of which database it is, and as which user of
/// the broker, an operator knows.
pub(crate) async fn run(addresses: &Addresses, line: &str) -> (Option<i32>, String) {
    let mut words = line.split_whitespace();
    let program = words.next().unwrap();
    let database = match program {
        "score-projector" => &addresses.score_database_url,
        _ => &addresses.person_database_url,
    };
    let output = Command::new(find(program).unwrap())
        .args(words)
        .env("DATABASE_URL", database)
        .env("INBOX_DATABASE_URL", &addresses.score_database_url)
        .env("AMQP_URL", &addresses.replay_amqp_url)
        .env("LOG", "off")
        .output()
        .await
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&said).into_owned())
}

/// An HTTP answer.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The token of a write: its `ETag` without the quotes.
    pub(crate) fn token(&self) -> &str {
        let tag = self.head.lines().find_map(|line| line.strip_prefix("etag: "));
        tag.unwrap_or_else(|| panic!("no ETag: {}", self.shown())).trim_matches('"')
    }

    /// As curl shows it, without what differs each time anyway.
    pub(crate) fn shown(&self) -> String {
        format!("{}\n{}\n", self.head, self.body.trim_end())
    }
}

/// The two APIs of a stack, by the names that people call them by.
#[derive(Clone)]
pub(crate) struct Apis {
    client: reqwest::Client,
    person: String,
    score: String,
}

impl Apis {
    pub(crate) fn of(addresses: &Addresses) -> Self {
        let localhost = "127.0.0.1:0".parse().unwrap();
        let client = reqwest::Client::builder()
            .no_proxy()
            .timeout(Duration::from_secs(30))
            .resolve("person.localhost", localhost)
            .resolve("score.localhost", localhost);
        Self {
            client: client.build().unwrap(),
            person: addresses.person_url.replace("127.0.0.1", "person.localhost"),
            score: addresses.score_url.replace("127.0.0.1", "score.localhost"),
        }
    }

    /// `curl -H 'Content-Type: application/json' http://person.localhost:…{path} --data …`
    pub(crate) async fn post(&self, path: &str, body: String) -> Answer {
        answer(self.write(path, body)).await
    }

    /// The same, with `-H 'Idempotency-Key: {key}'`.
    pub(crate) async fn post_once(&self, path: &str, body: String, key: &str) -> Answer {
        answer(self.write(path, body).header("Idempotency-Key", key)).await
    }

    fn write(&self, path: &str, body: String) -> reqwest::RequestBuilder {
        let request = self.client.post(format!("{}{path}", self.person));
        request.header("Content-Type", "application/json").body(body)
    }

    /// The same with any method and an `Idempotency-Key`; an empty body is none.
    pub(crate) async fn send(&self, method: &str, path: &str, key: &str, body: String) -> Answer {
        let request = self.client.request(method.parse().unwrap(), format!("{}{path}", self.person));
        let request = request.header("Idempotency-Key", key);
        if body.is_empty() {
            return answer(request).await;
        }
        answer(request.header("Content-Type", "application/json").body(body)).await
    }

    /// `curl http://score.localhost:…{path}`
    pub(crate) async fn read(&self, path: &str) -> Answer {
        answer(self.client.get(format!("{}{path}", self.score))).await
    }

    /// `curl http://score.localhost:…/{cpf}/score`
    pub(crate) async fn score(&self, cpf: u64) -> Answer {
        answer(self.client.get(format!("{}/{cpf}/score", self.score))).await
    }

    /// The same, with `?after={token}&wait={wait}`.
    pub(crate) async fn score_after(&self, cpf: u64, token: &str, wait: &str) -> Answer {
        let url = format!("{}/{cpf}/score?after={token}&wait={wait}", self.score);
        answer(self.client.get(url)).await
    }

    /// Waits until the score of `cpf` is `score`.
    pub(crate) async fn until_score(&self, cpf: u64, score: i64) -> Answer {
        eventually(&format!("the score {score}"), async || {
            let answer = self.score(cpf).await;
            let right = answer.status == 200 && answer.json()["score"].as_i64() == Some(score);
            if right { Ok(answer) } else { Err(answer.shown()) }
        })
        .await
    }
}

async fn answer(request: reqwest::RequestBuilder) -> Answer {
    let answer = request.send().await.unwrap();
    let mut head = answer.status().to_string();
    let mut headers: Vec<_> =
        answer.headers().iter().filter(|(name, _)| *name != "date" && *name != "x-request-id").collect();
    headers.sort_by_key(|(name, _)| name.as_str());
    for (name, value) in headers {
        write!(head, "\n{name}: {}", value.to_str().unwrap()).unwrap();
    }
    Answer { status: answer.status().as_u16(), head, body: answer.text().await.unwrap() }
}

/// A sample of `payloads/`.
pub(crate) fn payload(name: &str) -> String {
    let path = format!("{}/../../payloads/new_{name}.json", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}
