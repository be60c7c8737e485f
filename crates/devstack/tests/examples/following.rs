//! The bindings that `docs/events.md` prints, run as they stand on a broker on which nothing is declared yet.

use devstack::testing::virtual_host;

use crate::{
    events::{Publisher, event},
    programs::Program,
};

#[tokio::test]
async fn whoever_follows_versions_binds_on_a_new_broker() {
    let amqp = virtual_host("examples_following").await;
    let document = include_str!("../../../../docs/events.md");
    let (_, rest) = document.split_once("```python follow\n").unwrap();
    let (printed, _) = rest.split_once("\n```").unwrap();
    let connect = "import os, pika\n\
                   channel = pika.BlockingConnection(pika.URLParameters(os.environ['AMQP_URL'])).channel()\n";
    for _ in 0..2 {
        Program::python(&["-c", &format!("{connect}{printed}")]).await.env("AMQP_URL", &amqp).run().await;
    }
    // Mandatory: it fails when no queue takes it.
    let person = event("person.married", 1, 1).header("aggregate_type", "person");
    Publisher::new(&amqp).await.publish(person).await;
}
