//! The outbox rows of each write, as the relay will forward them.

use events::PersonEvent;
use poem::http::Method;
use serde_json::Value;

use crate::support::{Database, Redactions, raw_request};

const PERSON: &str = include_str!("../../../payloads/new_person.json");

#[derive(sqlx::FromRow)]
struct Row {
    id: uuid::Uuid,
    aggregate_type: String,
    aggregate_id: String,
    version: i64,
    r#type: String,
    payload: String,
    headers: Option<String>,
}

async fn rows(database: &Database) -> Vec<Row> {
    sqlx::query_as(
        "SELECT id, aggregate_type, aggregate_id, version, type, payload::text, headers::text
         FROM outbox.event ORDER BY position",
    )
    .fetch_all(&database.admin)
    .await
    .unwrap()
}

#[tokio::test]
async fn each_write_leaves_one_event_with_the_exact_record() {
    let database = Database::new().await;
    let app = database.app();
    app.create("/person", PERSON).await;
    app.create("/person/11111/income", r#"{"type": "renting", "value": 1000}"#).await;
    app.create("/person/11111/asset", r#"{"type": "farm \"é\" 😀", "value": 999999999999999.9999}"#).await;
    app.create("/person/11111/debt", r#"{"value": 0.50}"#).await;
    app.create("/person", r#"{"cpf": "22222", "name": "b", "date_of_birth": "1800-01-01T00:00:00.000001Z"}"#)
        .await;
    app.create("/person/22222/debt", r#"{"value": 123456789012345.6789}"#).await;

    let mut redactions = Redactions::default();
    let mut shown = String::new();
    for row in rows(&database).await {
        assert_eq!(row.id.get_version_num(), 7);
        let person = redactions.apply(&row.aggregate_id);
        shown += &format!("{} {person} {} {}\n", row.aggregate_type, row.version, row.r#type);
        shown += &format!("{:?} {}\n\n", row.headers, redactions.apply(&row.payload));
        read_without_loss(&row.r#type, &row.payload);
    }
    insta::assert_snapshot!(shown);

    // The rows are as exact as the events.
    let values: Vec<String> = sqlx::query_scalar(
        "SELECT value::text FROM (SELECT id, value FROM person.income UNION ALL SELECT id, value FROM person.asset
                                  UNION ALL SELECT id, value FROM person.debt) item ORDER BY id",
    )
    .fetch_all(&database.admin)
    .await
    .unwrap();
    assert_eq!(values, ["1000.0000", "999999999999999.9999", "0.5000", "123456789012345.6789"]);
}

/// What a subscriber in Rust reads is what was stored, to the last digit.
fn read_without_loss(type_: &str, payload: &str) {
    let read = match PersonEvent::parse(type_, payload.as_bytes()).unwrap() {
        PersonEvent::New(person) => serde_json::to_string(&person),
        PersonEvent::ItemNew(kind, item) => {
            assert_eq!(type_, format!("{kind}.new"));
            assert_eq!(item.person_id, item.person.id);
            serde_json::to_string(&item)
        }
        other => panic!("{other:?} is not what was written"),
    };
    // The same fields in the same order; only an instant has several spellings.
    let (read, stored) = (spelled_alike(&read.unwrap()), spelled_alike(payload));
    assert_eq!(read, stored);
}

/// The JSON with its times in one spelling.
fn spelled_alike(json: &str) -> String {
    json.split('"')
        .map(|part| match chrono::DateTime::parse_from_rfc3339(part) {
            Ok(time) => time.to_utc().to_rfc3339(),
            Err(_) => part.to_owned(),
        })
        .collect::<Vec<_>>()
        .join("\"")
}

#[tokio::test]
async fn bodies_have_the_shape_of_the_golden_ones() {
    let database = Database::new().await;
    let app = database.app();
    app.create("/person", PERSON).await;
    for kind in ["income", "asset"] {
        app.create(&format!("/person/11111/{kind}"), r#"{"type": "t", "value": 1}"#).await;
    }
    app.create("/person/11111/debt", r#"{"value": 1}"#).await;
    for row in rows(&database).await {
        let golden = format!("{}/../crates/events/golden/{}-2.json", env!("CARGO_MANIFEST_DIR"), row.r#type);
        let golden = std::fs::read_to_string(golden).unwrap();
        assert_eq!(names(&row.payload), names(&golden), "{}", row.r#type);
        assert!(!row.payload.contains(": ") && !row.payload.contains(", "), "compact");
    }
}

/// The names of all fields in their order.
fn names(json: &str) -> Vec<String> {
    let _: Value = serde_json::from_str(json).unwrap();
    json.split('"')
        .collect::<Vec<_>>()
        .windows(2)
        .filter(|w| w[1].starts_with(':'))
        .map(|w| w[0].to_owned())
        .collect()
}

#[tokio::test]
async fn no_write_without_its_event_and_no_word_of_the_inside() {
    let database = Database::new().await;
    let app = database.app();
    app.create("/person", PERSON).await;
    let (income, _) = app.create("/person/11111/income", r#"{"type": "t", "value": 1}"#).await;
    let before = database.rows().await;
    let mut shown = String::new();
    let send = |method, path, body| raw_request(method, path, Some("application/json"), body);
    for (name, body) in [
        ("a trigger that swallows the event", "RETURN NULL;"),
        ("a trigger that fails, with the payload in its message", "RAISE EXCEPTION 'no: %', NEW.payload;"),
    ] {
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
            "CREATE OR REPLACE FUNCTION public.bad() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$;
             CREATE OR REPLACE TRIGGER bad BEFORE INSERT ON outbox.event FOR EACH ROW EXECUTE FUNCTION public.bad()"
        )))
        .execute(&database.admin)
        .await
        .unwrap();
        for (method, path, body) in [
            (Method::POST, "/person", r#"{"cpf": 22222, "name": "b", "date_of_birth": "2000-01-01"}"#),
            (Method::POST, "/person/11111/debt", r#"{"value": 1}"#),
            (Method::PATCH, "/person/11111", r#"{"name": "b"}"#),
            (Method::PUT, &income, r#"{"type": "t", "value": 2}"#),
            (Method::DELETE, &income, ""),
            (Method::DELETE, "/person/11111", ""),
        ] {
            shown += &crate::support::exchange(&app, name, send(method, path, body)).await;
            assert_eq!(database.rows().await, before, "{name}: something was written");
        }
    }
    insta::assert_snapshot!(Redactions::default().apply(&shown));
}
