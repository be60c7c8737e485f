//! `devstack up`: the stack of this checkout, until somebody ends it.

use std::{collections::BTreeMap, path::Path, time::Duration};

use crate::{
    folder::Folder,
    process::Process,
    say,
    servers::Setup,
    shutdown::Shutdown,
    stack::{Addresses, Stack},
};

/// Starts everything, shows where it is, and watches it.
pub async fn run() -> anyhow::Result<()> {
    let shutdown = Shutdown::watch()?;
    let folder = Folder::kept(&super::data()?)?;
    let data = folder.path().to_owned();
    let Some(stack) =
        shutdown.requested.run_until_cancelled(Box::pin(Stack::start(folder, Setup::KEPT))).await
    else {
        return Ok(());
    };
    let mut stack = stack?;
    crate::show(&greeting(&stack.addresses(), &data));
    shutdown.requested.run_until_cancelled(watch(&mut stack)).await;
    stack.stop(&shutdown.immediate).await;
    Ok(())
}

/// Says when something ends, is not ready any more, or is ready again.
async fn watch(stack: &mut Stack) {
    let mut shown: BTreeMap<String, String> = BTreeMap::new();
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        for (name, state) in states(stack).await {
            if shown.get(&name).map_or("ready", String::as_str) != state {
                say(&format!("{name}: {state}"));
                shown.insert(name, state);
            }
        }
    }
}

async fn states(stack: &mut Stack) -> Vec<(String, String)> {
    let mut states = Vec::new();
    for process in [stack.servers.postgres.process(), stack.servers.rabbitmq.process()].into_iter().flatten()
    {
        let state = process.check().map_or_else(|error| error.to_string(), |()| "ready".to_owned());
        states.push((process.name().to_owned(), state));
    }
    for program in stack.programs() {
        let state = match program.process().map(Process::check) {
            Some(Err(ended)) => ended.to_string(),
            _ => match program.not_ready().await {
                Some(reason) => format!("not ready: {reason}"),
                None => "ready".to_owned(),
            },
        };
        states.push((program.name().to_owned(), state));
    }
    states
}

/// Where everything is, and the lines to try it with.
fn greeting(addresses: &Addresses, data: &Path) -> String {
    let Addresses { person_relay_url, score_relay_url, projector_url, .. } = addresses;
    let person = addresses.person_url.replace("127.0.0.1", "person.localhost");
    let score = addresses.score_url.replace("127.0.0.1", "score.localhost");
    let post = |path: &str, payload: &str| {
        format!(
            "curl -i -H 'Content-Type: application/json' {person}/person{path} --data @payloads/new_{payload}.json"
        )
    };
    let [create, income, asset, debt] = [
        post("", "person"),
        post("/11111/income", "income"),
        post("/11111/asset", "asset"),
        post("/11111/debt", "debt"),
    ];
    format!(
        "
Ready. Data and logs are in {}. Ctrl-C ends everything.

  person-api       {person}
  score-api        {score}
  person-relay     {person_relay_url}
  score-relay      {score_relay_url}
  score-projector  {projector_url}
  PostgreSQL, RabbitMQ and its management: make env

Try it:
  {create}
  {income}
  {asset}
  {debt}
  curl -i {score}/11111/score

",
        data.display(),
    )
}
