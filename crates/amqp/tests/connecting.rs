//! Nodes are tried in turn, and a connection ends when the other side is gone without a word.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use amqp::{Nodes, Reconnect};
use devstack::testing::until;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

#[tokio::test]
async fn each_node_is_named_with_its_reason_in_the_order_of_the_list() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let nodes = format!("amqp://u:hush@127.0.0.1:1,amqp://u:hush@127.0.0.1:{port}?connection_timeout=200");
    let nodes: Nodes = nodes.parse().unwrap();
    for first in 0..3 {
        let mut reconnect = Reconnect::beginning_with(first);
        let unreachable = nodes.connect("named", &mut reconnect).await.unwrap_err();
        assert_eq!(
            unreachable.to_string(),
            format!(
                "127.0.0.1:1: IO error: Connection refused (os error 111); 127.0.0.1:{port} did not answer within 200ms"
            ),
        );
    }
}

#[tokio::test]
async fn the_node_that_answered_is_the_first_to_be_tried_until_it_is_lost() {
    let broker = devstack::testing::virtual_host("amqp_turn").await;
    let nodes: Nodes = format!("amqp://127.0.0.1:1,{broker},{broker}").parse().unwrap();
    let mut reconnect = Reconnect::default();
    let tried = async |reconnect: &mut Reconnect| {
        let prepare = |connection| async { Ok::<_, String>(connection) };
        nodes.connect_with("tried", reconnect, prepare).await.unwrap().close().await;
        format!("{reconnect:?}").split_once(',').unwrap().0.to_owned()
    };
    assert_eq!(tried(&mut reconnect).await, "Reconnect { first: 1");
    assert_eq!(tried(&mut reconnect).await, "Reconnect { first: 1");
    reconnect.lost();
    assert_eq!(tried(&mut reconnect).await, "Reconnect { first: 2");
    reconnect.lost();
    assert_eq!(tried(&mut reconnect).await, "Reconnect { first: 1", "the first is tried, and is not there");

    // A node that is not of use is not the one, though it lets the user in.
    let useless = |_| async { Err::<(), _>("not of use".to_owned()) };
    let unreachable = nodes.connect_with("tried", &mut reconnect, useless).await.unwrap_err();
    assert_eq!(unreachable.to_string().matches(": not of use").count(), 2, "{unreachable}");
}

/// As when a machine loses its power: nothing is closed, and nothing comes any more.
#[tokio::test]
async fn a_half_open_connection_ends_after_two_heartbeats() {
    let broker = devstack::testing::virtual_host("amqp_half_open").await;
    let (login, place) = broker.split_once("://").unwrap().1.rsplit_once('@').unwrap();
    let (address, vhost) = place.split_once('/').unwrap();
    let (listener, cut) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), Arc::new(AtomicBool::new(false)));
    let port = listener.local_addr().unwrap().port();
    let (address, is_cut) = (address.to_owned(), Arc::clone(&cut));
    let sent = Arc::new(AtomicUsize::new(0));
    let is_sent = Arc::clone(&sent);
    tokio::spawn(async move {
        let (client, _) = listener.accept().await.unwrap();
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_broker, mut to_broker) = TcpStream::connect(address).await.unwrap().into_split();
        let up = async {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = from_client.read(&mut bytes).await {
                is_sent.fetch_add(1, Ordering::Relaxed);
                if !is_cut.load(Ordering::Relaxed) {
                    to_broker.write_all(&bytes[..count]).await.unwrap();
                }
            }
        };
        let down = async {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = from_broker.read(&mut bytes).await {
                if !is_cut.load(Ordering::Relaxed) {
                    to_client.write_all(&bytes[..count]).await.unwrap();
                }
            }
            // What the broker ends does not arrive either.
            std::future::pending::<()>().await;
        };
        tokio::select! { () = up => {} () = down => {} }
    });

    let nodes: Nodes = format!("amqp://{login}@127.0.0.1:{port}/{vhost}?heartbeat=2").parse().unwrap();
    let connection = nodes.connect("half open", &mut Reconnect::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    // With nothing but heartbeats.
    let before = sent.load(Ordering::Relaxed);
    until("four heartbeats are sent", async || sent.load(Ordering::Relaxed) >= before + 4).await;
    assert!(channel.status().connected(), "an idle connection lives");
    cut.store(true, Ordering::Relaxed);
    until("the connection ends", async || !channel.status().connected()).await;
    // What is asked for then fails at once.
    timeout(Duration::from_secs(10), connection.create_channel()).await.unwrap().unwrap_err();
}
