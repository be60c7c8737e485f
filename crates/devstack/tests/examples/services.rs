//! All examples at once, on one broker, while everything happens to them that can.

use std::collections::BTreeSet;

use devstack::{
    testing::{Place, until, virtual_host},
    users::Rights,
};
use futures_util::future::join_all;

use crate::{
    events::{Event, Publisher, SOURCE, USER, event},
    programs::Running,
    proxy::Proxy,
    subscribers::{COPIES, MAILER, Subscriber},
    writers::{self, Writer},
};

struct World {
    writers: Vec<Writer>,
    relays: Vec<Running>,
    /// The relays' address of the broker.
    relay_amqp: String,
    proxy: Proxy,
    publisher: Publisher,
    subscribers: Vec<Subscriber>,
}

impl World {
    async fn new() -> Self {
        let amqp = virtual_host("examples").await;
        let relay_amqp = Place::around().broker_user(&amqp, "relay", Rights::Relay).await;
        let user = reqwest::Url::parse(&relay_amqp).unwrap().username().to_owned();
        let followed = writers::ALL.map(|(file, _)| format!("{}={user}", writers::source(file)));
        let followed = format!("{},{SOURCE}=nobody,{SOURCE}={USER}", followed.join(","));
        let proxy = Proxy::before(&amqp).await;
        let names = [COPIES.as_slice(), &[MAILER]].concat();
        let subscribers =
            join_all(names.iter().map(|&name| Subscriber::new(name, &amqp, &proxy, &followed))).await;
        let writers = join_all(writers::ALL.map(|(file, way)| Writer::new(file, way))).await;
        let relays = join_all(writers.iter().map(|writer| writer.relay(&relay_amqp))).await;
        let publisher = Publisher::new(&amqp).await;
        Self { writers, relays, relay_amqp, proxy, publisher, subscribers }
    }

    fn mailer(&self) -> &Subscriber {
        self.subscribers.last().unwrap()
    }

    fn copies(&self) -> &[Subscriber] {
        &self.subscribers[..COPIES.len()]
    }

    /// Which writer is in the way that needs no change of the service.
    fn shop(&self) -> (usize, &Writer) {
        self.writers.iter().enumerate().find(|(_, writer)| writer.source == "shop-py").unwrap()
    }

    async fn write(&self) {
        join_all(self.writers.iter().map(Writer::write)).await;
    }

    /// Waits until each copy equals the tables.
    async fn equals(&self) {
        for writer in &self.writers {
            let orders = writer.orders().await;
            assert!(!orders.is_empty(), "{writer:?}");
            for copy in self.copies() {
                copy.has(&writer.source, &orders).await;
            }
        }
    }

    /// Waits until there is a mail for each new order that is there still, one, and no other mail.
    async fn mails_are_right(&self, of_hand: &[String]) {
        let (mut must, mut may): (BTreeSet<String>, BTreeSet<String>) =
            (of_hand.iter().cloned().collect(), of_hand.iter().cloned().collect());
        for writer in &self.writers {
            let (there, all) = writer.news().await;
            must.extend(there);
            may.extend(all);
        }
        until("each order has its mail", async || {
            let mails: BTreeSet<String> = self.mailer().mails().await.into_iter().collect();
            must.is_subset(&mails)
        })
        .await;
        let mails: BTreeSet<String> = self.mailer().mails().await.into_iter().collect();
        let wrong: Vec<_> = mails.difference(&may).collect();
        assert!(wrong.is_empty(), "mails of events that send none: {wrong:?}");
    }

    async fn publish(&self, events: impl IntoIterator<Item = Event>) {
        for event in events {
            self.publisher.publish(event).await;
        }
    }

    /// What all of the copies have of the events that no example writes, once one of them has this.
    async fn of_hand(&self, status: &str) -> String {
        for copy in self.copies() {
            until(&format!("{} has come to {status}", copy.name), async || {
                copy.copy(SOURCE).await.iter().any(|(_, body)| body.contains(status))
            })
            .await;
        }
        let copies = join_all(self.copies().iter().map(|copy| copy.copy(SOURCE))).await;
        assert!(copies.iter().all(|copy| *copy == copies[0]), "{copies:#?}");
        copies[0].iter().map(|(_, body)| body.as_str()).collect::<Vec<_>>().join("\n")
    }

