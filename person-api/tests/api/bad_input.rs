//! Bad input: each is answered with a problem that names all that is wrong, and writes nothing.

use poem::{Request, http::Method};

use crate::support::{Database, exchange, post, raw_request};

const PERSON: &str = r#"{"cpf": 11111, "name": "abc", "address": "abc", "date_of_birth": "2019-06-15"}"#;

/// A person with one field replaced.
fn person(field: &str, json: &str) -> Request {
    let fields =
        [("cpf", "22222"), ("name", "\"b\""), ("address", "\"b\""), ("date_of_birth", "\"2019-06-15\"")];
    let body: Vec<String> = fields
        .iter()
        .map(|(name, value)| format!("\"{name}\": {}", if *name == field { json } else { value }))
        .collect();
    post("/person", format!("{{{}}}", body.join(", ")))
}

fn value(json: &str) -> Request {
    post("/person/11111/debt", format!("{{\"value\": {json}}}"))
}

/// Sends each to a database with one person, and shows the answers.
async fn answers(cases: Vec<(&str, Request)>) -> String {
    let database = Database::new().await;
    let app = database.app();
    app.create("/person", PERSON).await;
    let before = database.rows().await;
    let mut shown = String::new();
    for (name, request) in cases {
        shown += &exchange(&app, name, request).await;
        assert_eq!(database.rows().await, before, "{name}: something was written");
    }
    shown
}

