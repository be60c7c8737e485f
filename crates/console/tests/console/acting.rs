//! What operators do: with a reason, in the audit, and only where their role allows it.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use devstack::testing::eventually;
use inbox::{Config, Consumer, Event, Handler, HandlerError, Sequencer, Topology};
use reqwest::{StatusCode, header};
use sqlx::{PgPool, Postgres, Transaction};
use tokio_util::sync::CancellationToken;

use crate::desk::{ACTOR, Console, LOOKER, READER, Shop, text};

async fn console(shop: &Shop) -> Console {
    shop.let_operate().await;
    Console::start("[outbox.shop]\n", &[("OUTBOX_SHOP_DATABASE_URL", &shop.reader_url)]).await
}

/// The audit: operator, action, target, why and detail, the oldest first.
async fn audit(shop: &Shop) -> String {
    let rows: Vec<String> = sqlx::query_scalar(
        "SELECT concat_ws(' | ', operator, action, target, why, detail) FROM outbox.audit ORDER BY id",
    )
    .fetch_all(&shop.admin)
    .await
    .unwrap();
    rows.join("\n")
}

async fn paused(pool: &PgPool) -> Option<String> {
    sqlx::query_scalar("SELECT paused_by FROM outbox.relay WHERE name = 'default'")
        .fetch_one(pool)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_relay_is_paused_and_resumed_with_a_reason() {
    let shop = Shop::new("console_pause").await;
    let _leader = shop.lead().await;
    let console = console(&shop).await;
    console.reads("/outbox/shop", "Well").await;
    let pause = async |key: &str, form: &str| console.post("/outbox/shop/pause", key, form).await.0;
    assert_eq!(pause(LOOKER, "relay=default&why=x").await, StatusCode::FORBIDDEN);
    assert_eq!(pause("wrong-0123456789", "relay=default&why=x").await, StatusCode::UNAUTHORIZED);
    assert_eq!(pause(ACTOR, "relay=default&why=").await, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(pause(ACTOR, "relay=other&why=x").await, StatusCode::NOT_FOUND);
    assert_eq!(
        pause(ACTOR, &format!("relay=default&why={}", "x".repeat(1_001))).await,
        StatusCode::UNPROCESSABLE_ENTITY
    );
    assert_eq!((paused(&shop.admin).await, audit(&shop).await), (None, String::new()));

    // As a browser sends it: with the session's token, or not at all.
    let cookie = console.log_in(ACTOR).await;
    let page =
        console.http.get(console.url("/outbox/shop")).header(header::COOKIE, &cookie).send().await.unwrap();
    let page = page.text().await.unwrap();
    let token = page.split_once("name=\"token\" value=\"").unwrap().1.split('"').next().unwrap();
    let as_browser = async |form: String| {
        let request =
            console.http.post(console.url("/outbox/shop/pause")).header(header::COOKIE, &cookie).body(form);
        request.send().await.unwrap().status()
    };
    assert_eq!(as_browser("relay=default&why=x".to_owned()).await, StatusCode::FORBIDDEN);
    assert_eq!(paused(&shop.admin).await, None);
    let moved = format!("relay=default&why=the+queue+is+moved&token={token}");
    assert_eq!(as_browser(moved).await, StatusCode::SEE_OTHER);
    assert_eq!(paused(&shop.admin).await.as_deref(), Some("actor (the queue is moved)"));
    let page = console.read("/outbox/shop").await;
    assert!(page.contains("is paused") && !page.contains("[Resume"), "{page}");
    assert!(text(&console.get("/outbox/shop", ACTOR).await.1).contains("[Resume default]"));
    let resumed = console.post("/outbox/shop/resume", ACTOR, "relay=default&why=it+is+moved").await;
    assert_eq!((resumed.0, paused(&shop.admin).await), (StatusCode::SEE_OTHER, None));
    insta::assert_snapshot!(audit(&shop).await, @r"
actor | pause | default | the queue is moved | {}
actor | resume | default | it is moved | {}
");
    assert_read!(console.read("/audit").await, @r"
# Audit
| When | Who | Where | What | Why
| TIME | actor | outbox shop | resume default | it is moved
| TIME | actor | outbox shop | pause default | the queue is moved
");
}

async fn park(shop: &Shop, count: i64) {
    shop.append("thing.new", count).await;
    shop.append("other.new", 2).await;
    shop.settle().await;
    shop.run(
        "INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, payload,
                                    headers, created_at, reason, detail, next_attempt_at)
         SELECT 'default', position, id, aggregate_type, aggregate_id, version, type, payload, headers, created_at,
                CASE type WHEN 'thing.new' THEN 'unroutable' ELSE 'refused' END, 'said', '2100-01-01'
         FROM outbox.event",
    )
    .await;
}

async fn left(shop: &Shop) -> (i64, i64) {
    sqlx::query_as("SELECT count(*), count(*) FILTER (WHERE next_attempt_at < now()) FROM outbox.parked")
        .fetch_one(&shop.admin)
        .await
        .unwrap()
}

#[tokio::test]
async fn ten_thousand_parked_events_are_looked_at_tried_again_and_dropped() {
    let shop = Shop::new("console_parked").await;
    let _leader = shop.lead().await;
    park(&shop, 10_000).await;
    let console = console(&shop).await;
    console.reads("/outbox/shop", "10002 events aside").await;
    let page = console.read("/outbox/shop/parked").await;
    let (causes, events) = page.split_once("## Events").unwrap();
    assert_read!(causes, @r"
# Set aside in shop
Outbox shop, relay default
## By cause
| Why | Type | Events | Oldest since | Tries | Next try
| refused: said | other.new | 2 | TIME | 1 | TIME
| unroutable: said | thing.new | 10000 | TIME | 1 | TIME
");
    assert_eq!(events.matches("unroutable: said").count(), 100);
    assert!(events.contains("The next ones") && !page.contains("Try again"), "{events}");
    let (_, html) = console.get("/outbox/shop/parked?reason=refused&type=other.new", LOOKER).await;
    assert_eq!(html.matches("refused: said").count(), 2 + 1);

    // The first step says what it would be, and changes nothing.
    let form = "relay=default&do=retry&type=thing.*&why=the+queue+is+there";
    assert_eq!(console.post("/outbox/shop/parked", LOOKER, form).await.0, StatusCode::FORBIDDEN);
    let (status, html) = console.post("/outbox/shop/parked", ACTOR, form).await;
    assert_eq!(status, StatusCode::OK);
    assert_read!(text(&html), @r"
# Set aside in shop
10000 events would be tried again.
- 10000 of type thing.new
The oldest: UUID UUID UUID UUID UUID
[Do it]
Back
");
    assert_eq!((left(&shop).await, audit(&shop).await), ((10_002, 0), String::new()));
    // The second step does it.
    let (status, _) = console.post("/outbox/shop/parked", ACTOR, &format!("{form}&count=10000")).await;
    assert_eq!(status, StatusCode::SEE_OTHER);
    eventually("all are due", async || match left(&shop).await {
        (10_002, 10_000) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;

    // Another operator gave up one meanwhile: what was confirmed is not what would be done.
    eventually("the action ends", async || match audit(&shop).await {
        audit if audit.contains("retry ended") => Ok(()),
        audit => Err(audit),
    })
    .await;
    shop.run("DELETE FROM outbox.parked WHERE position = (SELECT min(position) FROM outbox.parked)").await;
    let drop = "relay=default&do=drop&reason=unroutable&why=a+test&count=10000";
    let (status, html) = console.post("/outbox/shop/parked", ACTOR, drop).await;
    assert_eq!((status, left(&shop).await.0), (StatusCode::OK, 10_001));
    assert!(html.contains("another number of events than you confirmed: 10000"), "{html}");
    let drop = drop.replace("10000", "9999");
    assert_eq!(console.post("/outbox/shop/parked", ACTOR, &drop).await.0, StatusCode::SEE_OTHER);
    eventually("they are dropped", async || match (left(&shop).await.0, audit(&shop).await) {
        (2, audit) if audit.contains("drop ended") => Ok(()),
        (left, _) => Err(left.to_string()),
    })
    .await;
    insta::assert_snapshot!(audit(&shop).await, @r#"
    actor | retry | default | the queue is there | {"ids": [], "rate": null, "type": "thing.*", "events": 10000, "reason": null}
    actor | retry ended | default | the queue is there | {"done": 10000, "events": 10000, "outcome": "done"}
    actor | drop | default | a test | {"ids": [], "rate": null, "type": null, "events": 9999, "reason": "unroutable"}
    actor | drop ended | default | a test | {"done": 9999, "events": 9999, "outcome": "done"}
    "#);
    // What was dropped can still be told.
    let id: uuid::Uuid = sqlx::query_scalar("SELECT id FROM outbox.event WHERE position = 50")
        .fetch_one(&shop.admin)
        .await
        .unwrap();
    assert!(console.read(&format!("/find?q={id}")).await.contains("given up by hand"));
}

#[tokio::test]
async fn two_operators_do_not_work_on_one_outbox_at_once_and_an_action_can_be_stopped() {
    let shop = Shop::new("console_two").await;
    let _leader = shop.lead().await;
    park(&shop, 1_000).await;
    let console = console(&shop).await;
    console.reads("/outbox/shop", "1002 events aside").await;
    let drop = "relay=default&do=drop&reason=unroutable&why=a+test&rate=2&count=1000";
    let request = console.http.post(console.url("/outbox/shop/parked")).bearer_auth(ACTOR).body(drop);
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), StatusCode::SEE_OTHER);
    let job = response.headers()[header::LOCATION].to_str().unwrap().to_owned();
    console.reads(&job, "events so far").await;
    let second = "relay=default&do=retry&reason=refused&why=another&count=2";
    let (status, html) = console.post("/outbox/shop/parked", READER, second).await;
    assert_eq!(status, StatusCode::CONFLICT);
    assert!(html.contains("actor has begun to drop events"), "{html}");
    assert_eq!(console.post(&format!("{job}/stop"), LOOKER, "").await.0, StatusCode::FORBIDDEN);
    assert_eq!(console.post(&format!("{job}/stop"), READER, "").await.0, StatusCode::SEE_OTHER);
    let page = console.reads(&job, "It is stopped").await;
    assert!(page.contains("of 1000 events"), "{page}");
    assert!(left(&shop).await.0 > 2);
    assert_eq!(console.post("/outbox/shop/parked", READER, second).await.0, StatusCode::SEE_OTHER);
}

#[tokio::test]
async fn a_body_is_shown_to_its_role_alone_and_noted() {
    let shop = Shop::new("console_body").await;
    let _leader = shop.lead().await;
    shop.run("SELECT outbox.publish('thing.new', 'thing', '1', '{\"name\": \"<script>alert(1)</script>\"}')")
        .await;
    shop.settle().await;
    let console = console(&shop).await;
    console.reads("/outbox/shop", "Well").await;
    let form = "position=1&why=the+subscriber+asks";
    for key in [LOOKER, ACTOR] {
        assert_eq!(console.post("/outbox/shop/body", key, form).await.0, StatusCode::FORBIDDEN);
        let id: uuid::Uuid =
            sqlx::query_scalar("SELECT id FROM outbox.event").fetch_one(&shop.admin).await.unwrap();
        let (_, html) = console.get(&format!("/find?q={id}"), key).await;
        assert!(!html.contains("alert(1)") && !html.contains("Show the body"), "{html}");
    }
    assert_eq!(
        console.post("/outbox/shop/body", READER, "position=1&why=").await.0,
        StatusCode::UNPROCESSABLE_ENTITY
    );
    assert_eq!(audit(&shop).await, "");
    let (status, html) = console.post("/outbox/shop/body", READER, form).await;
    assert_eq!(status, StatusCode::OK);
    assert!(html.contains("&lt;script&gt;alert(1)") && !html.contains("<script>"), "{html}");
    assert_read!(audit(&shop).await, @r#"reader | show body | event UUID | the subscriber asks | {"position": 1}"#);
}

/// Refuses everything until the stock is open.
#[derive(Clone, Default)]
struct Stock(Arc<AtomicBool>);

impl Handler for Stock {
    async fn handle(&self, _: &Event, _: &mut Transaction<'_, Postgres>) -> Result<(), HandlerError> {
        if self.0.load(Ordering::Relaxed) { Ok(()) } else { Err(HandlerError::poison("the stock is closed")) }
    }
}

#[tokio::test]
async fn held_events_are_applied_again_by_the_subscriber_itself() {
    let shop = Shop::new("console_redrive").await;
    shop.with_inbox().await;
    shop.let_operate().await;
    shop.run(
        "INSERT INTO inbox.aggregate (consumer, source, aggregate_type, aggregate_id)
         SELECT 'stock', 'shop', 'order', 'o' || n FROM generate_series(1, 3) n;
         INSERT INTO inbox.held (consumer, source, aggregate_type, aggregate_id, version, event_id, type, headers, payload,
                                 reason, error, attempts)
         SELECT 'stock', 'shop', 'order', 'o' || n, version, gen_random_uuid(), 'order.new', '{}', '{}',
                CASE version WHEN 1 THEN 'poison' ELSE 'behind' END,
                CASE version WHEN 1 THEN 'the stock is closed' END, version % 2
         FROM generate_series(1, 3) n, generate_series(1, 2) version",
    )
    .await;
    let console = Console::start("[inbox.stock]\n", &[("INBOX_STOCK_DATABASE_URL", &shop.reader_url)]).await;
    assert_read!(console.reads("/inbox/stock", "refuses").await, @r"
# Inbox stock
## ⚠ Needs attention
The handler refuses events: 6 events of 3 aggregates wait since TIME, with the error: the stock is closed.
- Whose: The subscriber
- What to do: Mend the handler or what it needs, then apply them again.
## What it follows
- Consumer: stock
- Database: ADDRESS (sslmode Prefer)
## Held: 6
| Why | Events | Aggregates | Tries | Since | Oldest
| poison: the stock is closed | 6 | 3 | 1 | TIME | order/o1, version 1
## Rejected: 0
");
    let ask = async |key: &str, form: &str| console.post("/inbox/stock/redrive", key, form).await.0;
    assert_eq!(ask(LOOKER, "dry=yes&why=x").await, StatusCode::FORBIDDEN);
    assert_eq!(ask(ACTOR, "dry=yes&why=").await, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(ask(ACTOR, "why=x").await, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(ask(ACTOR, "dry=yes&why=is+it+open&reason=poison").await, StatusCode::SEE_OTHER);
    console.reads("/inbox/stock", "no process of the subscriber has begun").await;

    // The subscriber, whose broker is away: it looks after what it holds all the same.
    let (stock, ending) = (Stock::default(), CancellationToken::new());
    let topology =
        Topology::new("event_dispatcher", "event_dispatcher.by_aggregate", "stock", &["order"]).unwrap();
    let config = Config::new(topology, "amqp://127.0.0.1:1".parse().unwrap(), "stock");
    let consumer = Consumer::new(config, Sequencer::new("stock", shop.admin.clone(), stock.clone()));
    let running = tokio::spawn(consumer.run(ending.clone()));
    console.reads("/inbox/stock", "0 would be applied, 3 aggregates tried, 3 refused again").await;
    stock.0.store(true, Ordering::Relaxed);
    assert_eq!(ask(ACTOR, "dry=no&why=it+is+open&aggregate=order/o2").await, StatusCode::SEE_OTHER);
    console.reads("/inbox/stock", "2 applied, 1 aggregate tried").await;
    assert_eq!(ask(ACTOR, "dry=no&why=all+of+it").await, StatusCode::SEE_OTHER);
    console.reads("/inbox/stock", "4 applied, 2 aggregates tried").await;
    let page = console.reads("/inbox/stock", "Everything that arrived is applied").await;
    assert_read!(page, @r"
# Inbox stock
## ✔ Well
Everything that arrived is applied.
## What it follows
- Consumer: stock
- Database: ADDRESS (sslmode Prefer)
## Held: 0
## Asked for
| When | Who | What | Why | Outcome
| TIME | actor | redrive | all of it | done: 4 applied, 2 aggregates tried, 0 refused again, 0 events still held
| TIME | actor | redrive of order/o2 | it is open | done: 2 applied, 1 aggregate tried, 0 refused again, 0 events still held
| TIME | actor | dry run of a redrive, poison | is it open | done: 0 would be applied, 3 aggregates tried, 3 refused again, 6 events still held
- 3: the stock is closed
## Rejected: 0
");
    ending.cancel();
    running.await.unwrap();
}
