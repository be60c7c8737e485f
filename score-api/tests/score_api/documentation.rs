//! `/openapi.json` and `/docs`.

use crate::support::{Database, Program};

/// The document is as it is written.
#[tokio::test]
async fn the_document_is_served() {
    let database = Database::migrated().await;
    let program = Program::start(&database.url()).await;
    let document = program.get("/openapi.json").await;
    assert_eq!(document.header("content-type"), "application/json");
    assert_eq!(document.body, web::documentation::json(include_str!("../../openapi.yaml")) + "\n");
}

/// The page is whole: a browser that may load nothing from anywhere shows it.
#[tokio::test]
async fn the_page_needs_nothing_from_elsewhere() {
    let database = Database::migrated().await;
    let program = Program::start(&database.url()).await;
    let page = program.get("/docs").await;
    let policy = page.header("content-security-policy");
    assert!(policy.starts_with("default-src 'none'; ") && !policy.contains("http"), "{policy}");
    assert!(page.body.contains("<title>score-api</title>") && page.body.contains("Read a person's score"));
    for elsewhere in ["<link", "<script src", "@import", "@font-face", "url(http", "url(//"] {
        assert!(!page.body.contains(elsewhere), "{elsewhere}");
    }
}
