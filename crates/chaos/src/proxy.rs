//! A TCP proxy that does to connections what networks do: it delays, resets or swallows what is sent.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::Context;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::{mpsc, watch},
    task::JoinHandle,
    time::Instant,
};

use super::fault::Direction;
use devstack::ports;

/// Chunks in flight in one direction of a connection. At this limit the sender has to wait.
const CHUNKS: usize = 64;

/// What a link does to its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LinkState {
    /// Nothing.
    Up,
    /// Everything arrives this much later, in both directions.
    Slow(Duration),
    /// Connections are reset at once, also new ones.
    Cut,
    /// What is sent in this direction is lost, and neither end learns of it. At the end the connections are reset.
    HalfOpen(Direction),
}

/// The state of a link, and how often its connections were reset. A connection is reset when this number differs from
/// the one at its beginning.
#[derive(Clone, Copy, Debug)]
struct Epoch {
    state: LinkState,
    resets: u64,
}

impl Epoch {
    fn swallows(&self, to_server: bool) -> bool {
        match self.state {
            LinkState::HalfOpen(Direction::Both) => true,
            LinkState::HalfOpen(Direction::ToServer) => to_server,
            LinkState::HalfOpen(Direction::FromServer) => !to_server,
            _ => false,
        }
    }

    fn delay(&self) -> Duration {
        if let LinkState::Slow(delay) = self.state { delay } else { Duration::ZERO }
    }
}

/// A proxy in front of one server for one client. Ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Proxy {
    port: u16,
    state: watch::Sender<Epoch>,
    accept: JoinHandle<()>,
}

impl Proxy {
    /// Listens at a free port of 127.0.0.1 and forwards to the port `server` there.
    pub(crate) async fn to(server: u16) -> anyhow::Result<Self> {
        let port = ports::free();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))
            .await
            .with_context(|| format!("the port {port} is not free any more"))?;
        let state = watch::Sender::new(Epoch { state: LinkState::Up, resets: 0 });
        let states = state.subscribe();
        let server = SocketAddr::from((Ipv4Addr::LOCALHOST, server));
        let accept = tokio::spawn(async move {
            // An error concerns one connection, or there are too many open files: the next accept may succeed.
            loop {
                match listener.accept().await {
                    Ok((client, _)) => {
                        tokio::spawn(forward(client, server, states.clone()));
                    }
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            }
        });
        Ok(Self { port, state, accept })
    }

    /// Where it listens.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Puts the link into another state. Connections of a link that was cut or half-open are reset.
    pub(crate) fn set(&self, next: LinkState) {
        self.state.send_modify(|epoch| {
            let was_broken = matches!(epoch.state, LinkState::Cut | LinkState::HalfOpen(_));
            if next == LinkState::Cut || was_broken {
                epoch.resets += 1;
            }
            epoch.state = next;
        });
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accept.abort();
    }
}

/// Forwards one connection until it ends or is reset.
async fn forward(mut client: TcpStream, server: SocketAddr, mut state: watch::Receiver<Epoch>) {
    let Epoch { state: link, resets } = *state.borrow();
    let mut reset = {
        let mut state = state.clone();
        Box::pin(async move {
            let _proxy_is_gone = state.wait_for(|state| state.resets != resets).await;
        })
    };
    match link {
        // Accepted, and never answered.
        LinkState::HalfOpen(_) => reset.await,
        LinkState::Cut => {}
        LinkState::Up | LinkState::Slow(_) => {
            if let Ok(mut server) = TcpStream::connect(server).await {
                let _as_is = client.set_nodelay(true).and_then(|()| server.set_nodelay(true));
                let (from_client, to_client) = client.split();
                let (from_server, to_server) = server.split();
                let both = async {
                    tokio::join!(
                        pump(from_client, to_server, true, state.clone()),
                        pump(from_server, to_client, false, state.clone()),
                    )
                };
                tokio::select! {
                    _ = both => return,
                    () = &mut reset => {}
                }
                let _as_is = server.set_zero_linger();
            }
        }
    }
    // Without lingering, closing sends a reset.
    let _as_is = client.set_zero_linger();
    state.mark_unchanged();
}

