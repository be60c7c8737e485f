//! An event and an aggregate, found on their way.

use reqwest::StatusCode;

use crate::desk::{Console, LOOKER, Shop};

const TABLES: &str = "[outbox.shop]\n[inbox.mail]\n[inbox.stock]\n";

async fn console(shop: &Shop) -> Console {
    let variables = [
        ("OUTBOX_SHOP_DATABASE_URL", &*shop.reader_url),
        ("INBOX_MAIL_DATABASE_URL", &*shop.admin_url),
        ("INBOX_STOCK_DATABASE_URL", &*shop.admin_url),
    ];
    Console::start(TABLES, &variables).await
}

/// Four versions of one order: applied, parked, held behind it, not read yet.
async fn shop() -> Shop {
    let shop = Shop::new("console_way").await;
    shop.with_inbox().await;
    shop.run(
        "SELECT outbox.publish(type, 'order', '<b>7</b>', '{\"n\": \"<script>\"}')
         FROM unnest(ARRAY['order.new', 'order.paid', 'order.sent', 'order.left']) AS t (type);
         INSERT INTO outbox.relay (name, low_water, high, open) VALUES ('default', 3, 3, '{}');
         INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, payload,
                                    headers, created_at, reason, detail)
         SELECT 'default', position, id, aggregate_type, aggregate_id, version, type, payload, headers, created_at,
                'unroutable', 'no queue took it' FROM outbox.event WHERE version = 2;
         INSERT INTO inbox.aggregate (consumer, source, aggregate_type, aggregate_id, version, last_event_id)
         SELECT 'mail', 'shop', 'order', '<b>7</b>', 1, id FROM outbox.event WHERE version = 1;
         INSERT INTO inbox.held (consumer, source, aggregate_type, aggregate_id, version, event_id, type, headers, payload, reason)
         SELECT 'mail', 'shop', 'order', '<b>7</b>', version, id, type, '{}', 'hush', 'gap' FROM outbox.event WHERE version = 3",
    )
    .await;
    shop
}

#[tokio::test]
async fn an_aggregate_and_an_event_have_their_way_on_one_line_of_time() {
    let shop = shop().await;
    let console = console(&shop).await;
    assert_read!(console.read("/find?q=order/%3Cb%3E7%3C/b%3E").await, @r"
# Aggregate order/<b>7</b>
- TIME inbox mail: is at version 1 of order/<b>7</b> from shop
- inbox stock: has received nothing of this aggregate; perhaps it does not subscribe to it
## Version 1: order.new
UUID
- TIME outbox shop: made at position 1
- outbox shop, relay default: confirmed by the broker
- TIME inbox mail: applied; it is the last one that was
## Version 2: order.paid
UUID
- TIME outbox shop: made at position 2
- TIME outbox shop, relay default: ⚠ set aside: no queue took it; tried again only by hand: outbox-relay parked retry --id UUID (last tried at TIME)
- inbox mail: ⚠ not received yet
## Version 3: order.sent
UUID
- TIME outbox shop: made at position 3
- outbox shop, relay default: confirmed by the broker
- TIME inbox mail: ⚠ held: an earlier version has not arrived
## Version 4: order.left
UUID
- TIME outbox shop: made at position 4
- outbox shop, relay default: ⚠ not read yet; no relay of this name leads now
- inbox mail: ⚠ not received yet
");
    let id: uuid::Uuid = sqlx::query_scalar("SELECT id FROM outbox.event WHERE version = 3")
        .fetch_one(&shop.admin)
        .await
        .unwrap();
    let page = console.read(&format!("/find?q={id}")).await;
    assert!(!page.contains("hush"), "{page}");
    assert_read!(page, @r"
# Event UUID
- TIME inbox mail: is at version 1 of order/<b>7</b> from shop
- inbox stock: has received nothing of this aggregate; perhaps it does not subscribe to it
## Version 3: order.sent
Of order/<b>7</b>
- TIME outbox shop: made at position 3
- outbox shop, relay default: confirmed by the broker
- TIME inbox mail: ⚠ held: an earlier version has not arrived
");
    let (_, html) = console.get("/find?q=order/%3Cb%3E7%3C/b%3E", LOOKER).await;
    assert!(!html.contains("<b>7") && !html.contains("<script>"), "{html}");
}

#[tokio::test]
async fn what_is_not_there_is_not_found_and_what_cannot_be_asked_is_named() {
    let shop = shop().await;
    let console = console(&shop).await;
    assert_read!(console.read("/find?q=0198c0de-0000-7000-8000-000000000001").await, @r"
# Event UUID
This event is stored in no outbox, and held in no inbox, of this console.
It belongs to another database, its transaction did not commit, or its partition was retired.
Search all stored events, also where the id's time is not that of the event.
");
    assert_read!(console.read("/find?q=nothing").await, @r"
# Find
This is nothing to find: it should be an event's id (a UUID), or an aggregate: TYPE/ID.
");
    let variables = [
        ("OUTBOX_SHOP_DATABASE_URL", "postgres://a:b@127.0.0.1:1/c"),
        ("INBOX_MAIL_DATABASE_URL", &*shop.admin_url),
        ("INBOX_STOCK_DATABASE_URL", &*shop.admin_url),
    ];
    let console = Console::start(TABLES, &variables).await;
    let id: uuid::Uuid = sqlx::query_scalar("SELECT id FROM outbox.event WHERE version = 3")
        .fetch_one(&shop.admin)
        .await
        .unwrap();
    let (status, html) = console.get(&format!("/find?q={id}"), LOOKER).await;
    assert_eq!(status, StatusCode::OK);
    assert_read!(crate::desk::text(&html), @r"
# Event UUID
The outbox shop could not be asked: the database does not answer: no connection in time.
- TIME inbox mail: is at version 1 of order/<b>7</b> from shop
- inbox stock: has received nothing of this aggregate; perhaps it does not subscribe to it
## Version 3: order.sent
Of order/<b>7</b>
- TIME inbox mail: ⚠ held: an earlier version has not arrived
");
}
