//! What the program writes down of its requests: what `docs/operating/log.md` says, and nothing personal.

use serde_json::Value;
use tokio::io::AsyncReadExt;

use crate::{
    outage::{DEBT, PERSON, lock},
    support::{Database, Program, post_request, until},
};

/// The lines of requests in a log.
fn requests(log: &str) -> Vec<Value> {
    let lines = log.lines().map(|line| serde_json::from_str(line).unwrap());
    lines.filter(|line: &Value| line["message"] == "request").collect()
}

#[tokio::test]
async fn a_request_is_one_line_with_the_fields_of_the_document() {
    let database = Database::new().await;
    let program = Program::start_with(&database.url(None), &["--log", "debug"]).await;
    program.post("/person", PERSON).await;
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let request = format!(
        "GET /person/11111/debt?limit=1 HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx-request-id: the-client's\r\n\
         traceparent: 00-{trace}-b7ad6b7169203331-01\r\n\r\n"
    );
    let mut answer = String::new();
    program.send(&request).await.read_to_string(&mut answer).await.unwrap();
    assert!(answer.contains("\r\nx-request-id: the-client's\r\n"), "{answer}");
    program.get("/person/22222").await;
    program.get("/somewhere/11111").await;
    program.get("/live").await;

    // One who does not wait for the answer.
    let holder = lock(&database).await;
    let impatient = program.send(&post_request("/person/11111/debt", DEBT)).await;
    database.until_blocked(1).await;
    drop(impatient);
    let hung_up = "http_requests_total{method=\"POST\",route=\"none\",status=\"499\"} 1\n";
    until("it is noticed", async || program.get("/metrics").await.contains(hung_up)).await;
    holder.rollback().await.unwrap();

    program.terminate();
    let (_, log) = program.ended().await;
    let lines = requests(&log);
    let document = include_str!("../../../docs/operating/log.md");
    let (_, table) = document.split_once("## A request").unwrap();
    let (table, _) = table.split_once("\n## ").unwrap();
    let documented = table.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    let mut documented: Vec<&str> = documented.chain(["level", "message", "target", "timestamp"]).collect();
    documented.sort_unstable();
    let traced = lines.iter().find(|line| line["trace_id"] == trace).unwrap();
    let mut fields: Vec<&String> = traced.as_object().unwrap().keys().collect();
    fields.sort_unstable();
    assert_eq!(fields, documented);
    assert_eq!(traced["request_id"], "the-client's");

    let shown: Vec<String> = lines
        .iter()
        .filter(|line| !["/metrics", "/ready"].contains(&line["route"].as_str().unwrap()))
        .map(|line| {
            assert!(line["duration_ms"].as_f64().unwrap() > 0.0, "{line}");
            let field = |name: &str| line[name].to_string().replace('"', "");
            ["level", "method", "route", "status", "caller"].map(field).join(" ")
        })
        .collect();
    insta::assert_snapshot!(shown.join("\n"));
}

#[tokio::test]
async fn nothing_personal_is_written_down_whatever_is_sent() {
    const CPF: &str = "52998224725";
    const SECRETS: [&str; 6] = [CPF, "Brunhilde", "Gnitaheide", "1876-08-13", "s3cr3t-k3y", "4711.17"];
    let database = Database::new().await;
    let program = Program::start_with(&database.url(None), &["--log", "trace"]).await;
    let person = format!(
        r#"{{"cpf": {CPF}, "name": "Brunhilde", "address": "Gnitaheide", "date_of_birth": "1876-08-13"}}"#
    );
    let sent = |method: &str, path: &str, headers: &str, body: &str| {
        let length = body.len();
        format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {length}\r\n\
             authorization: Bearer s3cr3t-k3y\r\ncookie: a=s3cr3t-k3y\r\nuser-agent: Brunhilde\r\n\
             referer: /person/{CPF}\r\nx-request-id: {CPF}\r\ntraceparent: 00-{CPF}\r\n{headers}\r\n{body}"
        )
    };
    let json = "content-type: application/json\r\n";
    let keyed = format!("{json}idempotency-key: Brunhilde\r\nif-match: Gnitaheide\r\n");
    let income = format!("/person/{CPF}/income");
    let value = r#"{"type": "Gnitaheide", "value": 4711.17}"#;
    for (method, path, headers, body) in [
        ("POST", "/person", keyed.as_str(), person.as_str()),
        // It exists.
        ("POST", "/person", json, &person),
        ("POST", "/person", json, &person.replace('}', "")),
        ("POST", "/person", json, &person.replace("\"cpf\"", "\"Brunhilde\"")),
        ("POST", "/person", json, r#"{"cpf": "Brunhilde", "name": 52998224725, "address": ["Gnitaheide"]}"#),
        ("POST", "/person", json, r#""Brunhilde 52998224725""#),
        ("POST", "/person", json, &format!("{person}{}", " ".repeat(70_000))),
        ("POST", "/person", "content-type: Brunhilde/Gnitaheide\r\n", &person),
        ("POST", &income, &keyed, value),
        ("POST", &income, json, r#"{"type": "Gnitaheide", "value": "4711.17"}"#),
        ("GET", &format!("/person/{CPF}"), "", ""),
        ("GET", &format!("/person/{CPF}/income?after=Brunhilde&limit={CPF}&name=Gnitaheide"), "", ""),
        ("PATCH", &format!("/person/{CPF}"), &keyed, r#"{"name": "Brunhilde", "address": "Gnitaheide"}"#),
        ("PATCH", &format!("/person/{CPF}"), json, r#"{"name": "Brunhilde", "address": "Gnitaheide"}"#),
        ("GET", &format!("/Brunhilde/{CPF}?Gnitaheide"), "", ""),
        ("BRUNHILDE", &format!("/person/{CPF}"), "", ""),
        ("GET", &format!("/person/{CPF}/income/Brunhilde"), "", ""),
        ("DELETE", &format!("/person/{CPF}"), "", ""),
    ] {
        let mut answer = Vec::new();
        program.send(&sent(method, path, headers, body)).await.read_to_end(&mut answer).await.unwrap();
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 ") && !answer.contains("HTTP/1.1 500"), "{answer}");
    }
    // A database that fails, and tells what was to be stored.
    sqlx::raw_sql(
        "CREATE FUNCTION public.bad() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE EXCEPTION 'no: %', NEW.payload USING DETAIL = NEW.payload::text; END $$;
         CREATE TRIGGER bad BEFORE INSERT ON outbox.event FOR EACH ROW EXECUTE FUNCTION public.bad()",
    )
    .execute(&database.admin)
    .await
    .unwrap();
    let mut answer = String::new();
    program.send(&sent("POST", "/person", json, &person)).await.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 500 ") && !answer.contains("Brunhilde"), "{answer}");
    // What is no HTTP.
    for raw in ["Brunhilde 52998224725\r\n\r\n", "GET /person/52998224725 HTTP/1.1\r\nBrunhilde\r\n\r\n"] {
        let mut answer = Vec::new();
        program.send(raw).await.read_to_end(&mut answer).await.unwrap();
    }
    let metrics = program.get("/metrics").await;
    program.terminate();
    let (code, log) = program.ended().await;
    assert_eq!(code, Some(0));
    assert!(log.contains("a request failed"), "{log}");
    assert!(requests(&log).len() >= 18, "{log}");
    for (name, text) in [("log", &log), ("metrics", &metrics)] {
        for secret in SECRETS {
            let line = text.lines().find(|line| line.to_lowercase().contains(&secret.to_lowercase()));
            assert_eq!(line, None, "{secret} is in the {name}");
        }
    }
}
