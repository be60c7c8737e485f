//! What the pages say of an outbox that is well, and of each way in which it is not.

use std::time::Duration;

use sqlx::Connection;

use crate::desk::{Console, LOOKER, Shop};

async fn console(shop: &Shop) -> Console {
    Console::start("[outbox.shop]\n", &[("OUTBOX_SHOP_DATABASE_URL", &shop.reader_url)]).await
}

#[tokio::test]
async fn an_outbox_that_is_well() {
    let shop = Shop::new("console_well").await;
    let _leader = shop.lead().await;
    shop.append("thing.new", 3).await;
    shop.settle().await;
    let console = console(&shop).await;
    assert_read!(console.reads("/", "Well").await, @r"
# Everything is well
## Outbox shop: ✔ Well
Everything flows. Nothing waits.
- Backlog: Nothing waits.
");
    assert_read!(console.reads("/outbox/shop", "published/s").await, @r"
# Outbox shop
## ✔ Well
Everything flows. Nothing waits.
## Relay default
- Leader: led by host:7 since TIME, heartbeat SPAN ago
- Backlog: Nothing waits.
- Rate: N published/s, N appended/s, over SPAN
- Position: settled up to 3, read up to 3, handed out up to 3
- Set aside: 0 unroutable, 0 refused
## Database
- Address: ADDRESS (sslmode Prefer)
- Source: shop
- Partitions: 999997 positions ahead of the last one
- Outbox lock: held by nobody
- Long transactions: none
Every check of this outbox
## The last hour
- Events that are not settled: N now, at most N
- Age of the oldest: SPAN now, at most SPAN
- Published a second: N now, at most N
- Set aside or waiting: N now, at most N
");
}

#[tokio::test]
async fn the_verdict_names_what_is_wrong_whose_it_is_and_what_to_do() {
    let shop = Shop::new("console_verdict").await;
    let console = console(&shop).await;
    let verdict = async |awaited: &str| {
        let page = console.reads("/outbox/shop", awaited).await;
        let (_, verdict) = page.split_once("## ").unwrap();
        verdict.split("\n## ").next().unwrap().to_owned()
    };
    assert_read!(verdict("No relay has led").await, @r"
✖ Broken
No relay has led this outbox yet.
- Whose: The relay
- What to do: Start one: outbox-relay run.
");
    let leader = shop.lead().await;
    shop.append("thing.new", 3).await;
    shop.run("UPDATE outbox.relay SET paused_at = now(), paused_by = 'ann (the queue is moved)'").await;
    assert_read!(verdict("is paused").await, @r"
✖ Broken
The relay default is paused since TIME by ann (the queue is moved). 3 events wait, the oldest for SPAN.
- Whose: The operator who paused it
- What to do: Resume it below, once the reason is gone.
");
    shop.run("UPDATE outbox.relay SET paused_at = NULL, paused_by = NULL").await;
    shop.run("UPDATE outbox.relay SET waiting = '[{\"part\": \"broker\", \"reason\": \"connection refused\", \"seconds\": 30}]'").await;
    assert_read!(verdict("connection refused").await, @r"
✖ Broken
The relay default waits for broker: connection refused, for SPAN. 3 events wait, the oldest for SPAN.
- Whose: The broker
- What to do: Mend what the reason names. The relay goes on by itself then.
");
    shop.run("UPDATE outbox.relay SET waiting = '[]'").await;
    shop.settle().await;
    shop.run(
        "INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, payload,
                                    headers, created_at, reason, detail)
         SELECT 'default', position, id, aggregate_type, aggregate_id, version, type, payload, headers, created_at,
                'unroutable', 'no queue took it' FROM outbox.event",
    )
    .await;
    assert_read!(verdict("events aside").await, @r"
⚠ Needs attention
The relay default set 3 events aside: 3 unroutable, 0 refused.
- Whose: The subscriber
- What to do: Bind a queue that takes the type, or start the subscriber that declares it. The relay then publishes them by itself; later events of subscribers that follow versions wait for them.
");
    shop.run("DELETE FROM outbox.parked").await;
    leader.close().await.unwrap();
    assert_read!(verdict("No relay leads").await, @r"
✖ Broken
No relay leads under the name default. The last was host:7, SPAN ago. Nothing waits.
- Whose: The relay
- What to do: Start it: outbox-relay run --name default. If it runs, its /ready says what it waits for.
");
}

#[tokio::test]
async fn a_database_that_is_away_says_so_and_disturbs_no_other() {
    let shop = Shop::new("console_away").await;
    let _leader = shop.lead().await;
    // A server that takes connections and says nothing.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent_url = format!("postgres://a:b@{}/c", silent.local_addr().unwrap());
    let console = Console::start(
        "[outbox.shop]\n[outbox.gone]\n[outbox.silent]\n",
        &[
            ("OUTBOX_SHOP_DATABASE_URL", &shop.reader_url),
            ("OUTBOX_GONE_DATABASE_URL", "postgres://a:b@127.0.0.1:1/c"),
            ("OUTBOX_SILENT_DATABASE_URL", &silent_url),
        ],
    )
    .await;
    let page = console.reads("/", "did not respond within").await;
    assert_read!(page, @r"
# 2 of 3 are not well
## Outbox gone: ✖ Broken
The console cannot look at this database since TIME: the database does not answer: Connection refused (os error 111). Address: ADDRESS (sslmode Prefer).
The database. Start the database, or mend the way to it or the console's role. Until then, what follows is the last look.
## Outbox silent: ✖ Broken
The console cannot look at this database since TIME: it did not respond within SPAN. Address: ADDRESS (sslmode Prefer).
The database. Start the database, or mend the way to it or the console's role. Until then, what follows is the last look.
## Outbox shop: ✔ Well
Everything flows. Nothing waits.
- Backlog: Nothing waits. N published/s, N appended/s, over SPAN.
");
    // A page of the one that is well does not wait for the others.
    let well =
        tokio::time::timeout(Duration::from_secs(20), console.get("/outbox/shop", LOOKER)).await.unwrap();
    assert!(well.1.contains("Everything flows"), "{}", well.1);
}

#[tokio::test]
async fn ten_open_pages_cost_as_much_as_one() {
    let shop = Shop::new("console_ten").await;
    let _leader = shop.lead().await;
    let console = console(&shop).await;
    console.reads("/outbox/shop", "Well").await;
    let pages = (0..10).map(|_| console.get("/outbox/shop", LOOKER));
    let pages = futures_util::future::join_all(pages).await;
    assert!(pages.iter().all(|(status, _)| status.is_success()));
    let connections: i64 =
        sqlx::query_scalar("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'outbox-console'")
            .fetch_one(&shop.admin)
            .await
            .unwrap();
    assert!((1..=2).contains(&connections), "{connections}");
}

#[tokio::test]
async fn texts_of_others_are_texts() {
    let shop = Shop::new("console_hostile").await;
    let _leader = shop.lead().await;
    shop.run("UPDATE outbox.relay SET paused_at = now(), paused_by = '<script>alert(1)</script>\u{202e}\"''><img src=x onerror=alert(2)>'").await;
    let console = console(&shop).await;
    console.reads("/outbox/shop", "is paused").await;
    for path in
        ["/outbox/shop", "/", "/find?q=%3Cscript%3Ealert(1)%3C/script%3E", "/login?to=%22%3E%3Cscript%3E"]
    {
        let (_, html) = console.get(path, LOOKER).await;
        assert!(
            !html.contains("<script>") && !html.contains("<img") && !html.contains('\u{202e}'),
            "{path}: {html}"
        );
    }
}
