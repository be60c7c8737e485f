//! Bad input: each is answered with a problem that names all that is wrong, and writes nothing.

use poem::{Request, http::Method};

use crate::support::{Database, exchange, post, raw_request, with};

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
        ("a field with an endless name", post("/person/11111/debt", format!(r#"{{"value": 1, "{}": 2}}"#, "é".repeat(30_000)))),
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
        ("a name that shows nothing", person("name", "\"\\u200b\\u2060\\ufeff\"")),
        ("a name of fillers and selectors", person("name", "\"\\u115f\\u180b\\ufe0f\"")),
        ("a name of a tag character", person("name", "\"\\udb40\\udc41\"")),
        ("a name of a variation selector of the second set", person("name", "\"\\udb40\\udd00\"")),
        ("a name of a soft hyphen", person("name", "\"\\u00ad\"")),
        ("an address that is turned round", person("address", "\"abc \\u202edcba\"")),
        ("a type with an isolate", post("/person/11111/income", "{\"type\": \"a\\u2066b\", \"value\": 1}")),
        (
            "a type of nothing but a joiner",
            post("/person/11111/asset", "{\"type\": \"\\u200d\", \"value\": 1}"),
        ),
        ("DEL in a name", person("name", "\"a\\u007f\"")),
        ("a control character of the second set", person("address", "\"a\\u0085b\"")),
        ("a line separator", person("address", "\"a\\u2028b\"")),
        ("a tab in a type", post("/person/11111/income", r#"{"type": "a\tb", "value": 1}"#)),
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
        ("a leap second into the year 10000", person("date_of_birth", "\"9999-12-31T23:59:60Z\"")),
        ("a leap second at noon", person("date_of_birth", "\"2016-12-31T12:00:60Z\"")),
    ])
    .await;
    insta::assert_snapshot!(shown);
}

/// Where a text may stand, a text of so many characters there, and what it answers then.
#[tokio::test]
async fn texts_are_taken_up_to_their_limit_wherever_they_stand() {
    let database = Database::new().await;
    let app = database.app();
    app.create("/person", PERSON).await;
    let (income, _) = app.create("/person/11111/income", r#"{"type": "t", "value": 1}"#).await;
    let (asset, _) = app.create("/person/11111/asset", r#"{"type": "t", "value": 1}"#).await;
    let places = [
        (Method::POST, "/person", "name", 200),
        (Method::POST, "/person", "address", 500),
        (Method::PATCH, "/person/11111", "name", 200),
        (Method::PATCH, "/person/11111", "address", 500),
        (Method::POST, "/person/11111/income", "type", 100),
        (Method::POST, "/person/11111/asset", "type", 100),
        (Method::PUT, &income, "type", 100),
        (Method::PUT, &asset, "type", 100),
    ];
    for (number, (method, path, field, longest)) in places.into_iter().enumerate() {
        let send = async |length| {
            let mut body = match (path, method.as_str()) {
                ("/person", _) => {
                    let person =
                        format!(r#"{{"cpf": {}, "name": "n", "date_of_birth": "2019-06-15"}}"#, number + 1);
                    serde_json::from_str(&person).unwrap()
                }
                (_, "PATCH") => serde_json::json!({}),
                _ => serde_json::json!({"value": 2}),
            };
            body[field] = "é".repeat(length).into();
            let request = raw_request(method.clone(), path, Some("application/json"), body.to_string());
            let answer = app.call(request).await;
            (answer.status().as_u16(), answer.into_body().into_string().await.unwrap())
        };
        let (status, answer) = send(longest + 1).await;
        let said =
            format!(r##"{{"pointer":"#/{field}","detail":"must not be longer than {longest} characters"}}"##);
        assert!(status == 422 && answer.contains(&said), "{method} {path} {field}: {status} {answer}");
        let (status, answer) = send(longest).await;
        assert!([200, 201].contains(&status), "{method} {path} {field}: {status} {answer}");
    }
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
        (
            "nearly JSON, of a patch",
            raw_request(Method::PATCH, "/person/11111", Some("text/json"), r#"{"name": "b"}"#),
        ),
        ("packed", with(post("/person/11111/debt", r#"{"value": 1}"#), "content-encoding", "gzip")),
        ("a query", post("/person/11111/debt?value=1", r#"{"value": 1}"#)),
        ("a query of a new person", post("/person?dry_run=true", PERSON.replace("11111", "22222"))),
        (
            "a query of a patch",
            raw_request(Method::PATCH, "/person/11111?x", Some("application/json"), r#"{"name": "b"}"#),
        ),
        ("a query of a deletion", raw_request(Method::DELETE, "/person/11111?after=2", None, "")),
        ("a query of a read", raw_request(Method::GET, "/person/11111?fields=name", None, "")),
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
