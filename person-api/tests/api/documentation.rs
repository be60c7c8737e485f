//! `/openapi.json` and `/docs`.

use std::collections::BTreeSet;

use person_api::api::OPENAPI;
use poem::http::Method;
use serde_json::Value;

use crate::support::{App, Database, plain, post};

async fn document(app: &App) -> Value {
    let response = app.call(plain(Method::GET, "/openapi.json")).await;
    assert_eq!(response.content_type(), Some("application/json"));
    let text = response.into_body().into_string().await.unwrap();
    assert_eq!(text, web::documentation::json(OPENAPI) + "\n");
    serde_json::from_str(&text).unwrap()
}

/// Each sample of the document is taken as it stands, and is the one of `payloads/`.
#[tokio::test]
async fn samples_of_the_document_are_taken() {
    let database = Database::new().await;
    let app = database.app();
    let document = document(&app).await;
    for (path, schema, payload) in [
        ("/person", "NewPerson", include_str!("../../../payloads/new_person.json")),
        ("/person/11111/income", "NewIncome", include_str!("../../../payloads/new_income.json")),
        ("/person/11111/asset", "NewAsset", include_str!("../../../payloads/new_asset.json")),
        ("/person/11111/debt", "NewDebt", include_str!("../../../payloads/new_debt.json")),
    ] {
        let sample = &document["components"]["schemas"][schema]["examples"][0];
        assert_eq!(*sample, serde_json::from_str::<Value>(payload).unwrap(), "{schema}");
        let response = app.call(post(path, sample.to_string())).await;
        assert_eq!(response.status().as_u16(), 201, "{path} {sample}");
    }
}

/// Whoever reads the document sees what each body looks like, and can call each operation by a name.
#[tokio::test]
async fn every_operation_has_a_name_and_every_body_an_example() {
    let database = Database::new().await;
    let document = document(&database.app()).await;
    let schemas = document["components"]["schemas"].as_object().unwrap();
    let bare: Vec<_> =
        schemas.iter().filter(|(name, schema)| *name != "Problem" && schema["examples"].is_null()).collect();
    assert!(bare.is_empty(), "{bare:?}");
    let items = document["paths"].as_object().unwrap().values();
    let operations =
        items.flat_map(|item| item.as_object().unwrap().values()).filter(|value| value.is_object());
    let names: Vec<_> = operations.map(|operation| operation["operationId"].as_str().unwrap()).collect();
    let different: BTreeSet<_> = names.iter().collect();
    assert!(names.len() == 19 && different.len() == 19, "{names:?}");
}

/// The page is whole: a browser that may load nothing from anywhere shows it.
#[tokio::test]
async fn the_page_needs_nothing_from_elsewhere() {
    let database = Database::new().await;
    let app = database.app();
    let response = app.call(plain(Method::GET, "/docs")).await;
    let policy = response.headers()["content-security-policy"].to_str().unwrap().to_owned();
    assert!(policy.starts_with("default-src 'none'; ") && !policy.contains("http"), "{policy}");
    let page = response.into_body().into_string().await.unwrap();
    for said in ["<title>person-api</title>", "Create a person", "\"operationId\": \"postPerson\""] {
        assert!(page.contains(said), "{said}");
    }
    for elsewhere in ["<link", "<script src", "@import", "@font-face", "url(http", "url(//"] {
        assert!(!page.contains(elsewhere), "{elsewhere}");
    }
}
