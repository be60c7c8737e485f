//! Taking connections, and noticing when the client of one hangs up.

use std::{
    collections::HashMap,
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use poem::{
    Request,
    http::uri::Scheme,
    listener::{Acceptor, TcpAcceptor},
    web::{LocalAddr, RemoteAddr},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_util::sync::CancellationToken;

/// Whether the client of a request has hung up: its connection has ended, or the half on which it sends.
/// The server runs a handler to its end all the same, so one that only waits for something asks this.
#[derive(Clone, Debug)]
pub struct HungUp(CancellationToken);

impl HungUp {
    /// Of a request's client. None behind another server than [`Shutdown::serve`](super::Shutdown::serve).
    pub fn of(request: &Request) -> Option<Self> {
        let clients = request.data::<Clients>()?;
        clients.lock().get(request.remote_addr().as_socket_addr()?).cloned().map(Self)
    }

    /// Returns when it has.
    pub async fn happened(&self) {
        self.0.cancelled().await;
    }
}

/// The connections that are open, by the client's address, which is all that a request knows of its own.
#[derive(Clone, Default)]
pub(super) struct Clients(Arc<Mutex<HashMap<SocketAddr, CancellationToken>>>);

impl Clients {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<SocketAddr, CancellationToken>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits a moment after an error. The server accepts again at once, which would be a hot loop while
/// the process is out of file descriptors.
pub(super) struct PatientAcceptor {
    pub(super) acceptor: TcpAcceptor,
    pub(super) clients: Clients,
}

impl Acceptor for PatientAcceptor {
    type Io = Connection;

    fn local_addr(&self) -> Vec<LocalAddr> {
        self.acceptor.local_addr()
    }

    async fn accept(&mut self) -> io::Result<(Connection, LocalAddr, RemoteAddr, Scheme)> {
        match self.acceptor.accept().await {
            Ok((stream, local, remote, scheme)) => {
                let hung_up = CancellationToken::new();
                let client = remote.as_socket_addr().copied();
                if let Some(client) = client {
                    self.clients.lock().insert(client, hung_up.clone());
                }
                let clients = self.clients.clone();
                Ok((Connection { stream, hung_up, client, clients }, local, remote, scheme))
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                Err(error)
            }
        }
    }
}

/// A connection that says when its client hangs up. The server reads while a handler runs, so it is seen.
pub(super) struct Connection {
    stream: TcpStream,
    hung_up: CancellationToken,
    client: Option<SocketAddr>,
    clients: Clients,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.hung_up.cancel();
        let Some(client) = self.client else { return };
        let mut clients = self.clients.lock();
        // Unless it is a later connection of the same address by now.
        if clients.get(&client).is_some_and(CancellationToken::is_cancelled) {
            clients.remove(&client);
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let room = buf.remaining();
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buf));
        if read.is_err() || (room > 0 && buf.remaining() == room) {
            self.hung_up.cancel();
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
