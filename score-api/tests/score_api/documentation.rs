//! `/openapi.json` and `/docs`.

use crate::support::{Database, Program};

#[tokio::test]
async fn the_document_describes_every_operation() {
    let database = Database::migrated().await;
    let program = Program::start(&database.url()).await;
    insta::assert_snapshot!(program.get("/openapi.json").await.body);
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
