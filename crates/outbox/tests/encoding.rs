//! The outbox is for databases in UTF8, and its migrations are ASCII, so that no session's encoding matters to them.

use std::{fs, path::Path};

use outbox::{SourceError, install};
use sqlx::{AssertSqlSafe, Connection, PgConnection};

/// Landed before the rule, and migrations are never edited.
const BEFORE: [&str; 3] = ["outbox/0001_outbox.sql", "outbox/0003_partitions.sql", "person/0001_person.sql"];

#[test]
fn migrations_are_ascii() {
    let mut read = 0;
    let mut wrong = Vec::new();
    let migrations = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../migrations");
    for schema in fs::read_dir(migrations).unwrap() {
        let schema = schema.unwrap();
        for file in fs::read_dir(schema.path()).unwrap() {
            let file = file.unwrap();
            let name = format!("{}/{}", schema.file_name().display(), file.file_name().display());
            read += 1;
            if !BEFORE.contains(&&*name) && !fs::read(file.path()).unwrap().is_ascii() {
                wrong.push(name);
            }
        }
    }
    assert!(read > 20, "only {read} migrations were found");
    assert!(wrong.is_empty(), "not ASCII: {}", wrong.join(", "));
}

#[tokio::test]
async fn another_encoding_is_refused_before_anything_is_made() {
    let url = devstack::testing::database("encoding").await;
    let (server, name) = url.rsplit_once('/').unwrap();
    let mut admin = PgConnection::connect(&url).await.unwrap();
    let mut said = Vec::new();
    for encoding in ["LATIN1", "SQL_ASCII", "EUC_JP"] {
        let database = format!("{name}_{}", encoding.to_lowercase());
        let create =
            format!("CREATE DATABASE {database} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0");
        sqlx::query(AssertSqlSafe(create)).execute(&mut admin).await.unwrap();
        let mut conn = PgConnection::connect(&format!("{server}/{database}")).await.unwrap();
        let error = install(&mut conn, "person").await.unwrap_err();
        assert!(matches!(error, SourceError::Encoding { .. }), "{error}");
        said.push(error.to_string());
        let made = "SELECT count(*) FROM pg_namespace WHERE nspname = 'outbox'";
        assert_eq!(sqlx::query_scalar::<_, i64>(made).fetch_one(&mut conn).await.unwrap(), 0);
    }
    insta::assert_snapshot!(said[0]);
}
