//! What Prometheus gets of the programs: `promtool` finds nothing wrong with it, each series exists from the start, and the
//! rules and the dashboard of `deploy/observability` ask for what is there.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    path::Path,
    process::Stdio,
};

use devstack::{
    process::{Launch, Process},
    testing::eventually,
};
use rustix::process::Signal;
use sqlx::{Connection, PgConnection};
use support::{Apis, payload, stack};
use tokio::{io::AsyncWriteExt, process::Command};
use tokio_util::sync::CancellationToken;

#[tokio::test]
async fn prometheus_understands_every_program() {
    let mut stack = stack().await;
    let mut prometheus = Prometheus::start(&mut stack).await;
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

    // Two faults: an event that no queue takes, and a relay that is paused. Both are seen without a log.
    let mut outbox = PgConnection::connect(&stack.addresses().person_database_url).await.unwrap();
    let nobody_s = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                    VALUES ('thing', '1', 1, 'thing.new', '{}')";
    sqlx::query(nobody_s).execute(&mut outbox).await.unwrap();
    let url = format!("{}/metrics", stack.person_relay.url());
    let page = async || client.get(&url).send().await.unwrap().text().await.unwrap();
    let value = |page: &str, name: &str| -> f64 {
        let series = format!("outbox_relay_{name}{{source=\"person\",relay=\"default\"}} ");
        page.lines().find_map(|line| line.strip_prefix(&series)?.parse().ok()).unwrap_or(-1.0)
    };
    eventually("the relay has tried it", async || {
        let page = page().await;
        if value(&page, "held_events") + value(&page, "parked_events") > 0.0 { Ok(()) } else { Err(page) }
    })
    .await;
    // Others go on, so it is that event's fault alone.
    assert_eq!(apis.post("/person/11111/asset", payload("asset")).await.status, 201);
    eventually("an event is set aside", async || {
        let page = page().await;
        let said = "health_attention{relay=\"default\",source=\"person\",part=\"events\"} 1";
        if value(&page, "parked_events") > 0.0 && page.contains(said) { Ok(()) } else { Err(page) }
    })
    .await;
    let addresses = stack.addresses();
    let (code, said) = support::run(&addresses, "outbox-relay pause --reason test").await;
    assert_eq!(code, Some(0), "{said}");
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
    for (panel, query) in devstack::dashboard::queries("1m") {
        eventually(&format!("the panel {panel:?} shows something: {query}"), async || {
            let found = prometheus.query(&query).await;
            let has_values = found["data"]["result"].as_array().is_some_and(|series| !series.is_empty());
            if has_values { Ok(()) } else { Err(found.to_string()) }
        })
        .await;
    }
    eventually("the backlog of the paused relay alarms", async || {
        let alerts = prometheus.query("ALERTS{alertname=\"OutboxPaused\",source=\"person\"}").await;
        let alerts = alerts["data"]["result"].as_array().cloned().unwrap_or_default();
        if alerts.is_empty() { Err("no alert".to_owned()) } else { Ok(()) }
    })
    .await;
    prometheus.process.kill().await;
    stack.stop(&CancellationToken::new()).await;
}

/// Each rule is tested for firing and for not firing, names a metric that there is, and leads to a page that there is.
#[tokio::test]
async fn rules_and_dashboard_are_as_they_should_be() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/observability");
    let read = |file: &str| std::fs::read_to_string(folder.join(file)).unwrap();
    for args in [["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]] {
        let output = Command::new("promtool").args(args).current_dir(&folder).output().await.unwrap();
        let said = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&said));
    }
    let (rules, tests) = (read("rules.yml"), read("rules_test.yml"));
    for alert in rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
        let expected = format!("ALERTS{{alertname=\"{alert}\",alertstate=\"firing\",");
        assert!(tests.contains(&expected), "no test in which {alert} fires");
        let asked = format!("- expr: ALERTS{{alertname=\"{alert}\",alertstate=\"firing\"}}");
        let asked = tests.matches(&asked).count();
        assert!(asked > tests.matches(&expected).count(), "no test in which {alert} does not fire");
    }
    for runbook in rules.lines().filter_map(|line| line.trim().strip_prefix("runbook: ")) {
        let (file, anchor) = runbook.split_once('#').unwrap_or((runbook, ""));
        let page = std::fs::read_to_string(folder.join("../..").join(file)).unwrap();
        let heading = |line: &str| {
            let title = line.trim_start_matches('#').trim().to_lowercase();
            line.starts_with('#') && title.replace(' ', "-") == anchor
        };
        assert!(anchor.is_empty() || page.lines().any(heading), "{runbook}");
    }
    let dashboard = format!("{:#}\n", devstack::dashboard::dashboard());
    assert!(read("dashboard.json") == dashboard, "devstack dashboard > deploy/observability/dashboard.json");
    let known = include_str!("snapshots/metrics__prometheus_understands_every_program.snap");
    let asked = devstack::dashboard::queries("1m").into_iter().map(|(_, query)| query);
    let asked = asked.chain(rules.lines().map(str::to_owned)).collect::<Vec<_>>().join("\n");
    for name in asked.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')) {
        let name = name.trim_end_matches("_bucket");
        let is_metric = ["outbox_relay_", "inbox_", "http_", "score_api_", "health_"]
            .iter()
            .any(|prefix| name.starts_with(prefix));
        // These begin with the first event, and with an expected queue.
        let is_metric =
            is_metric && !["inbox_lag_seconds", "outbox_relay_expected_subscribers"].contains(&name);
        assert!(!is_metric || known.contains(&format!("\n{name}: ")), "{name} is no metric");
    }
}

/// A Prometheus that looks at the programs of a stack every second, with the rules of the repository.
struct Prometheus {
    url: String,
    process: Process,
}

impl Prometheus {
    async fn start(stack: &mut devstack::stack::Stack) -> Self {
        let folder = stack.folder().path().join("prometheus");
        std::fs::create_dir(&folder).unwrap();
        let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/observability/rules.yml");
        let mut config = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [{}]\nscrape_configs:\n",
            rules.display()
        );
        for program in stack.programs() {
            let target = program.url().replace("http://", "");
            let _ = writeln!(
                config,
                "  - {{job_name: {}, static_configs: [{{targets: [{target}]}}]}}",
                program.name()
            );
        }
        std::fs::write(folder.join("prometheus.yml"), config).unwrap();
        let port = devstack::ports::free();
        let file = Path::new("/usr/bin/prometheus");
        let log = stack.folder().log("prometheus").unwrap();
        let launch = Launch::new("prometheus", file, None, Signal::KILL, stack.folder().mark(), log);
        let process = launch
            .args([
                format!("--config.file={}", folder.join("prometheus.yml").display()),
                format!("--storage.tsdb.path={}", folder.join("data").display()),
                format!("--web.listen-address=127.0.0.1:{port}"),
                "--log.level=warn".to_owned(),
            ])
            .spawn()
            .await
            .unwrap();
        Self { url: format!("http://127.0.0.1:{port}"), process }
    }

    async fn query(&self, query: &str) -> serde_json::Value {
        let query: String = url::form_urlencoded::byte_serialize(query.as_bytes()).collect();
        let client = devstack::program::client().unwrap();
        let response = client.get(format!("{}/api/v1/query?query={query}", self.url)).send().await;
        match response {
            Ok(response) => response.json().await.unwrap_or_default(),
            Err(error) => serde_json::json!({"error": error.to_string()}),
        }
    }
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
