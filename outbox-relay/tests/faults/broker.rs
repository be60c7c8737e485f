//! The broker is stopped, killed, full, forgetful, or says nothing.

use lapin::types::FieldTable;
use reqwest::Method;
use serde_json::json;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::{
    field::{Field, IN_FLIGHT, QUEUE, WHILE},
    stack::{EXCHANGE, output},
};

/// Two relays; whatever is done to the broker, one after the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: make test-faults"]
#[expect(clippy::too_many_lines, reason = "one fault after the other, on one load")]
async fn the_broker() {
    let mut field = Field::new("faults_broker").await;
    for _ in 0..2 {
        // Where order is worth more than going on: what is set aside comes back after what went on.
        field.add(field.run().env("UNROUTABLE", "hold")).await;
    }
    let vhost = field.stack.vhost.clone();

    let fault = "RabbitMQ stopped and started";
    let load = field.load();
    sleep(WHILE).await;
    field.servers.rabbitmq.stop(&CancellationToken::new()).await;
    field.says(fault, "no connection to RabbitMQ").await;
    field.servers.rabbitmq.start().await.unwrap();
    sleep(WHILE).await;
    load.stop().await;
    field.whole(fault, IN_FLIGHT).await;

    let fault = "RabbitMQ killed";
    let load = field.load();
    sleep(WHILE).await;
    field.servers.rabbitmq.kill().await;
    field.says(fault, "no connection to RabbitMQ").await;
    field.servers.rabbitmq.start().await.unwrap();
    sleep(WHILE).await;
    load.stop().await;
    field.whole(fault, IN_FLIGHT).await;

    let fault = "connections closed by an operator";
    let load = field.load();
    for _ in 0..3 {
        sleep(WHILE).await;
        field.close_connections().await;
    }
    load.stop().await;
    field.whole(fault, 3 * IN_FLIGHT).await;

    let fault = "memory alarm";
    let load = field.load();
    sleep(WHILE).await;
    let watermark = async |field: &Field, mark: &str| {
        let set = ["set_vm_memory_high_watermark", "absolute", mark];
        field.servers.rabbitmq.control(&set).await.unwrap();
    };
    watermark(&field, "1MB").await;
    field.says(fault, "the broker blocks publishers").await;
    sleep(WHILE).await;
    watermark(&field, "1GB").await;
    sleep(WHILE).await;
    load.stop().await;
    // Nobody gives up on what waits for its confirm.
    field.whole(fault, 0).await;

    let fault = "queue full";
    let load = field.load();
    sleep(WHILE).await;
    let policy = format!("policies/{vhost}/full");
    // The limit comes second: while a policy without one is the queue's, it drops what is beyond it.
    let mut full = json!({
        "pattern": format!("^{QUEUE}$"),
        "apply-to": "queues",
        "definition": {"overflow": "reject-publish"},
    });
    field.stack.manage(Method::PUT, &policy, Some(full.clone())).await;
    sleep(WHILE).await;
    full["definition"]["max-length"] = 1.into();
    field.stack.manage(Method::PUT, &policy, Some(full)).await;
    field.says(fault, "the broker refuses events of type thing.changed").await;
    sleep(WHILE).await;
    field.stack.manage(Method::DELETE, &policy, None).await;
    sleep(WHILE).await;
    load.stop().await;
    field.whole(fault, 0).await;

    let fault = "binding removed and put back";
    let load = field.load();
    sleep(WHILE).await;
    field.unbind("%23").await;
    field.says(fault, "no queue takes events of type thing.changed").await;
    sleep(WHILE).await;
    field.topology(FieldTable::default()).await;
    sleep(WHILE).await;
    load.stop().await;
    field.whole(fault, 0).await;

    let fault = "exchange deleted and declared again";
    let load = field.load();
    sleep(WHILE).await;
    field.stack.manage(Method::DELETE, &format!("exchanges/{vhost}/{EXCHANGE}"), None).await;
    field.says(fault, "does not exist").await;
    field.topology(FieldTable::default()).await;
    sleep(WHILE).await;
    load.stop().await;
    // What was published into it before it was bound again came back, and counts as not published.
    field.whole(fault, IN_FLIGHT).await;

    let fault = "user without permission";
    let load = field.load();
    sleep(WHILE).await;
    field.stack.manage(Method::DELETE, &format!("permissions/{vhost}/{vhost}"), None).await;
    field.close_connections().await;
    field.says(fault, "no connection to RabbitMQ").await;
    field.stack.permit("^$").await;
    sleep(WHILE).await;
    load.stop().await;
    field.whole(fault, IN_FLIGHT).await;

    let fault = "connection silent";
    let load = field.load();
    sleep(WHILE).await;
    field.broker.hang();
    // Two heartbeats of 10 s are missed.
    field.says(fault, "broker").await;
    field.broker.cut();
    sleep(WHILE).await;
    load.stop().await;
    field.whole(fault, IN_FLIGHT).await;

    // It confirmed events and lost them: only history can bring those back.
    let fault = "RabbitMQ lost its data";
    let load = field.load();
    sleep(WHILE).await;
    field.progress(fault).await;
    field.servers.rabbitmq.kill().await;
    field.servers.rabbitmq.forget().unwrap();
    field.servers.rabbitmq.start().await.unwrap();
    field.says(fault, "no connection to RabbitMQ").await;
    field.stack.manage(Method::PUT, &format!("vhosts/{vhost}"), None).await;
    field.stack.add_user().await;
    field.topology(FieldTable::default()).await;
    sleep(WHILE).await;
    load.stop().await;
    field.settled(fault).await;
    assert!(field.take().await > 0, "{fault}: it goes on by itself");
    let lost = field.missing().await;
    assert!(lost > 0, "{fault}: what was confirmed is lost");
    let replay =
        field.stack.command("replay").args(["--all", "--to-everybody", "--yes"]).output().await.unwrap();
    assert!(replay.status.success(), "{replay:?}");
    field.take().await;
    field.all_arrived(fault).await;
    println!("{fault}: {lost} events lost, and replayed");

    let status = output(&mut field.stack.command("status")).await;
    assert!(status.starts_with("exit code: 0"), "{status}");
    field.end().await;
}
