//! The runtime that lapin is given: tokio, with connections that are seen through.

use std::{
    io::{self, Read, Write},
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd},
    time::{Duration, Instant},
};

use async_rs::{Runtime, Tokio, traits::Reactor, util::RuntimeParts};
use futures_io::{AsyncRead, AsyncWrite};
use futures_util::Stream;
use lapin::AsyncTcpStream;

use crate::screen::{LARGEST_FRAME, Screened};

/// What connections are to lapin.
pub(crate) type Wired = Screened<AsyncTcpStream<<Tokio as Reactor>::TcpStream>>;

/// tokio's, of which only the type of the connections differs.
#[derive(Clone, Debug)]
pub(crate) struct Screening(Tokio);

/// The runtime that this runs in.
pub(crate) fn runtime() -> Runtime<RuntimeParts<Tokio, Screening>> {
    let tokio = Tokio::current();
    Runtime::new(RuntimeParts::new(tokio.clone(), Screening(tokio)))
}

impl Reactor for Screening {
    type TcpStream = Wired;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: Read + Write + AsFd + AsRawFd + Send + 'static>(
        &self,
        socket: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        self.0.register(socket)
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let connecting = self.0.tcp_connect_addr(address);
        async move { Ok(Screened::new(AsyncTcpStream::Plain(connecting.await?), LARGEST_FRAME)) }
    }
}