    async fn held(&self) -> String {
        let held = join_all(
            self.copies().iter().map(async |copy| format!("# {}\n{}", copy.name, copy.held().await)),
        );
        held.await.join("\n")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_copy_equals_its_tables() {
    let mut world = World::new().await;
    world.write().await;
    world.equals().await;
    world.mails_are_right(&[]).await;

    // The broker is away for a while.
    world.proxy.be_there(false);
    for subscriber in world.subscribers.iter().filter(|subscriber| subscriber.name != "rust") {
        subscriber.running().says("waiting: ", 2).await;
    }
    world.write().await;
    world.proxy.be_there(true);
    world.equals().await;

    // Each is killed in the middle of a transaction, and gets its message again.
    let held_up = join_all(world.subscribers.iter().map(Subscriber::hold_up)).await;
    world.write().await;
    join_all(world.subscribers.iter().map(Subscriber::is_held_up)).await;
    join_all(world.subscribers.iter_mut().map(Subscriber::kill)).await;
    drop(held_up);
    join_all(world.subscribers.iter_mut().map(Subscriber::start)).await;
    world.equals().await;

    // Each is stopped for an update.
    join_all(world.subscribers.iter_mut().map(Subscriber::stop)).await;
    world.write().await;
    join_all(world.subscribers.iter_mut().map(Subscriber::start)).await;
    world.equals().await;
    world.mails_are_right(&[]).await;

    // A copy that lacks an order gets it by a baseline.
    let (shop, writer) = world.shop();
    for copy in world.copies() {
        let lost = "DELETE FROM copy WHERE source = 'shop-py' AND id = (SELECT max(id) FROM copy WHERE source = 'shop-py')";
        sqlx::query(lost).execute(&copy.pool).await.unwrap();
    }
    writer.execute("SELECT outbox.publish_state('order', id::text) FROM orders").await;
    world.equals().await;

    // What was erased before the relay came to it: no mail, and nothing in a copy.
    world.relays.remove(shop).stop().await;
    let (_, writer) = world.shop();
    writer.execute("INSERT INTO orders (status) VALUES ('short')").await;
    writer.execute("DELETE FROM orders WHERE status = 'short'").await;
    let ended = "SELECT outbox.erase(ARRAY['order'], ARRAY[aggregate_id], ARRAY[version])
                 FROM outbox.event WHERE type = 'order.deleted' ORDER BY position DESC LIMIT 1";
    writer.execute(ended).await;
    let relay = writer.relay(&world.relay_amqp).await;
    world.relays.insert(shop, relay);

    // All of history again, to everybody.
    for writer in &world.writers {
        let again =
            writer.own(&["replay", "--all", "--to-everybody", "--yes"]).env("AMQP_URL", &world.relay_amqp);
        again.run().await;
    }
    world.equals().await;

    let mails = hand(&mut world).await;
    // The queue is first in, first out: what was replayed has come before the last of these.
    world.mails_are_right(&mails).await;
    let short = "SELECT id::text FROM outbox.event WHERE type = 'order.new' AND aggregate_id =
                 (SELECT aggregate_id FROM outbox.event WHERE type = 'order.deleted' ORDER BY position DESC LIMIT 1)";
    let short: String = sqlx::query_scalar(short).fetch_one(&world.shop().1.pool).await.unwrap();
    assert!(!world.mailer().mails().await.contains(&short), "a mail for an erased order");
    world.equals().await;
    join_all(world.subscribers.iter_mut().map(Subscriber::stop)).await;
}

/// What only a source can do that is repaired, restored or forged. Returns the ids of the messages that have mails.
async fn hand(world: &mut World) -> Vec<String> {
    let of_1 = || event("order.new", 1, 1);
    let news = [of_1(), event("order.new", 3, 1), event("order.new", 4, 1), event("order.new", 8, 1)];
    let mut mails: Vec<String> = news.iter().map(|event| event.id().to_string()).collect();
    world
        .publish([
            of_1(),
            // Twice, then one that is early, one of tomorrow, and the one that both wait for.
            of_1(),
            event("order.changed", 1, 4),
            event("order.shipped", 1, 3),
            event("order.changed", 1, 2),
            event("order.changed", 1, 5).erased(),
            // A late subscriber begins with a baseline, which drops what was held below it.
            event("order.changed", 2, 5),
            event("order.baseline", 2, 7).flag("baseline"),
            event("order.changed", 2, 8),
            // A deletion jumps, too, and a late event does not revive.
            event("order.new", 3, 1),
            event("order.deleted", 3, 4),
            event("order.changed", 3, 2),
            // A body that cannot be read, and one that waits behind it.
            event("order.new", 4, 1).status("a nul: \0"),
            event("order.changed", 4, 2),
            // No news for a mailer. What is replayed may come before the event itself.
            event("order.new", 5, 1).flag("baseline"),
            event("order.new", 6, 1).flag("replayed"),
            event("order.new", 7, 1).erased(),
            event("order.new", 8, 1).flag("replayed"),
            event("order.new", 8, 1),
            // Nobody may forge an event: a followed source by another user, by none, and a source of its own.
            event("order.new", 9, 1).from("shop-js"),
            event("order.baseline", 1, 9).flag("baseline").from("shop-js"),
            event("order.deleted", 1, 9).anonymous(),
            event("order.changed", 1, 6).from("hands"),
        ])
        .await;
    // What is no event, of the right source and user, stops none of the others.
    world.publisher.publish_nonsense().await;
    world
        .publish([
            event("order.changed", 1, 9).header("baseline", "yes"),
            event("order.changed", 1, 9).header("aggregate_id", "1\0"),
        ])
        .await;
    world.publish([event("order.changed", 1, 6)]).await;
    let before = [world.of_hand("of 6").await, world.held().await].join("\n\n");
    for subscriber in world.subscribers.iter_mut().filter(|subscriber| subscriber.name != MAILER) {
        subscriber.redrive().await;
    }
    world.publish([event("order.changed", 4, 3).status("of 3, repaired")]).await;
    let after = [world.of_hand("of 3, repaired").await, world.held().await].join("\n\n");

    // The source lost commits: it goes on as another incarnation.
    let anew = event("order.new", 3, 1).flag("chain_start").anew();
    mails.push(anew.id().to_string());
    world
        .publish([
            // Begins no chain: that is for the whole state to do.
            event("order.changed", 2, 1).anew(),
            event("order.baseline", 1, 3).flag("baseline").status("again").anew(),
            // Of the lost time.
            event("order.changed", 1, 7),
            event("order.deleted", 2, 9).anew(),
            anew,
            // Erased since then: the state of the lost time has ended all the same.
            event("order.new", 4, 1).erased().flag("chain_start").anew(),
            event("order.changed", 1, 4).status("again of 4").anew(),
        ])
        .await;
    let again = [world.of_hand("again of 4").await, world.held().await].join("\n\n");
    let filters = vec![(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", "TIME")];
    insta::with_settings!({filters => filters}, {
        insta::assert_snapshot!([before, after, again].join("\n\n==========\n\n"));
    });
    mails
}
