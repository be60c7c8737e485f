//! The whole life of a record: changed, paged, deleted; and every change with its event.

use poem::{Request, http::Method};

use crate::support::{App, Database, Redactions, exchange, plain, post, raw_request, with};

const PERSON: &str = r#"{"cpf": 11111, "name": "abc", "address": "abc", "date_of_birth": "2019-06-15"}"#;
const INCOME: &str = r#"{"type": "renting", "value": 1000}"#;
const DEBT: &str = r#"{"value": 1}"#;

fn patch(body: &str) -> Request {
    raw_request(Method::PATCH, "/person/11111", Some("application/merge-patch+json"), body)
}

fn put(path: &str, body: &str) -> Request {
    raw_request(Method::PUT, path, Some("application/json"), body)
}

#[tokio::test]
async fn a_person_from_the_first_to_the_last() {
    let database = Database::new().await;
    let app = database.app();
    app.create("/person", PERSON).await;
    let mut shown = String::new();
    for (name, request) in [
        ("another name, and no address", patch(r#"{"name": "Zé", "address": null}"#)),
        (
            "the same again",
            patch(r#"{"name": "Zé", "address": null, "date_of_birth": "2019-06-15T00:00:00Z"}"#),
        ),
        ("nothing", patch("{}")),
        ("an address and inactive", patch(r#"{"address": "Rua das Flores, 1", "status": "inactive"}"#)),
        ("no new items", post("/person/11111/income", INCOME)),
        (
            "active, with the other media type",
            raw_request(Method::PATCH, "/person/11111", Some("application/json"), r#"{"status": "active"}"#),
        ),
        ("new items", post("/person/11111/debt", DEBT)),
        ("as they are", plain(Method::GET, "/person/11111")),
    ] {
        shown += &exchange(&app, name, request).await;
        if name == "another name, and no address" {
            shown += &exchange(&app, "as it is now", plain(Method::GET, "/person/11111")).await;
        }
    }
    shown += &format!("## its events\n{}\n", database.events().await);
    for (name, request) in [
        ("the end", plain(Method::DELETE, "/person/11111")),
        ("gone", plain(Method::GET, "/person/11111")),
        ("gone already", plain(Method::DELETE, "/person/11111")),
        ("another life", post("/person", PERSON)),
    ] {
        shown += &exchange(&app, name, request).await;
    }
    shown += &format!("## their events\n{}", database.events().await);
    insta::assert_snapshot!(Redactions::default().apply(&shown));
}

#[tokio::test]
async fn an_item_from_the_first_to_the_last() {
    let database = Database::new().await;
    let app = database.app();
    app.create("/person", PERSON).await;
    let (income, _) = app.create("/person/11111/income", INCOME).await;
    let (debt, _) = app.create("/person/11111/debt", DEBT).await;
    let mut shown = String::new();
    for (name, request) in [
        ("where it is said to be", plain(Method::GET, &income)),
        ("changed", put(&income, r#"{"type": "wage", "value": 999999999999999.9999}"#)),
        ("the same in another notation", put(&income, r#"{"value": 999999999999999.99990, "type": "wage"}"#)),
        ("a debt", put(&debt, r#"{"value": 0.5}"#)),
        ("changed once more", put(&income, INCOME)),
        ("deleted", plain(Method::DELETE, &income)),
        ("gone", plain(Method::GET, &income)),
        ("put never creates", put(&income, INCOME)),
        ("gone already", plain(Method::DELETE, &income)),
        ("what is left", plain(Method::GET, "/person/11111")),
    ] {
        shown += &exchange(&app, name, request).await;
    }
    shown += &database.events().await;
    insta::assert_snapshot!(Redactions::default().apply(&shown));
}

#[tokio::test]
async fn items_page_by_page() {
    let database = Database::new().await;
    let app = database.app();
    app.create("/person", PERSON).await;
    let mut ids = Vec::new();
    for value in 1..=7 {
        let (place, _) = app.create("/person/11111/debt", &format!(r#"{{"value": {value}}}"#)).await;
        ids.push(place.rsplit('/').next().unwrap().to_owned());
    }
    let (mut next, mut seen, mut shown) =
        ("/person/11111/debt?limit=3".to_owned(), Vec::new(), String::new());
    let mut redactions = Redactions::default();
    loop {
        shown += &redactions.apply(&exchange(&app, "a page", plain(Method::GET, &next)).await);
        let page = app.call(plain(Method::GET, &next)).await.into_body().into_vec().await.unwrap();
        let page: serde_json::Value = serde_json::from_slice(&page).unwrap();
        seen.extend(
            page["items"].as_array().unwrap().iter().map(|item| item["id"].as_str().unwrap().to_owned()),
        );
        // One of those that were shown goes, and the next page is what it would have been.
        app.call(plain(Method::DELETE, &format!("/person/11111/debt/{}", seen[0]))).await;
        match page["next"].as_str() {
            Some(path) => next = path.to_owned(),
            None => break,
        }
    }
    assert_eq!(seen, ids);
    shown += &exchange(&app, "none of a kind", plain(Method::GET, "/person/11111/asset")).await;
    insta::assert_snapshot!(redactions.apply(&shown));
}

#[tokio::test]
async fn what_is_refused_changes_nothing() {
    let database = Database::new().await;
    let app = database.app();
    let (_, first) = app.create("/person", PERSON).await;
    let (income, now) = app.create("/person/11111/income", INCOME).await;
    app.create("/person", &PERSON.replace("11111", "22222")).await;
    let (others, other) = app.create("/person/22222/income", INCOME).await;
    let others = format!("/person/11111/income/{}", others.rsplit('/').next().unwrap());
    let before = database.rows().await;
    let nowhere = "/person/11111/income/0198c0de-0000-7000-8000-000000000001";
    let mut shown = String::new();
    for (name, request) in vec![
        ("nobody to change", raw_request(Method::PATCH, "/person/9", Some("application/json"), "{}")),
        ("nobody to delete", plain(Method::DELETE, "/person/9")),
        ("no such item", put(nowhere, INCOME)),
        ("no such item to delete", plain(Method::DELETE, nowhere)),
        ("an item of nobody", put(&nowhere.replace("11111", "9"), INCOME)),
        ("an item of nobody to read", plain(Method::GET, &nowhere.replace("11111", "9"))),
        ("somebody else's item", put(&others, INCOME)),
        ("somebody else's item to read", plain(Method::GET, &others)),
        ("somebody else's item to delete", plain(Method::DELETE, &others)),
        ("of another kind", plain(Method::DELETE, &income.replace("income", "asset"))),
        ("items of nobody", plain(Method::GET, "/person/9/income")),
        ("somebody was faster: patch", with(patch(r#"{"name": "b"}"#), "if-match", &first)),
        ("somebody was faster: delete", with(plain(Method::DELETE, "/person/11111"), "if-match", &first)),
        ("somebody was faster: put", with(put(&income, DEBT), "if-match", &first)),
        (
            "somebody was faster: put, well-formed",
            with(put(&income, r#"{"type": "t", "value": 2}"#), "if-match", &first),
        ),
        ("somebody was faster: delete an item", with(plain(Method::DELETE, &income), "if-match", &first)),
        ("another life", with(plain(Method::DELETE, "/person/11111"), "if-match", &other)),
        ("what is no state", with(plain(Method::DELETE, "/person/11111"), "if-match", "\"1\"")),
        (
            "in two lines, none of them right",
            with(with(plain(Method::DELETE, "/person/11111"), "if-match", &first), "if-match", &other),
        ),
        ("no tag", with(plain(Method::DELETE, "/person/11111"), "if-match", "first")),
        ("somebody was faster: add", with(post("/person/11111/income", INCOME), "if-match", &first)),
        ("another life: add", with(post("/person/11111/debt", DEBT), "if-match", &other)),
        ("another life: patch", with(patch(r#"{"name": "b"}"#), "if-match", &other)),
        ("another life: put", with(put(&income, r#"{"type": "t", "value": 2}"#), "if-match", &other)),
        ("another life: delete an item", with(plain(Method::DELETE, &income), "if-match", &other)),
        (
            "all wrong at once",
            with(
                with(put("/person/x/income/y", r#"{"value": "1", "w": 0}"#), "if-match", "\"\""),
                "if-match",
                "*",
            ),
        ),
        (
            "wrong fields",
            patch(r#"{"name": null, "address": " ", "date_of_birth": "now", "status": "dead", "cpf": 1}"#),
        ),
        ("fields twice", patch(r#"{"name": "a", "name": "a"}"#)),
        ("no object", patch("[]")),
        ("no media type", raw_request(Method::PATCH, "/person/11111", None, "{}")),
        ("wrong pages", plain(Method::GET, "/person/11111/income?limit=0&after=1&page=2")),
        ("a page too large", plain(Method::GET, "/person/11111/income?limit=1001")),
        ("a page twice", plain(Method::GET, "/person/11111/income?limit=1&limit=2")),
    ] {
        shown += &exchange(&app, name, request).await;
        assert_eq!(database.rows().await, before, "{name}: something was written");
    }
    insta::assert_snapshot!(Redactions::default().apply(&shown));
    for (tokens, path) in [([&*other, &now], income.as_str()), (["*", ""], "/person/11111")] {
        let request = with(plain(Method::DELETE, path), "if-match", tokens[0]);
        let request = if tokens[1].is_empty() { request } else { with(request, "if-match", tokens[1]) };
        assert_eq!(app.call(request).await.status().as_u16(), 200, "{tokens:?}");
    }
}

/// An item may be added to one state alone; sent again under its key it finds its own answer, although the state
/// is another one by then, its own.
#[tokio::test]
async fn an_item_is_added_to_the_state_that_is_meant() {
    let database = Database::new().await;
    let app = database.app();
    let (_, first) = app.create("/person", PERSON).await;
    let add = || with(with(post("/person/11111/debt", DEBT), "if-match", &first), "idempotency-key", "k");
    let mut answers = Vec::new();
    for request in [add(), add(), with(post("/person/11111/debt", DEBT), "if-match", &first)] {
        let answer = app.call(request).await;
        answers.push((answer.status().as_u16(), answer.into_body().into_string().await.unwrap()));
    }
    assert_eq!([answers[0].0, answers[1].0, answers[2].0], [201, 201, 412], "{answers:?}");
    assert_eq!(answers[0], answers[1]);
    // An inactive person takes no new items, whatever state was meant.
    app.call(patch(r#"{"status": "inactive"}"#)).await;
    assert_eq!(
        app.call(with(post("/person/11111/debt", DEBT), "if-match", &first)).await.status().as_u16(),
        409
    );
}

#[tokio::test]
async fn a_state_that_the_caller_has_is_not_sent_again() {
    let database = Database::new().await;
    let app = database.app();
    app.create("/person", PERSON).await;
    let (income, now) = app.create("/person/11111/income", INCOME).await;
    for path in ["/person/11111", "/person/11111/income", "/person/11111/debt", &income] {
        for (held, status) in [
            (&*now, 304),
            ("*", 304),
            (&format!("\"a\", {now}"), 304),
            (&format!("W/{now}"), 304),
            ("\"a\"", 200),
        ] {
            let answer = app.call(with(plain(Method::GET, path), "if-none-match", held)).await;
            assert_eq!(answer.status().as_u16(), status, "{path} {held}");
            assert_eq!(answer.headers()["etag"], &*now, "{path} {held}");
            assert_eq!(answer.headers()["cache-control"], "private, no-cache", "{path} {held}");
            let body = answer.into_body().into_vec().await.unwrap();
            assert_eq!(body.is_empty(), status == 304, "{path} {held}");
        }
    }
}

/// `unchanged` is said of what is stored under the lock, not of what was there when the statement began.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_compared_is_what_is_locked() {
    let database = Database::new().await;
    let app = std::sync::Arc::new(database.app());
    app.create("/person", PERSON).await;
    let (debt, _) = app.create("/person/11111/debt", DEBT).await;
    for (request, changed) in [
        (put(&debt, DEBT), "UPDATE person.debt SET value = 2"),
        (patch(r#"{"name": "abc"}"#), "UPDATE person.person SET name = 'other'"),
    ] {
        let mut holder = database.admin.begin().await.unwrap();
        sqlx::query("SELECT FROM person.person FOR UPDATE").execute(&mut *holder).await.unwrap();
        sqlx::query(changed).execute(&mut *holder).await.unwrap();
        let waiting = tokio::spawn({
            let app: std::sync::Arc<App> = std::sync::Arc::clone(&app);
            async move { app.call(request).await.into_body().into_string().await.unwrap() }
        });
        database.until_blocked(1).await;
        holder.commit().await.unwrap();
        let answer = waiting.await.unwrap();
        assert!(answer.contains("\"changed\""), "{changed}: {answer}");
    }
}

/// So is `If-Match`: what a change that came first leaves behind is another state.
#[tokio::test(flavor = "multi_thread")]
async fn the_state_that_is_meant_is_compared_under_the_lock() {
    let database = Database::new().await;
    let app = std::sync::Arc::new(database.app());
    app.create("/person", PERSON).await;
    let (debt, state) = app.create("/person/11111/debt", DEBT).await;
    let requests = [
        patch(r#"{"name": "b"}"#),
        put(&debt, r#"{"value": 3}"#),
        plain(Method::DELETE, &debt),
        plain(Method::DELETE, "/person/11111"),
    ];
    let mut holder = database.admin.begin().await.unwrap();
    sqlx::query("UPDATE person.person SET version = version + 1").execute(&mut *holder).await.unwrap();
    let mut waiting = tokio::task::JoinSet::new();
    for request in requests {
        let (app, request) = (std::sync::Arc::clone(&app), with(request, "if-match", &state));
        waiting.spawn(async move { app.call(request).await.status().as_u16() });
    }
    // Two of one person's writes wait at the database, the others before it.
    database.until_blocked(2).await;
    holder.commit().await.unwrap();
    assert_eq!(waiting.join_all().await, [412; 4]);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_that_change_one_state_one_wins() {
    let database = Database::new().await;
    let app = std::sync::Arc::new(database.app());
    let (_, state) = app.create("/person", PERSON).await;
    let mut writers = tokio::task::JoinSet::new();
    for n in 0..20 {
        let (app, state) = (std::sync::Arc::clone(&app), state.clone());
        writers.spawn(async move {
            let request = with(patch(&format!(r#"{{"name": "n{n}"}}"#)), "if-match", &state);
            app.call(request).await.status().as_u16()
        });
    }
    let mut answers = writers.join_all().await;
    answers.sort_unstable();
    assert_eq!(answers, [vec![200], vec![412; 19]].concat());
    assert_eq!(database.events().await.lines().count(), 2);
}
