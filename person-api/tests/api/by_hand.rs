//! Persons that were changed in the database and not by this service: each write of them is refused in words, and the
//! operator's way out works.

use poem::http::Method;

use crate::{
    republish::said,
    support::{Database, Redactions, exchange, post, raw_request},
};

const INCOME: &str = r#"{"type": "renting", "value": 1000}"#;

async fn run(database: &Database, sql: &str) {
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_owned())).execute(&database.admin).await.unwrap();
}

/// The ways in which the row of a person does not continue its events: it never had any; it skipped versions; it was put
/// back to a version that is taken. With what the operator runs for each, as docs/operating/repair.md has it.
const PERSONS: [(&str, &str, &str); 3] = [
    (
        "00000000-0000-7000-8000-000000000001",
        "",
        "SELECT outbox.number_by('person', 'writer', 'SELECT id, version FROM person.person WHERE id = ''ID''')",
    ),
    (
        "00000000-0000-7000-8000-000000000002",
        "UPDATE person.person SET version = 7 WHERE id = 'ID'",
        "UPDATE person.person SET version = a.version FROM outbox.aggregate a
         WHERE a.aggregate_type = 'person' AND a.aggregate_id = person.id::text AND person.id = 'ID'",
    ),
    (
        "00000000-0000-7000-8000-000000000003",
        "UPDATE person.person SET version = 1 WHERE id = 'ID'",
        "UPDATE person.person SET version = a.version FROM outbox.aggregate a
         WHERE a.aggregate_type = 'person' AND a.aggregate_id = person.id::text AND person.id = 'ID'",
    ),
];

#[tokio::test]
async fn a_person_that_was_changed_by_hand_is_refused_until_it_is_mended() {
    let database = Database::new().await;
    let app = database.app();
    for (n, (id, changed, _)) in PERSONS.iter().enumerate() {
        let sql = "INSERT INTO person.person (id, cpf, name, date_of_birth) VALUES ('ID', CPF, 'n', now());
                   INSERT INTO person.income (id, person_id, type, value) VALUES ('ID', 'ID', 't', 1)";
        run(&database, &sql.replace("ID", id).replace("CPF", &(n + 1).to_string())).await;
        if n > 0 {
            let events = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                          VALUES ('person', 'ID', 1, 'person.new', '{}');
                          INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                          VALUES ('person', 'ID', 2, 'income.new', '{}')";
            run(&database, &events.replace("ID", id)).await;
        }
        run(&database, &changed.replace("ID", id)).await;
    }
    let before = database.rows().await;
    let json = Some("application/json");
    let mut shown = String::new();
    for (n, (id, ..)) in PERSONS.iter().enumerate() {
        let person = format!("/person/{}", n + 1);
        let item = format!("{person}/income/{id}");
        for (name, request) in [
            ("a new item", post(&format!("{person}/income"), INCOME)),
            (
                "a change",
                raw_request(Method::PATCH, &person, Some("application/merge-patch+json"), r#"{"name": "m"}"#),
            ),
            ("a change of an item", raw_request(Method::PUT, &item, json, INCOME)),
            ("a deletion of an item", raw_request(Method::DELETE, &item, None, "")),
            ("a deletion", raw_request(Method::DELETE, &person, None, "")),
        ] {
            let response = exchange(&app, name, request).await;
            // One in full; the others are alike.
            if shown.is_empty() {
                shown = response;
            } else {
                let body = |text: &str| text[text.find("409 ").unwrap()..].to_owned();
                assert_eq!(body(&response), body(&shown), "{name} of {person}");
            }
        }
    }
    assert_eq!(database.rows().await, before, "something was written");
    insta::assert_snapshot!(Redactions::default().apply(&shown));

    let mut shown = String::new();
    for (n, (id, _, mend)) in PERSONS.iter().enumerate() {
        shown += &said(&database, &format!("--person {id}"), "").await;
        run(&database, &mend.replace("ID", id)).await;
        shown += &said(&database, &format!("--person {id}"), "").await;
        app.create(&format!("/person/{}/income", n + 1), INCOME).await;
    }
    insta::assert_snapshot!(shown);
    let ends: Vec<String> = sqlx::query_scalar(
        "SELECT string_agg(concat_ws(' ', version, type, headers), ', ' ORDER BY position) FROM outbox.event
         WHERE version > 1 AND type <> 'person.new' GROUP BY aggregate_id ORDER BY aggregate_id",
    )
    .fetch_all(&database.admin)
    .await
    .unwrap();
    insta::assert_snapshot!(ends.join("\n"));
}

/// The outbox counts the versions, as an operator has said by mistake: nothing can be stored, and that is no defect.
#[tokio::test]
async fn an_outbox_that_is_set_up_otherwise_is_unavailable() {
    let database = Database::new().await;
    let api = database.api(std::time::Duration::from_secs(30), outbox::Waker::new());
    let app = crate::support::App::new(&api);
    let mut said = Vec::new();
    for (set_up, mend) in [
        ("SELECT outbox.number_by('person', 'outbox')", "SELECT outbox.number_by('person', 'writer')"),
        (
            "SELECT setval('outbox.position', max_value) FROM pg_sequences
             WHERE schemaname = 'outbox' AND sequencename = 'position'",
            "SELECT setval('outbox.position', 1)",
        ),
    ] {
        run(&database, set_up).await;
        let body = r#"{"cpf": 1, "name": "n", "date_of_birth": "2000-01-01"}"#;
        said.push(exchange(&app, "a person", post("/person", body)).await);
        run(&database, mend).await;
    }
    assert_eq!(said[0], said[1]);
    insta::assert_snapshot!(Redactions::default().apply(&said[0]));
    app.create("/person", r#"{"cpf": 1, "name": "n", "date_of_birth": "2000-01-01"}"#).await;
}