#[tokio::test]
async fn bodies_that_are_no_json() {
    let deep = format!("{{\"value\": {}{}}}", "[".repeat(30_000), "]".repeat(30_000));
    let unclosed = format!("{{\"value\": {}", "[".repeat(60_000));
    let shown = answers(vec![
        ("nothing", post("/person", "")),
        ("broken off", post("/person", r#"{"cpf": 11111, "#)),
        ("no quotes", post("/person", "{cpf: 11111}")),
        ("a comma too many", post("/person/11111/debt", r#"{"value": 1,}"#)),
        ("more than one value", post("/person/11111/debt", r#"{"value": 1} {"value": 1}"#)),
        ("not UTF-8", post("/person/11111/debt", b"{\"value\": \"\xff\"}".to_vec())),
        (
            "a control character in a string",
            post("/person/11111/income", "{\"type\": \"a\u{1}\", \"value\": 1}"),
        ),
        ("NaN", value("NaN")),
        ("infinity", value("-Infinity")),
        ("a number with a leading zero", value("01")),
        ("a number with a plus", value("+1")),
        ("deep and unclosed", post("/person/11111/debt", unclosed)),
        ("deep but well-formed: of the wrong type", post("/person/11111/debt", deep)),
        ("half a surrogate pair in a name", post("/person/11111/debt", r#"{"\ud800": 1}"#)),
    ])
    .await;
    insta::assert_snapshot!(shown);
}

#[tokio::test]
async fn bodies_that_are_no_object_with_these_fields() {
    let many: Vec<String> = (0..2000).map(|n| format!("\"f{n}\": 0")).collect();
    let shown = answers(vec![
        ("an array", post("/person", "[]")),
        ("null", post("/person", "null")),
        ("a string", post("/person/11111/debt", "\"value\"")),
        ("everything missing", post("/person", "{}")),
        ("everything missing of an income", post("/person/11111/income", "{}")),
        ("unknown fields, with names that a pointer escapes",
         post("/person/11111/debt", r#"{"value": 1, "type": "loan", "a/b~c d%": 1, "é\u0000": null, "": 1}"#)),
        ("a field twice", post("/person/11111/debt", r#"{"value": 1, "value": 2}"#)),
        ("a field twice, spelled differently", post("/person/11111/debt", r#"{"value": 1, "v\u0061lue": 1}"#)),
        ("an optional field twice, an unknown one twice",
         post("/person", r#"{"cpf": 2, "name": "b", "date_of_birth": "2019-06-15", "address": null, "address": null, "x": 1, "x": 2}"#)),
        ("wrong types everywhere", post("/person", r#"{"cpf": true, "name": 1, "address": [], "date_of_birth": 20190615}"#)),
        ("null everywhere", post("/person", r#"{"cpf": null, "name": null, "address": null, "date_of_birth": null}"#)),
        ("wrong types of an asset", post("/person/11111/asset", r#"{"type": {}, "value": "1000"}"#)),
        ("path and body at once", post("/person/x/asset", r#"{"type": "", "value": -1}"#)),
        ("thousands of unknown fields", post("/person/11111/debt", format!("{{{}}}", many.join(", ")))),
    ])
    .await;
    insta::assert_snapshot!(shown);
}

#[tokio::test]
async fn values_against_their_rules() {
    let (long, just) = (format!("\"{}\"", "é".repeat(201)), format!("\"{}\"", "é".repeat(501)));
    let shown = answers(vec![
        ("a cpf of 0", person("cpf", "0")),
        ("a cpf of 12 digits", person("cpf", "100000000000")),
        ("a cpf of 12 digits in a string", person("cpf", "\"000000000001\"")),
        ("a cpf of letters", person("cpf", "\"abc\"")),
        ("a cpf with points", person("cpf", "\"123.456.789-09\"")),
        ("a negative cpf", person("cpf", "-1")),
        ("a cpf with a fraction", person("cpf", "1.0")),
        ("a cpf with an exponent", person("cpf", "1e3")),
        ("a cpf of other digits", person("cpf", "\"١٢٣\"")),
        ("a cpf of 0 in the path", post("/person/0/debt", r#"{"value": 1}"#)),
        ("a cpf of 12 digits in the path", post("/person/100000000000/debt", r#"{"value": 1}"#)),
        ("a cpf of letters in the path", raw_request(Method::GET, "/person/abc", None, "")),
        ("a negative value", value("-0.0001")),
        ("a value of 30 digits", value("123456789012345678901234567890")),
        ("a value of 16 digits", value("1000000000000000")),
        ("a value with 5 decimals", value("0.00001")),
        ("a value in a string", value("\"1\"")),
        ("an enormous exponent", value("1e999999999")),
        ("an empty name", person("name", "\"\"")),
        ("a blank name", person("name", "\" \\u00a0 \"")),
        ("a name that is too long", person("name", &long)),
        ("an address that is too long", person("address", &just)),
        ("NUL in a name", person("name", "\"a\\u0000b\"")),
        ("a line break in an address", person("address", "\"a\\nb\"")),
        ("half a surrogate pair", person("name", "\"\\ud800\"")),
        ("no date", person("date_of_birth", "\"2019-02-30\"")),
        ("a date without its zone", person("date_of_birth", "\"2019-06-15T19:23:55\"")),
        (
            "a year that RFC 3339 cannot write in UTC",
            person("date_of_birth", "\"9999-12-31T23:59:59-01:00\""),
        ),
        ("a year before the first", person("date_of_birth", "\"0000-12-31\"")),
    ])
    .await;
    insta::assert_snapshot!(shown);
}

#[tokio::test]
async fn requests_of_the_wrong_kind_or_size() {
    let large = format!("{{\"value\": 1{}}}", " ".repeat(64 * 1024));
    let fits = format!("{{\"value\": -1{}}}", " ".repeat(64 * 1024 - 13));
    let shown = answers(vec![
        ("no media type", raw_request(Method::POST, "/person", None, PERSON)),
        ("a form", raw_request(Method::POST, "/person", Some("application/x-www-form-urlencoded"), PERSON)),
        (
            "nearly JSON",
            raw_request(Method::POST, "/person/11111/debt", Some("application/jsonp"), r#"{"value": 1}"#),
        ),
        ("too large", post("/person/11111/debt", large)),
        ("just not too large", post("/person/11111/debt", fits)),
    ])
    .await;
    insta::assert_snapshot!(shown);
}

#[tokio::test]
async fn check_digits_are_looked_at_when_told() {
    let database = Database::new().await;
    let api = database.api(std::time::Duration::from_secs(30), outbox::Waker::new());
    let app = crate::support::App::new(&api.checking(person_api::request::CpfCheck::Strict));
    let mut shown = String::new();
    for (name, cpf) in
        [("wrong", "11111"), ("right", "52998224725"), ("right, with zeros before", "\"00000000191\"")]
    {
        shown += &exchange(&app, name, person("cpf", cpf)).await;
    }
    insta::assert_snapshot!(crate::support::Redactions::default().apply(&shown));
}
