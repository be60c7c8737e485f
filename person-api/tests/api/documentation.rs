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

/// The page is whole: a browser that may load nothing from anywhere shows it.
#[tokio::test]
async fn the_page_needs_nothing_from_elsewhere() {
    let database = Database::new().await;
    let app = database.app();
    let response = app.call(raw_request(Method::GET, "/docs", None, "")).await;
    let policy = response.headers()["content-security-policy"].to_str().unwrap().to_owned();
    assert!(policy.starts_with("default-src 'none'; ") && !policy.contains("http"), "{policy}");
    let page = response.into_body().into_string().await.unwrap();
    assert!(
        page.contains("<title>person-api</title>")
            && page.contains("\"operationId\"") | page.contains("Create a person")
    );
    for elsewhere in ["<link", "<script src", "@import", "@font-face", "url(http", "url(//"] {
        assert!(!page.contains(elsewhere), "{elsewhere}");
    }
}
