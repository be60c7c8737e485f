//! What a client gets, and the rows that a write leaves.

use poem::http::Method;

use crate::support::{Database, Redactions, exchange, post, raw_request};

const PERSON: &str = include_str!("../../../payloads/new_person.json");
const INCOME: &str = include_str!("../../../payloads/new_income.json");
const ASSET: &str = include_str!("../../../payloads/new_asset.json");
const DEBT: &str = include_str!("../../../payloads/new_debt.json");

#[tokio::test]
async fn the_samples_are_created_and_read() {
    let database = Database::new().await;
    let app = database.app();
    let mut shown = String::new();
    for (name, request) in [
        ("a person", post("/person", PERSON)),
        ("an income", post("/person/11111/income", INCOME)),
        ("an asset", post("/person/11111/asset", ASSET)),
        ("a debt", post("/person/11111/debt", DEBT)),
        ("all of it", raw_request(Method::GET, "/person/11111", None, "")),
        ("only the headers of it", raw_request(Method::HEAD, "/person/11111", None, "")),
    ] {
        shown += &exchange(&app, name, request).await;
    }
    insta::assert_snapshot!(Redactions::default().apply(&shown));
}

#[tokio::test]
async fn every_form_that_the_contract_allows_is_taken() {
    let database = Database::new().await;
    let app = database.app();
    let mut shown = String::new();
    for (name, request) in [
        (
            "without address, a string of digits, a date",
            post(
                "/person",
                r#"{"cpf": "00000022222", "name": "Ana \"Zé\" \u00c7\ud83d\ude00 / ~", "date_of_birth": "2000-02-29"}"#,
            ),
        ),
        (
            "null for the address, a media type with parameters",
            raw_request(
                Method::POST,
                "/person",
                Some("Application/JSON; charset=utf-8"),
                r#"{"cpf": 99999999999, "name": "b", "address": null, "date_of_birth": "1999-12-31T23:59:59.123456Z"}"#,
            ),
        ),
        (
            "15 digits with 4 decimals",
            post("/person/22222/asset", r#"{"type": "farm", "value": 999999999999999.9999}"#),
        ),
        ("another notation", post("/person/22222/asset", r#"{"value": 1.50e2, "type": "farm"}"#)),
        ("nothing", post("/person/22222/debt", r#"{"value": 0}"#)),
        (
            "zeros before and after",
            post("/person/00000022222/income", r#"{"type": "wage", "value": 0.10000000}"#),
        ),
        ("all of it", raw_request(Method::GET, "/person/0022222", None, "")),
    ] {
        shown += &exchange(&app, name, request).await;
    }
    insta::assert_snapshot!(Redactions::default().apply(&shown));
}

#[tokio::test]
async fn a_long_list_is_cut_and_says_so() {
    let database = Database::new().await;
    let app = database.app();
    app.create("/person", PERSON).await;
    sqlx::raw_sql(
        "INSERT INTO person.income (id, person_id, type, value)
         SELECT outbox.uuid7(), id, 't', n FROM person.person, generate_series(1, 1000) n;
         INSERT INTO person.asset (id, person_id, type, value)
         SELECT outbox.uuid7(), id, 't', n FROM person.person, generate_series(1, 1000) n;
         INSERT INTO person.debt (id, person_id, value)
         SELECT outbox.uuid7(), id, n FROM person.person, generate_series(1, 1000) n",
    )
    .execute(&database.admin)
    .await
    .unwrap();
    let mut cut = Vec::new();
    for one_more in [None, Some("debt"), Some("income"), Some("asset")] {
        if let Some(kind) = one_more {
            let body = if kind == "debt" { DEBT } else { INCOME };
            app.create(&format!("/person/11111/{kind}"), body).await;
            cut.push(format!("{kind}s"));
        }
        let response = app.call(raw_request(Method::GET, "/person/11111", None, "")).await;
        let body: serde_json::Value =
            serde_json::from_slice(&response.into_body().into_vec().await.unwrap()).unwrap();
        let mut said: Vec<String> = serde_json::from_value(body["truncated"].clone()).unwrap();
        said.sort_unstable();
        cut.sort_unstable();
        assert_eq!(said, cut);
        for list in ["incomes", "assets", "debts"] {
            assert_eq!(body[list].as_array().unwrap().len(), 1000, "{list}");
        }
    }
}

#[tokio::test]
async fn what_is_not_there_and_what_is_there_already() {
    let database = Database::new().await;
    let app = database.app();
    app.create("/person", PERSON).await;
    let before = database.rows().await;
    let mut shown = String::new();
    for (name, request) in [
        ("a cpf that exists", post("/person", PERSON)),
        ("an income of nobody", post("/person/12345/income", INCOME)),
        ("an asset of nobody", post("/person/12345/asset", ASSET)),
        ("a debt of nobody", post("/person/12345/debt", DEBT)),
        ("nobody", raw_request(Method::GET, "/person/12345", None, "")),
        ("a path that is not there", raw_request(Method::GET, "/people", None, "")),
        ("a method that a collection has not", raw_request(Method::GET, "/person", None, "")),
        ("a method that a person has not", post("/person/11111", PERSON)),
        (
            "a method that items have not",
            raw_request(Method::PUT, "/person/11111/debt", Some("application/json"), DEBT),
        ),
    ] {
        shown += &exchange(&app, name, request).await;
    }
    insta::assert_snapshot!(shown);
    assert_eq!(database.rows().await, before, "something was written");
}
