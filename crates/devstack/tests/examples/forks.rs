//! A subscriber that follows versions stops where the source's history is another one, however that arrives.

use devstack::testing::virtual_host;

use crate::{
    events::{Publisher, SOURCE, USER, event, id_of},
    proxy::Proxy,
    subscribers::Subscriber,
};

#[tokio::test]
async fn a_fork_stops_it() {
    let amqp = virtual_host("examples_forks").await;
    let (proxy, publisher) = (Proxy::before(&amqp).await, Publisher::new(&amqp).await);
    let follows =
        |version, previous: &str| event("order.changed", 1, version).header("previous_id", previous);
    let other = uuid::Uuid::from_u128(7).to_string();
    for name in ["python", "node"] {
        let mut subscriber = Subscriber::new(name, &amqp, &proxy, &format!("{SOURCE}={USER}")).await;
        let queue = format!("order-copy-{name}");
        for event in [
            follows(1, "no id"),
            follows(2, &id_of(1, 1).to_ascii_uppercase()),
            follows(3, ""),
            follows(4, &id_of(1, 3)),
        ] {
            publisher.publish(event).await;
        }
        let of_4 =
            [("1".to_owned(), r#"{"id": 1, "total": 12345678901234567890, "status": "of 4"}"#.to_owned())];
        subscriber.has(SOURCE, &of_4).await;
        subscriber.stop().await;
        publisher.publish(follows(5, &other)).await;
        let said = subscriber.fails().await;
        assert!(said.contains("version 5 follows another event than the one applied"), "{said}");
        publisher.purge(&queue).await;

        // Held, and then it is next.
        publisher.publish(follows(6, &other)).await;
        publisher.publish(follows(5, &id_of(1, 4))).await;
        let said = subscriber.fails().await;
        assert!(said.contains("version 6 follows another event than the one applied"), "{said}");
        subscriber.has(SOURCE, &of_4).await;
        publisher.purge(&queue).await;

        // The version that it has, of another event.
        publisher
            .publish(event("order.changed", 1, 4).from(&format!("{SOURCE}~1764426123456")).anonymous())
            .await;
        publisher.publish(event("order.changed", 1, 1).from(&format!("{SOURCE}~1764426123456"))).await;
        let said = subscriber.fails().await;
        assert!(said.contains("does not follow 1, the newest incarnation known"), "{said}");
        publisher.purge(&queue).await;
    }
}
