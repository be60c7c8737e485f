//! One request is one trace, from the POST over both relays to the score; and whatever becomes of its spans costs no request
//! and no event.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

mod support;

use devstack::{
    folder::Folder,
    otlp::{Collector, Manner, Received, Tree},
    servers::Setup,
    stack::Stack,
    testing::{DEADLINE, eventually},
};
use lapin::{
    Connection as Broker, ConnectionProperties,
    options::{QueueBindOptions, QueueDeclareOptions},
    types::FieldTable,
};
use serde_json::Value;
use sqlx::{Connection, PgConnection};
use support::{Apis, payload};
use tokio_util::sync::CancellationToken;

const CPF: u64 = 11111;
const SECRET: &str = "s3cr3t";
/// Spans that wait in a program.
const QUEUE: &str = "64";

/// A caller's header, for one of its traces.
fn traceparent(trace: u32, flags: &str) -> String {
    format!("00-{}-00f067aa0ba902b7-{flags}", trace_id(trace))
}

fn trace_id(trace: u32) -> String {
    format!("4bf92f3577b34da6a3ce929d{trace:08x}")
}

struct Test {
    stack: Stack,
    collector: Collector,
    client: reqwest::Client,
    /// What the incomes of the person are worth.
    score: i64,
}

impl Test {
    /// Every program exports to the collector: some over HTTP, and the others over gRPC.
    async fn start() -> Self {
        let folder = Folder::temporary().unwrap();
        let mut stack = Box::pin(Stack::prepare(folder, Setup::QUIET)).await.unwrap();
        let collector = Collector::start().await.unwrap();
        for program in stack.programs() {
            let name = program.name().to_owned();
            for (variable, value) in [
                ("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url().as_str()),
                ("OTEL_EXPORTER_OTLP_HEADERS", &format!("x-key={SECRET}")),
                ("OTEL_EXPORTER_OTLP_TIMEOUT", "500"),
                ("OTEL_BSP_SCHEDULE_DELAY", "100"),
                ("OTEL_BSP_MAX_QUEUE_SIZE", QUEUE),
                ("OTEL_SERVICE_NAME", &name),
                ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test"),
                ("DRAIN_TIMEOUT", "5s"),
            ] {
                program.set_env(variable, value);
            }
            if name.ends_with("-relay") {
                program.set_env("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
            }
        }
        // Its spans leave only when it ends.
        stack.score_api.set_env("OTEL_BSP_SCHEDULE_DELAY", "600000");
        for program in stack.programs() {
            program.start().await.unwrap();
        }
        for program in stack.programs() {
            program.ready(DEADLINE).await.unwrap_or_else(|error| panic!("{error:#}"));
        }
        // Somebody follows the scores.
        let broker = stack.addresses().amqp_url;
        let broker = Broker::connect(&broker, ConnectionProperties::default()).await.unwrap();
        let channel = broker.create_channel().await.unwrap();
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare("scores".into(), durable, FieldTable::default()).await.unwrap();
        let (options, table) = (QueueBindOptions::default(), FieldTable::default());
        let exchange = "event_dispatcher".into();
        channel.queue_bind("scores".into(), exchange, "score.#".into(), options, table).await.unwrap();
        let client = reqwest::Client::builder().no_proxy().timeout(DEADLINE).build().unwrap();
        Self { stack, collector, client, score: 0 }
    }

    /// Sends a request, which succeeds, and returns the token of the write.
    async fn post(&self, path: &str, body: &str, traceparent: Option<&str>) -> String {
        let request = self.client.post(format!("{}{path}", self.stack.addresses().person_url));
        let request = request.header("content-type", "application/json").body(body.to_owned());
        let request = traceparent.iter().fold(request, |request, t| request.header("traceparent", *t));
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 201, "{path}");
        response.headers()["etag"].to_str().unwrap().trim_matches('"').to_owned()
    }

    /// An income of 50, which is worth 1; until the score has it.
    async fn income(&mut self, traceparent: Option<&str>) -> String {
        let income = r#"{"type": "salary", "value": 50}"#;
        let token = self.post(&format!("/person/{CPF}/income"), income, traceparent).await;
        self.score += 1;
        Apis::of(&self.stack.addresses()).until_score(CPF, self.score).await;
        token
    }

    /// The spans of a trace, once there are so many.
    async fn spans(&self, trace: u32, count: usize) -> Vec<Received> {
        eventually(&format!("{count} spans"), async || {
            let spans = self.collector.trace(&trace_id(trace));
            if spans.len() == count { Ok(spans) } else { Err(Tree(&spans).to_string()) }
        })
        .await
    }

    /// The lines of a program's log.
    fn log(&self, program: &str) -> Vec<Value> {
        let path = self.stack.folder().path().join("log").join(format!("{program}.log"));
        let log = std::fs::read_to_string(path).unwrap();
        log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// The traces of the latest events of a database, without the span.
    async fn traceparents(&self, database: &str, count: i64) -> Vec<Option<String>> {
        let mut conn = PgConnection::connect(database).await.unwrap();
        let sql = "SELECT headers ->> 'traceparent' FROM outbox.event ORDER BY position DESC LIMIT $1";
        let found: Vec<Option<String>> =
            sqlx::query_scalar(sql).bind(count).fetch_all(&mut conn).await.unwrap();
        let without = |text: String| format!("{} {}", &text[3..35], &text[53..]);
        found.into_iter().map(|text| text.map(without)).collect()
    }
}

/// The peak of a process's memory, in KiB.
fn peak(pid: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[tokio::test]
async fn a_request_is_one_trace_and_its_spans_cost_no_request_and_no_event() {
    let mut test = Box::pin(Test::start()).await;
    Box::pin(the_tree(&mut test)).await;
    Box::pin(unsampled_and_malformed(&mut test)).await;
    Box::pin(unroutable(&mut test)).await;
    Box::pin(endpoints_that_fail(&mut test)).await;
    Box::pin(switches(&mut test)).await;
    test.stack.stop(&CancellationToken::new()).await;
}

/// From the POST over both relays to `score.new`, and the read of the score that has it.
async fn the_tree(test: &mut Test) {
    test.post("/person", &payload("person"), None).await;
    Apis::of(&test.stack.addresses()).until_score(CPF, 0).await;

    let parent = traceparent(1, "01");
    let token = test.income(Some(&parent)).await;
    let addresses = test.stack.addresses();
    let read = test.client.get(format!("{}/{CPF}/score?after={token}", addresses.score_url));
    assert_eq!(read.header("traceparent", &parent).send().await.unwrap().status(), 200);
    test.spans(1, 6).await;
    assert!(test.stack.score_api.stop(&CancellationToken::new()).await, "it drains, and exports what it has");
    let spans = test.spans(1, 8).await;
    let ids = r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}";
    insta::with_settings!({filters => vec![(ids, "<id>"), (r"body\.size=\d+", "body.size=<bytes>")]}, {
        insta::assert_snapshot!("tree", Tree(&spans).to_string());
    });
    for one in &spans {
        let about = one.resource.join(" ");
        assert!(about.contains("deployment.environment.name=test"), "{about}");
        assert!(about.contains("service.instance.id=") && about.contains("service.version="), "{about}");
        let shown = format!("{one:?}");
        assert!(!shown.contains(&CPF.to_string()) && !shown.contains("salary"), "{shown}");
    }
    let headers = test.collector.headers();
    assert!(headers.iter().all(|headers| headers["x-key"] == SECRET));
    assert!(headers.iter().any(|headers| headers["content-type"] == "application/grpc"));
    assert!(headers.iter().any(|headers| headers["content-type"] == "application/x-protobuf"));

    // The line of the request leads to its span.
    let lines = test.log("person-api");
    let line = lines.iter().find(|line| line["trace_id"] == trace_id(1).as_str()).unwrap();
    let server = spans.iter().find(|one| one.span.name.starts_with("POST ")).unwrap();
    assert_eq!(line["span_id"], devstack::otlp::hex(&server.span.span_id).as_str());
    assert_eq!(line["message"], "request");

    test.stack.score_api.start().await.unwrap();
    test.stack.score_api.ready(DEADLINE).await.unwrap();
}

async fn unsampled_and_malformed(test: &mut Test) {
    let before = test.collector.received().len();
    test.income(Some(&traceparent(2, "00"))).await;
    let [person, score] =
        [test.stack.addresses().person_database_url, test.stack.addresses().score_database_url];
    let unsampled = [Some(format!("{} 00", trace_id(2)))];
    assert_eq!(test.traceparents(&person, 1).await, unsampled);
    assert_eq!(test.traceparents(&score, 1).await, unsampled);

    for malformed in ["00-1-2-03", "zz", "00-00000000000000000000000000011111-00f067aa0ba902b7-01"] {
        test.income(Some(malformed)).await;
        let begun = test.traceparents(&person, 1).await.remove(0).unwrap();
        assert!(begun.ends_with(" 01") && !begun.contains("11111"), "{begun}");
        // Its own trace: POST, create, INSERT, send, process, send.
        let id = &begun[..32];
        eventually("the spans of its own trace", async || {
            let spans = test.collector.trace(id);
            if spans.len() == 6 { Ok(()) } else { Err(Tree(&spans).to_string()) }
        })
        .await;
    }
    let spans = test.collector.received();
    assert!(spans.len() > before);
    assert!(test.collector.trace(&trace_id(2)).is_empty(), "an unsampled trace was exported");
}

/// What becomes of an event that no queue takes.
async fn unroutable(test: &mut Test) {
    let mut conn = PgConnection::connect(&test.stack.addresses().person_database_url).await.unwrap();
    let sql = "SELECT outbox.publish('nobody.new', 'nobody', '1', '{}', jsonb_build_object('traceparent', $1::text))";
    sqlx::query(sql).bind(traceparent(6, "01")).execute(&mut conn).await.unwrap();
    // The relay gives up on the event only while others are taken.
    let spans = eventually("it is sent", async || {
        test.post("/person/11111/income", r#"{"type": "salary", "value": 50}"#, None).await;
        let spans = test.collector.trace(&trace_id(6));
        if spans.is_empty() { Err(String::new()) } else { Ok(spans) }
    })
    .await;
    assert_eq!(spans[0].attribute("error.type").as_deref(), Some("unroutable"), "{}", Tree(&spans));
    // Each income is worth 1.
    let count = "SELECT count(*) FROM person.income";
    test.score = sqlx::query_scalar(count).fetch_one(&mut conn).await.unwrap();
    Apis::of(&test.stack.addresses()).until_score(CPF, test.score).await;
}

/// A collector that refuses, is silent, or responds with nonsense, and one that is away.
async fn endpoints_that_fail(test: &mut Test) {
    let pids: Vec<(String, String)> = test
        .stack
        .programs()
        .map(|program| (program.name().to_owned(), program.process().unwrap().pid().to_string()))
        .into();
    let before: Vec<u64> = pids.iter().map(|(_, pid)| peak(pid)).collect();
    let manners =
        [Manner::Refuses(500), Manner::Refuses(307), Manner::Babbles, Manner::Floods, Manner::IsSilent];
    for manner in manners {
        test.collector.behave(manner);
        let requests = test.collector.requests();
        for _ in 0..30 {
            let income = r#"{"type": "salary", "value": 50}"#;
            let parent = traceparent(3, "01");
            test.post(&format!("/person/{CPF}/income"), income, Some(&parent)).await;
        }
        test.score += 30;
        Apis::of(&test.stack.addresses()).until_score(CPF, test.score).await;
        eventually("the programs have tried", async || {
            let tried = test.collector.requests();
            if tried >= requests + 3 { Ok(()) } else { Err(format!("{requests} {tried}")) }
        })
        .await;
    }
    assert!(!test.collector.paths().contains("/elsewhere"), "the headers went elsewhere");
    for ((name, pid), before) in pids.iter().zip(before) {
        let after = peak(pid);
        assert!(after < before + 48 * 1024, "{name}: {before} KiB, and then {after} KiB");
    }

    // More spans than fit, while the collector is silent.
    let lost = |lines: &[Value]| {
        let lines =
            lines.iter().filter(|line| line["message"].as_str().unwrap_or_default().contains("traces"));
        lines.filter_map(|line| line["lost"].as_u64()).sum::<u64>()
    };
    assert!(lost(&test.log("person-api")) > 0);
    test.collector.behave(Manner::Takes);
    test.income(Some(&traceparent(4, "01"))).await;
    let said = |program: &str, message: &str| {
        test.log(program).iter().filter(|line| line["message"] == message).cloned().collect::<Vec<_>>()
    };
    for program in ["person-api", "person-relay", "score-projector", "score-relay"] {
        eventually(&format!("{program} exports again"), async || {
            let said = said(program, "traces are exported again");
            if said.is_empty() { Err(String::new()) } else { Ok(()) }
        })
        .await;
        // The first failure, and then at most one line a minute: not one for each of the batches.
        let failures = said(program, "traces could not be exported").len();
        assert!((1..=4).contains(&failures), "{program} said {failures} times that it fails");
        let whole = format!("{:?}", test.log(program));
        assert!(!whole.contains(SECRET), "{program} logs a secret");
    }

    // A program ends in time although the collector does not respond.
    test.collector.behave(Manner::IsSilent);
    test.income(Some(&traceparent(5, "01"))).await;
    for program in [&mut test.stack.person_api, &mut test.stack.person_relay] {
        assert!(program.stop(&CancellationToken::new()).await, "{} did not drain", program.name());
    }
    test.collector.behave(Manner::Takes);
    // And with one that is away.
    test.stack.person_relay.set_env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9");
    test.stack.person_relay.start().await.unwrap();
    test.stack.person_relay.ready(DEADLINE).await.unwrap();
}

/// The standard variables, on person-api.
async fn switches(test: &mut Test) {
    let person = test.stack.addresses().person_database_url;
    let closed = "http://127.0.0.1:9";
    let url = test.collector.url();
    // Whether the caller's trace is exported, and what the event's header says of it; and whether a new trace is exported.
    let cases = [
        ("OTEL_SDK_DISABLED", vec![("OTEL_SDK_DISABLED", "true")], (false, Some("01")), None),
        ("no exporter", vec![("OTEL_TRACES_EXPORTER", "none")], (false, Some("01")), None),
        ("always_off", vec![("OTEL_TRACES_SAMPLER", "always_off")], (false, Some("00")), Some("00")),
        (
            "parentbased_traceidratio",
            vec![("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"), ("OTEL_TRACES_SAMPLER_ARG", "0")],
            (true, Some("01")),
            Some("00"),
        ),
        ("callers are ignored", vec![("OTEL_PROPAGATORS", "none")], (false, None), Some("01")),
        ("away", vec![("OTEL_EXPORTER_OTLP_ENDPOINT", closed)], (false, Some("01")), Some("01")),
    ];
    for (case, variables, sampled, begun) in cases {
        let defaults = [
            ("OTEL_SDK_DISABLED", "false"),
            ("OTEL_TRACES_EXPORTER", "otlp"),
            ("OTEL_TRACES_SAMPLER", "parentbased_always_on"),
            ("OTEL_PROPAGATORS", "tracecontext,baggage"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()),
        ];
        test.stack.person_api.stop(&CancellationToken::new()).await;
        for (name, value) in defaults.into_iter().chain(variables) {
            test.stack.person_api.set_env(name, value);
        }
        test.stack.person_api.start().await.unwrap();
        test.stack.person_api.ready(DEADLINE).await.unwrap();
        let trace = 100 + u32::from(case.as_bytes()[0]) + u32::try_from(case.len()).unwrap();
        test.income(Some(&traceparent(trace, "01"))).await;
        let continued = test.traceparents(&person, 1).await.remove(0);
        let of_caller = continued.as_deref().and_then(|text| text.strip_prefix(&trace_id(trace)));
        assert_eq!(of_caller.map(str::trim), sampled.1, "{case}");
        test.income(None).await;
        let new = test.traceparents(&person, 1).await.remove(0);
        assert_eq!(new.as_deref().map(|text| &text[33..]), begun, "{case}");
        test.stack.person_api.stop(&CancellationToken::new()).await;
        let spans = test.collector.trace(&trace_id(trace));
        let own = spans.iter().filter(|one| one.service == "person-api").count();
        assert_eq!(own, if sampled.0 { 3 } else { 0 }, "{case}: {}", Tree(&spans));
        test.stack.person_api.start().await.unwrap();
        test.stack.person_api.ready(DEADLINE).await.unwrap();
    }
}
