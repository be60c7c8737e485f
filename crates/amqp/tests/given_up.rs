//! A connection that is given up ends, at whatever point. lapin's threads are counted, so this is one test.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

use std::{io, time::Duration};

use amqp::{Connection, Nodes, Reconnect, Unreachable};
use devstack::testing::until;
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpSocket, TcpStream},
    time::timeout,
};

/// How long it is looked for an end that has to come at once.
const SOON: Duration = Duration::from_secs(30);

#[tokio::test]
async fn what_is_given_up_leaves_no_thread_and_no_socket() {
    // A node that takes the connection and says nothing more, as one that is stopped.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    for scheme in ["amqp", "amqps"] {
        let url = format!("{scheme}://127.0.0.1:{port}/%2f");
        let attempt = timeout(Duration::from_secs(2), connect(&url));
        let (attempt, accepted) = tokio::join!(attempt, silent.accept());
        assert!(attempt.is_err(), "{scheme}: nobody answered");
        let (mut peer, _) = accepted.unwrap();
        timeout(SOON, the_end_of(&mut peer)).await.expect("the socket is closed");
        no_threads(scheme).await;
    }

    // A node that does not take the connection, as one behind a firewall: its queue is full.
    let full = TcpSocket::new_v4().unwrap();
    full.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let full = full.listen(1).unwrap();
    let address = full.local_addr().unwrap();
    let mut queue = Vec::new();
    while let Ok(taken) = timeout(Duration::from_millis(200), TcpStream::connect(address)).await {
        queue.push(taken.unwrap());
    }
    let url = format!("amqp://{address}/%2f");
    timeout(Duration::from_millis(500), connect(&url)).await.expect_err("nobody takes it");
    no_threads("not taken").await;

    // One that is connected, and whose channel is held by somebody who waits for its answers.
    let connection = connect(&devstack::testing::virtual_host("broker").await).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    assert_eq!(threads(), 1);
    assert!(channel.status().connected());
    drop(connection);
    no_threads("connected").await;
    assert!(!channel.status().connected());

    // And one that was closed in good order.
    let connection = connect(&devstack::testing::virtual_host("broker").await).await.unwrap();
    connection.close().await;
    no_threads("closed").await;
}

async fn connect(url: &str) -> Result<Connection, Unreachable> {
    let nodes: Nodes = url.parse().unwrap();
    nodes.connect("given up", &mut Reconnect::default()).await
}

async fn the_end_of(peer: &mut TcpStream) {
    let mut bytes = [0; 1024];
    // What was sent before, and then the end.
    while !matches!(peer.read(&mut bytes).await, Ok(0) | Err(_)) {}
}

async fn no_threads(when: &str) {
    until(&format!("{when}: no thread is left"), async || threads() == 0).await;
}

/// The threads of this process on which lapin serves a connection.
fn threads() -> usize {
    let name =
        |task: io::Result<std::fs::DirEntry>| std::fs::read_to_string(task.ok()?.path().join("comm")).ok();
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks.filter_map(name).filter(|name| name.starts_with("lapin-io-loop")).count()
}
