//! What Prometheus gets of the programs: `promtool` finds nothing wrong with it, and each series exists from the start.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    process::Stdio,
};

use devstack::testing::eventually;
use support::{Apis, payload, stack};
use tokio::{io::AsyncWriteExt, process::Command};
use tokio_util::sync::CancellationToken;

#[tokio::test]
async fn prometheus_understands_every_program() {
    let mut stack = stack().await;
    let apis = Apis::of(&stack.addresses());
    let client = devstack::program::client().unwrap();
    let pages = async |stack: &mut devstack::stack::Stack| {
        let mut pages = BTreeMap::new();
        for program in stack.programs() {
            let page = client.get(format!("{}/metrics", program.url())).send().await.unwrap();
            pages.insert(program.name().to_owned(), page.text().await.unwrap());
        }
        pages
    };
    let begun = pages(&mut stack).await;
    let mut shown = String::new();
    for (program, page) in &begun {
        assert_eq!(promtool(page).await, "", "{program}");
        if program == "score-relay" {
            continue;
        }
        let _ = writeln!(shown, "## {program}\n{}", described(page));
    }
    // What a route has served is known once it has served.
    insta::with_settings!({filters => vec![(r#"version="[^"]+""#, r#"version="VERSION""#)]}, {
        insta::assert_snapshot!(shown);
    });

    let before: BTreeMap<_, _> = begun.iter().map(|(program, page)| (program, series(page))).collect();
    assert_eq!(apis.post("/person", payload("person")).await.status, 201);
    assert_eq!(apis.post("/person/11111/income", payload("income")).await.status, 201);
    apis.until_score(11111, 20).await;
    for (program, page) in pages(&mut stack).await {
        assert_eq!(promtool(&page).await, "", "{program}");
        // Histograms begin with their first value; requests name routes.
        let new = series(&page).into_iter().filter(|series| {
            !before[&program].contains(series)
                && !series.starts_with("http_request")
                && !series.contains("_seconds")
        });
        assert_eq!(new.collect::<Vec<_>>(), Vec::<String>::new(), "{program}");
    }

    // What does not flow is seen without a log: while paused, too.
    let url = format!("{}/metrics", stack.person_relay.url());
    let addresses = stack.addresses();
    let (code, said) = support::run(&addresses, "outbox-relay pause --reason test").await;
    assert_eq!(code, Some(0), "{said}");
    let page = async || client.get(&url).send().await.unwrap().text().await.unwrap();
    let value = |page: &str, name: &str| -> f64 {
        let series = format!("outbox_relay_{name}{{source=\"person\",relay=\"default\"}} ");
        page.lines().find_map(|line| line.strip_prefix(&series)?.parse().ok()).unwrap_or(-1.0)
    };
    eventually("the relay is paused", async || {
        let page = page().await;
        let waits = page.contains("health_ready{relay=\"default\",source=\"person\",part=\"paused\"} 0");
        if waits && value(&page, "paused") > 0.0 { Ok(()) } else { Err(page) }
    })
    .await;
    assert_eq!(apis.post("/person/11111/income", payload("income")).await.status, 201);
    eventually("the paused relay shows its backlog", async || {
        let page = page().await;
        let (events, age) = (value(&page, "backlog_events"), value(&page, "backlog_age_seconds"));
        if events > 0.0 && age > 0.0 { Ok(()) } else { Err(format!("{events} events, {age} s")) }
    })
    .await;
    stack.stop(&CancellationToken::new()).await;
}

/// What `promtool check metrics` says of a page: nothing, if all is well.
async fn promtool(page: &str) -> String {
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut promtool = promtool.spawn().unwrap();
    promtool.stdin.take().unwrap().write_all(page.as_bytes()).await.unwrap();
    let output = promtool.wait_with_output().await.unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    if output.status.success() { said } else { format!("{}: {said}", output.status) }
}

/// The series of a page, without their values.
fn series(page: &str) -> BTreeSet<String> {
    let series = |line: &str| line.rsplit_once(' ').map(|(series, _)| series.to_owned());
    page.lines().filter(|line| !line.starts_with('#')).filter_map(series).collect()
}

/// Each metric with its help and its labels, in the order of the names. What the process takes is the library's.
fn described(page: &str) -> String {
    let help =
        |line: &str| line.strip_prefix("# HELP ")?.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned()));
    let metrics: BTreeMap<String, String> = page.lines().filter_map(help).collect();
    let (of_page, mut shown) = (series(page), String::new());
    for (name, help) in metrics.into_iter().filter(|(name, _)| !name.starts_with("process_")) {
        let _ = writeln!(shown, "{name}: {help}");
        let labels = of_page.iter().filter_map(|series| series.strip_prefix(&format!("{name}{{")));
        for labels in labels {
            let _ = writeln!(shown, "    {}", labels.trim_end_matches('}'));
        }
    }
    shown
}