/// Forwards one direction of a connection, and its end.
async fn pump(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, to_server: bool, state: watch::Receiver<Epoch>) {
    let (send, mut chunks) = mpsc::channel::<(Instant, Vec<u8>)>(CHUNKS);
    let mut states = state.clone();
    let read = async move {
        let mut buffer = vec![0; 16 * 1024];
        loop {
            let read = from.read(&mut buffer).await.unwrap_or(0);
            // Bytes and the end wait while the link swallows them; afterwards the connection is reset.
            let passes = states.wait_for(|state| !state.swallows(to_server)).await.map(|state| state.delay());
            let (Ok(delay), true) = (passes, read > 0) else { return };
            if send.send((Instant::now() + delay, buffer[..read].to_vec())).await.is_err() {
                return;
            }
        }
    };
    let mut states = state;
    let write = async move {
        while let Some((at, chunk)) = chunks.recv().await {
            tokio::time::sleep_until(at).await;
            let passes = states.wait_for(|state| !state.swallows(to_server)).await.is_ok();
            if !passes || to.write_all(&chunk).await.is_err() {
                return;
            }
        }
        let _gone = to.shutdown().await;
    };
    tokio::join!(read, write);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that sends back what it gets.
    async fn echo() -> u16 {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    let _ended = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        port
    }

    async fn connect(proxy: &Proxy) -> TcpStream {
        TcpStream::connect((Ipv4Addr::LOCALHOST, proxy.port())).await.unwrap()
    }

    /// Sends one byte, and returns what comes back.
    async fn ask(stream: &mut TcpStream) -> std::io::Result<Option<u8>> {
        stream.write_all(b"x").await?;
        let mut byte = [0];
        Ok((stream.read(&mut byte).await? == 1).then_some(byte[0]))
    }

    #[tokio::test]
    async fn bytes_and_the_end_of_a_connection_arrive() {
        let proxy = Proxy::to(echo().await).await.unwrap();
        let mut stream = connect(&proxy).await;
        assert_eq!(ask(&mut stream).await.unwrap(), Some(b'x'));
        stream.shutdown().await.unwrap();
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_slow_link_is_slow_both_ways() {
        let proxy = Proxy::to(echo().await).await.unwrap();
        proxy.set(LinkState::Slow(Duration::from_millis(60)));
        let mut stream = connect(&proxy).await;
        let begin = Instant::now();
        assert_eq!(ask(&mut stream).await.unwrap(), Some(b'x'));
        assert!(begin.elapsed() >= Duration::from_millis(120));
    }

    #[tokio::test]
    async fn a_cut_link_resets_old_and_new_connections() {
        let proxy = Proxy::to(echo().await).await.unwrap();
        let mut before = connect(&proxy).await;
        assert_eq!(ask(&mut before).await.unwrap(), Some(b'x'));
        proxy.set(LinkState::Cut);
        assert!(before.read(&mut [0]).await.is_err(), "the old one");
        let mut during = connect(&proxy).await;
        assert!(during.read(&mut [0]).await.is_err(), "a new one");
        proxy.set(LinkState::Up);
        assert_eq!(ask(&mut connect(&proxy).await).await.unwrap(), Some(b'x'));
    }

    #[tokio::test]
    async fn a_half_open_link_tells_nobody_and_resets_in_the_end() {
        let proxy = Proxy::to(echo().await).await.unwrap();
        for direction in [Direction::Both, Direction::ToServer, Direction::FromServer] {
            let mut before = connect(&proxy).await;
            assert_eq!(ask(&mut before).await.unwrap(), Some(b'x'));
            proxy.set(LinkState::HalfOpen(direction));
            let mut during = connect(&proxy).await;
            for stream in [&mut before, &mut during] {
                let asked = tokio::time::timeout(Duration::from_millis(100), ask(stream)).await;
                assert!(asked.is_err(), "{direction:?}: silence, not {asked:?}");
            }
            proxy.set(LinkState::Up);
            for mut stream in [before, during] {
                assert!(stream.read(&mut [0]).await.is_err(), "{direction:?}");
            }
        }
    }
}
