//! `devstack demo`: the sample requests, and how long until the score knows of them.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use super::env;
use crate::{
    folder::Folder,
    program::client,
    servers::Setup,
    show,
    shutdown::Shutdown,
    stack::{Addresses, Stack},
};

/// Of the samples: an asset of 100000 / 20, an income of 1000 / 50, less a debt of 1000 / 20.
const SCORE: u64 = 5000 + 20 - 50;

/// Plays the samples through the stack that runs, or through one of its own.
pub async fn run() -> anyhow::Result<()> {
    let payloads = super::checkout()?.join("payloads");
    if let Some(addresses) = env::running()? {
        return play(&addresses, &payloads).await;
    }
    let shutdown = Shutdown::watch()?;
    let folder = Folder::temporary()?;
    let own = async {
        let stack = Stack::start(folder, Setup::PASSING).await?;
        let played = play(&stack.addresses(), &payloads).await;
        stack.stop(&shutdown.immediate).await;
        played
    };
    match shutdown.requested.run_until_cancelled(Box::pin(own)).await {
        Some(played) => played,
        None => bail!("the demo was ended"),
    }
}

/// Plays the samples, until the score is right.
pub(super) async fn play(addresses: &Addresses, payloads: &Path) -> anyhow::Result<()> {
    let sample = |name: &str| {
        let path = payloads.join(format!("new_{name}.json"));
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let mut person: Value =
        serde_json::from_str(&sample("person")?).context("new_person.json is not JSON")?;
    let persons = format!("{}/person", addresses.person_url);
    let (mut status, mut token) = post(&persons, sample("person")?).await?;
    if status == 409 {
        let cpf = rand::random_range(10_000_000_000_u64..99_999_999_999);
        show("  The sample's cpf is known from an earlier time; another one, then.\n");
        person["cpf"] = cpf.into();
        (status, token) = post(&persons, person.to_string()).await?;
    }
    ensure!(status == 201, "the person was not taken");
    let cpf = &person["cpf"];
    for item in ["income", "asset", "debt"] {
        (status, token) = post(&format!("{persons}/{cpf}/{item}"), sample(item)?).await?;
        ensure!(status == 201, "the {item} was not taken");
    }
    let token = token.context("the last write was answered without an ETag")?;
    let after = token.trim_matches('"');
    read(&format!("{}/{cpf}/score?after={after}&wait=2s", addresses.score_url)).await
}

/// Sends a body and shows the answer; returns its status and the token of the write.
async fn post(url: &str, body: String) -> anyhow::Result<(u16, Option<String>)> {
    show(&format!("POST {url}\n"));
    let request = client()?.post(url).header("Content-Type", "application/json").body(body);
    let answer = request.send().await.with_context(|| format!("nobody answers at {url}"))?;
    let status = answer.status();
    let token = answer.headers().get("ETag").and_then(|tag| tag.to_str().ok()).map(str::to_owned);
    show(&format!("  {status} {}\n", answer.text().await?.trim()));
    Ok((status.as_u16(), token))
}

/// Asks for the score that contains the last write, again while it is not there.
async fn read(url: &str) -> anyhow::Result<()> {
    show(&format!("GET {url}\n"));
    let begin = Instant::now();
    let client = client()?;
    loop {
        let answer = client.get(url).send().await.with_context(|| format!("nobody answers at {url}"))?;
        let (status, text) = (answer.status(), answer.text().await?);
        show(&format!("  {status} {}\n", text.trim()));
        let took = begin.elapsed();
        if status.is_success() {
            let body: Value = serde_json::from_str(&text).context("the score is not JSON")?;
            ensure!(body["score"] == SCORE, "the score is not {SCORE}");
            show(&format!("The score {SCORE} was there {} ms after the last write.\n", took.as_millis()));
            return Ok(());
        }
        ensure!(status == 503 && took < Duration::from_secs(30), "the score is not {SCORE} after 30 s");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
