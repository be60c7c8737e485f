//! A broker of three nodes loses one.

use devstack::rabbitmq::RabbitMq;
use lapin::types::{AMQPValue, FieldTable};
use reqwest::Method;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::{
    field::{Field, IN_FLIGHT, QUEUE, WHILE},
    stack::{BROKER_PASSWORD, eventually},
};

/// The leader of the quorum queue is killed under load, and comes back; then the next one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: make test-faults"]
async fn a_cluster_loses_its_leader() {
    let mut field = Field::new("faults_cluster").await;
    let mut peers: Vec<RabbitMq> = Vec::new();
    for number in [2, 3] {
        let mut peer = field.servers.rabbitmq.peer(&field.folder, number).unwrap();
        peer.start().await.unwrap();
        peers.push(peer);
    }
    let vhost = field.stack.vhost.clone();
    let queue = format!("queues/{vhost}/{QUEUE}");
    field.stack.manage(Method::DELETE, &queue, None).await;
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    field.topology(arguments).await;

    let user = format!("amqp://{vhost}:{BROKER_PASSWORD}@");
    let nodes = [&field.servers.rabbitmq].into_iter().chain(&peers);
    let nodes: Vec<String> =
        nodes.map(|node| format!("{user}{}/{vhost}", node.url().rsplit_once('@').unwrap().1)).collect();
    for _ in 0..2 {
        field.add(field.run().env("AMQP_URL", nodes.join(","))).await;
    }

    for round in 1..=2 {
        let leader = eventually("the queue has a leader and all its members", async || {
            let told = field.stack.try_manage(Method::GET, &queue, None).await.ok()?;
            let all = told["online"].as_array()?.len() == 3;
            all.then(|| told["leader"].as_str().map(ToOwned::to_owned))?
        })
        .await;
        let fault = format!("leader {round} of a quorum queue killed");
        let load = field.load();
        sleep(WHILE).await;
        let node = peers.iter_mut().find(|peer| peer.node() == leader);
        let node = node.unwrap_or(&mut field.servers.rabbitmq);
        assert_eq!(node.node(), leader);
        node.kill().await;
        sleep(3 * WHILE).await;
        load.stop().await;
        // Two of three nodes are enough.
        field.settled(&fault).await;
        let load = field.load();
        let node = peers.iter_mut().find(|peer| peer.node() == leader);
        node.unwrap_or(&mut field.servers.rabbitmq).start().await.unwrap();
        sleep(WHILE).await;
        load.stop().await;
        field.whole(&fault, IN_FLIGHT).await;
    }

    for relay in &mut field.relays {
        assert!(relay.terminate().await.success());
    }
    field.relays.clear();
    for peer in &mut peers {
        peer.stop(&CancellationToken::new()).await;
    }
    field.end().await;
}
