//! A TCP proxy that does to connections what networks do: late, cut off, silent.

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

/// Pieces under way in one direction of a connection; beyond it whoever sends has to wait.
const PIECES: usize = 64;

/// What a wire is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weather {
    /// As if it were not there.
    Clear,
    /// Everything arrives this much later, in both directions.
    Slow(Duration),
    /// Connections break at once, and new ones as well.
    Cut,
    /// What is sent in this direction is gone, and neither end is told: a half-open connection. It breaks
    /// when the silence is over.
    Silent(Direction),
}

/// A wire's weather, and how often its connections were broken: one breaks when the number is not the one
/// that it began with.
#[derive(Clone, Copy, Debug)]
struct State {
    weather: Weather,
    breaks: u64,
}

impl State {
    fn silences(&self, to_server: bool) -> bool {
        match self.weather {
            Weather::Silent(Direction::Both) => true,
            Weather::Silent(Direction::ToServer) => to_server,
            Weather::Silent(Direction::FromServer) => !to_server,
            _ => false,
        }
    }

    fn delay(&self) -> Duration {
        if let Weather::Slow(delay) = self.weather { delay } else { Duration::ZERO }
    }
}

/// A proxy in front of one server for one client. Ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Wire {
    port: u16,
    state: watch::Sender<State>,
    accept: JoinHandle<()>,
}

impl Wire {
    /// Listens at a free port of 127.0.0.1 for what is to go to `server`, a port there.
    pub(crate) async fn to(server: u16) -> anyhow::Result<Self> {
        let port = ports::free();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))
            .await
            .with_context(|| format!("the port {port} is not free any more"))?;
        let state = watch::Sender::new(State { weather: Weather::Clear, breaks: 0 });
        let told = state.subscribe();
        let server = SocketAddr::from((Ipv4Addr::LOCALHOST, server));
        let accept = tokio::spawn(async move {
            // An error here is of one connection, or of too many open files: the next one may do better.
            loop {
                match listener.accept().await {
                    Ok((client, _)) => {
                        tokio::spawn(carry(client, server, told.clone()));
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

    /// Changes the weather. Whatever was cut or silent has broken by the end.
    pub(crate) fn turn(&self, weather: Weather) {
        self.state.send_modify(|state| {
            let broken = |weather| matches!(weather, Weather::Cut | Weather::Silent(_));
            if weather == Weather::Cut || broken(state.weather) {
                state.breaks += 1;
            }
            state.weather = weather;
        });
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.accept.abort();
    }
}

/// One connection's life.
async fn carry(mut client: TcpStream, server: SocketAddr, mut state: watch::Receiver<State>) {
    let State { weather, breaks } = *state.borrow();
    let mut broken = {
        let mut state = state.clone();
        Box::pin(async move {
            let _wire_is_gone = state.wait_for(|state| state.breaks != breaks).await;
        })
    };
    match weather {
        // Nobody answers, until it is over.
        Weather::Silent(_) => broken.await,
        Weather::Cut => {}
        Weather::Clear | Weather::Slow(_) => {
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
                    () = &mut broken => {}
                }
                let _as_is = server.set_zero_linger();
            }
        }
    }
    // A reset, and not the goodbye of an orderly end.
    let _as_is = client.set_zero_linger();
    state.mark_unchanged();
}

/// Carries one direction of a connection to its end, which is passed on.
async fn pump(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, to_server: bool, state: watch::Receiver<State>) {
    let (send, mut pieces) = mpsc::channel::<(Instant, Vec<u8>)>(PIECES);
    let mut told = state.clone();
    let read = async move {
        let mut buffer = vec![0; 16 * 1024];
        loop {
            let read = from.read(&mut buffer).await.unwrap_or(0);
            // Neither bytes nor the end come through, and afterwards the connection is broken.
            let heard = told.wait_for(|state| !state.silences(to_server)).await.map(|state| state.delay());
            let (Ok(delay), true) = (heard, read > 0) else { return };
            if send.send((Instant::now() + delay, buffer[..read].to_vec())).await.is_err() {
                return;
            }
        }
    };
    let mut told = state;
    let write = async move {
        while let Some((at, piece)) = pieces.recv().await {
            tokio::time::sleep_until(at).await;
            let heard = told.wait_for(|state| !state.silences(to_server)).await.is_ok();
            if !heard || to.write_all(&piece).await.is_err() {
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

    async fn connect(wire: &Wire) -> TcpStream {
        TcpStream::connect((Ipv4Addr::LOCALHOST, wire.port())).await.unwrap()
    }

    /// What comes back of `x`, or nothing.
    async fn ask(stream: &mut TcpStream) -> std::io::Result<Option<u8>> {
        stream.write_all(b"x").await?;
        let mut byte = [0];
        Ok((stream.read(&mut byte).await? == 1).then_some(byte[0]))
    }

    #[tokio::test]
    async fn what_is_sent_arrives_and_so_does_the_end() {
        let wire = Wire::to(echo().await).await.unwrap();
        let mut stream = connect(&wire).await;
        assert_eq!(ask(&mut stream).await.unwrap(), Some(b'x'));
        stream.shutdown().await.unwrap();
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_slow_wire_is_slow_both_ways() {
        let wire = Wire::to(echo().await).await.unwrap();
        wire.turn(Weather::Slow(Duration::from_millis(60)));
        let mut stream = connect(&wire).await;
        let begin = Instant::now();
        assert_eq!(ask(&mut stream).await.unwrap(), Some(b'x'));
        assert!(begin.elapsed() >= Duration::from_millis(120));
    }

    #[tokio::test]
    async fn a_cut_wire_resets_what_there_is_and_what_comes() {
        let wire = Wire::to(echo().await).await.unwrap();
        let mut before = connect(&wire).await;
        assert_eq!(ask(&mut before).await.unwrap(), Some(b'x'));
        wire.turn(Weather::Cut);
        assert!(before.read(&mut [0]).await.is_err(), "the old one");
        let mut during = connect(&wire).await;
        assert!(during.read(&mut [0]).await.is_err(), "a new one");
        wire.turn(Weather::Clear);
        assert_eq!(ask(&mut connect(&wire).await).await.unwrap(), Some(b'x'));
    }

    #[tokio::test]
    async fn a_silent_wire_tells_nobody_and_breaks_in_the_end() {
        let wire = Wire::to(echo().await).await.unwrap();
        for direction in [Direction::Both, Direction::ToServer, Direction::FromServer] {
            let mut before = connect(&wire).await;
            assert_eq!(ask(&mut before).await.unwrap(), Some(b'x'));
            wire.turn(Weather::Silent(direction));
            let mut during = connect(&wire).await;
            for stream in [&mut before, &mut during] {
                let asked = tokio::time::timeout(Duration::from_millis(100), ask(stream)).await;
                assert!(asked.is_err(), "{direction:?}: silence, not {asked:?}");
            }
            wire.turn(Weather::Clear);
            for mut stream in [before, during] {
                assert!(stream.read(&mut [0]).await.is_err(), "{direction:?}");
            }
        }
    }
}
