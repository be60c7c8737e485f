//! `/openapi.json` and `/docs`.

use poem::http::Method;
use serde_json::Value;

use crate::support::{Database, post, raw_request};

#[tokio::test]
async fn the_document_describes_every_operation() {
    let database = Database::new().await;
    let app = database.app();
    let response = app.call(raw_request(Method::GET, "/openapi.json", None, "")).await;
    assert_eq!(response.content_type(), Some("application/json"));
    insta::assert_snapshot!(response.into_body().into_string().await.unwrap());
}

/// Each sample of the document is taken as it stands.
#[tokio::test]
async fn samples_of_the_document_are_taken() {
    let database = Database::new().await;
    let app = database.app();
    let response = app.call(raw_request(Method::GET, "/openapi.json", None, "")).await;
    let document: Value = serde_json::from_slice(&response.into_body().into_vec().await.unwrap()).unwrap();
    for (path, schema) in [
        ("/person", "NewPerson"),
        ("/person/11111/income", "NewIncome"),
        ("/person/11111/asset", "NewAsset"),
        ("/person/11111/debt", "NewDebt"),
    ] {
        let sample = &document["components"]["schemas"][schema]["example"];
        let response = app.call(post(path, sample.to_string())).await;
        assert_eq!(response.status().as_u16(), 201, "{path} {sample}");
    }
}

/// Whoever reads the document sees what each body looks like, and can call each operation by a name.
#[tokio::test]
async fn every_operation_has_a_name_and_every_body_an_example() {
    let database = Database::new().await;
    let app = database.app();
    let response = app.call(raw_request(Method::GET, "/openapi.json", None, "")).await;
    let document: Value = serde_json::from_slice(&response.into_body().into_vec().await.unwrap()).unwrap();
    let schemas = document["components"]["schemas"].as_object().unwrap();
    let bare: Vec<_> =
        schemas.iter().filter(|(name, schema)| *name != "Problem" && schema["example"].is_null()).collect();
    assert!(bare.is_empty(), "{bare:?}");
    let paths = document["paths"].as_object().unwrap().values();
    let operations = paths.flat_map(|path| path.as_object().unwrap().values());
    let names: Vec<_> = operations.map(|operation| operation["operationId"].as_str().unwrap()).collect();
    let different: std::collections::BTreeSet<_> = names.iter().collect();
    assert!(names.len() == 19 && different.len() == 19, "{names:?}");
}

/// The page is whole: a browser that may load nothing from anywhere shows it.
#[tokio::test]
async fn the_page_needs_nothing_from_elsewhere() {
    let database = Database::new().await;
    let app = database.app();
    let response = app.call(raw_request(Method::GET, "/docs", None, "")).await;
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
