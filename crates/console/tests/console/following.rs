//! How far subscribers are behind, and what the broker says of their queues.

use devstack::testing::{Place, client};
use serde_json::json;

use crate::desk::{Console, Shop};

/// The inbox `mail` has applied the events of `thing` up to a position, in the order of positions.
async fn apply(shop: &Shop, up_to: i64) {
    sqlx::query(
        "INSERT INTO inbox.aggregate AS a (consumer, source, aggregate_type, aggregate_id, version, last_event_id)
         SELECT DISTINCT ON (aggregate_id) 'mail', 'shop', aggregate_type, aggregate_id, version, id FROM outbox.event
         WHERE aggregate_type = 'thing' AND position <= $1 ORDER BY aggregate_id, version DESC
         ON CONFLICT (consumer, source, aggregate_type, aggregate_id)
         DO UPDATE SET version = excluded.version, last_event_id = excluded.last_event_id",
    )
    .bind(up_to)
    .execute(&shop.admin)
    .await
    .unwrap();
}

#[tokio::test]
async fn a_subscriber_is_so_many_events_behind() {
    let shop = Shop::new("console_lag").await;
    shop.with_inbox().await;
    shop.let_operate().await;
    let _leader = shop.lead().await;
    // Each third event is of a type that the subscriber does not follow.
    shop.run(
        "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
         SELECT CASE n % 3 WHEN 0 THEN 'other' ELSE 'thing' END, (n % 300)::text, n / 300 + 1, 'thing.new', '{}'
         FROM generate_series(0, 2999) n;
         INSERT INTO inbox.source (consumer, name, incarnation) VALUES ('mail', 'shop', 1), ('idle', 'other', 1)",
    )
    .await;
    shop.settle().await;
    let variables = [
        ("OUTBOX_SHOP_DATABASE_URL", &*shop.reader_url),
        ("INBOX_MAIL_DATABASE_URL", &*shop.reader_url),
        ("INBOX_IDLE_DATABASE_URL", &*shop.reader_url),
    ];
    apply(&shop, 1_000).await;
    let console = Console::start("[outbox.shop]\n[inbox.mail]\n[inbox.idle]\n", &variables).await;
    let behind = async |up_to: i64| -> i64 {
        sqlx::query_scalar(
            "SELECT count(*) FROM outbox.event WHERE aggregate_type = 'thing' AND position > $1",
        )
        .bind(up_to)
        .fetch_one(&shop.admin)
        .await
        .unwrap()
    };
    for up_to in [1_000, 1_001, 1_002, 2_990, 2_998, 2_999] {
        apply(&shop, up_to).await;
        let awaited = match behind(up_to).await {
            1 => "Behind outbox shop: 1 event behind".to_owned(),
            events => format!("Behind outbox shop: {events} events behind"),
        };
        console.reads("/inbox/mail", &awaited).await;
    }
    apply(&shop, 3_000).await;
    console.reads("/inbox/mail", "Behind outbox shop: nothing is missing").await;
    let page = console.reads("/outbox/shop", "Inbox mail: nothing is missing").await;
    // The other inbox follows another source.
    assert!(!page.contains("Inbox idle"), "{page}");
}

#[tokio::test]
async fn a_queue_without_a_consumer_and_one_that_is_not_there_are_the_verdict() {
    let shop = Shop::new("console_queues").await;
    shop.with_inbox().await;
    shop.let_operate().await;
    let place = Place::around();
    let amqp = place.virtual_host("console_queues").await;
    let (_, vhost) = amqp.rsplit_once('/').unwrap();
    let queue = format!("{}/api/queues/{vhost}/mail", place.management);
    let declared = client().put(&queue).json(&json!({"durable": true})).send().await.unwrap();
    assert!(declared.status().is_success());
    let management = format!("{}/{vhost}", place.management);
    let variables = [("INBOX_MAIL_DATABASE_URL", &*shop.reader_url), ("MANAGEMENT_URL", &*management)];
    let tables = "[inbox.mail]\nqueues = ['mail', 'lost']\n";
    let console = Console::start(tables, &variables).await;
    let page = console.reads("/inbox/mail", "No consumer takes messages from the queue mail").await;
    assert!(page.contains("The queue lost does not exist at the broker."), "{page}");
    assert!(page.contains("Queue mail: 0 messages ready, 0 with consumers, 0 consumers"), "{page}");
    // A management API that is away disturbs nothing.
    let variables = [variables[0], ("MANAGEMENT_URL", "http://ann:hushhush@127.0.0.1:1")];
    let console = Console::start(tables, &variables).await;
    let page = console.reads("/inbox/mail", "cannot be asked").await;
    assert!(page.contains("Everything that arrived is applied") && !page.contains("hushhush"), "{page}");
}
