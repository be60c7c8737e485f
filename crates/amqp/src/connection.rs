//! One connection, and the socket under it.

use std::{
    fmt, io,
    net::{Shutdown, TcpStream},
    ops::Deref,
    os::fd::AsFd,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use lapin::{
    AsyncTcpStream, ConnectionProperties,
    tcp::OwnedTLSConfig,
    types::ShortString,
    uri::{AMQPScheme, AMQPUri},
};
use tokio_util::sync::CancellationToken;

use crate::{
    reactor,
    screen::{LARGEST_FRAME, Screened},
};

/// Both sides say that they are there, so that a connection ends of which the other side is gone without a word: after
/// two of these without one, unless the URL says otherwise.
const HEARTBEAT_SECONDS: u16 = 10;
/// Closing is a courtesy.
const CLOSE: Duration = Duration::from_secs(1);

/// A connection to a node: lapin's, and the socket under it. When it is dropped, both end, and so does everything that
/// waits for the broker over it, whether the broker answers or not.
///
/// ```no_run
/// # async fn example(nodes: amqp::Nodes) -> Result<(), Box<dyn std::error::Error>> {
/// let connection = nodes.connect("shop", &mut amqp::Reconnect::default()).await?;
/// let channel = connection.create_channel().await?;
/// connection.close().await;
/// # Ok(()) }
/// ```
pub struct Connection {
    inner: lapin::Connection,
    user: String,
    /// After the connection, whose thread it ends.
    _wire: Wire,
}

impl Connection {
    /// Opens one to a node. There is no limit to how long it takes: when the future is dropped, nothing is left of the
    /// attempt. lapin's own recovery stays off.
    pub(crate) async fn open(mut uri: AMQPUri, tls: OwnedTLSConfig, name: &str) -> lapin::Result<Self> {
        uri.query.heartbeat.get_or_insert(HEARTBEAT_SECONDS);
        let largest = *uri.query.frame_max.get_or_insert(LARGEST_FRAME);
        let user = uri.authority.userinfo.username.clone();
        let wire = Wire::default();
        let (given_up, socket) = (wire.given_up.clone(), Arc::clone(&wire.socket));
        let connecting = lapin::Connection::connector(
            uri,
            reactor::runtime(),
            async move |uri: AMQPUri, _| {
                let open = async {
                    let runtime = lapin::runtime::default_runtime()?;
                    let host = uri.authority.host.as_str();
                    let addresses = runtime.to_socket_addrs((host.to_owned(), uri.authority.port));
                    let stream = AsyncTcpStream::connect(&runtime, addresses).await?;
                    if let AsyncTcpStream::Plain(plain) = &stream {
                        let same = plain.get_ref().as_fd().try_clone_to_owned()?;
                        *socket.lock().unwrap_or_else(PoisonError::into_inner) = Some(same.into());
                    }
                    let stream = match uri.scheme {
                        AMQPScheme::AMQP => stream,
                        AMQPScheme::AMQPS => stream.into_tls(host, tls.as_ref()).await?,
                    };
                    Ok::<_, lapin::Error>(AsyncTcpStream::Plain(Screened::new(stream, largest)))
                };
                match given_up.run_until_cancelled(open).await {
                    // Given up just before: there was no socket yet to shut down.
                    Some(opened) if !given_up.is_cancelled() => opened,
                    _ => Err(io::Error::from(io::ErrorKind::ConnectionAborted).into()),
                }
            },
            ConnectionProperties::default().with_connection_name(name.into()),
        );
        Ok(Self { inner: connecting.await?, user, _wire: wire })
    }

    /// As whom the node's URL logs in. The broker may know the connection by another name: with a certificate's or a
    /// token's.
    ///
    /// ```
    /// # fn example(connection: &amqp::Connection) {
    /// println!("logged in as {}", connection.user());
    /// # }
    /// ```
    pub fn user(&self) -> &str {
        &self.user
    }

    /// Closes in good order, so that nothing is left dangling on a connection that lives. The broker has a second for
    /// its answer.
    ///
    /// ```
    /// # async fn example(connection: amqp::Connection) {
    /// connection.close().await;
    /// # }
    /// ```
    pub async fn close(self) {
        let closed = tokio::time::timeout(CLOSE, self.inner.close(200, ShortString::default())).await;
        if !matches!(closed, Ok(Ok(()))) {
            tracing::debug!(?closed, "a connection was not closed in order");
        }
    }
}

impl Deref for Connection {
    type Target = lapin::Connection;

    fn deref(&self) -> &lapin::Connection {
        &self.inner
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

/// The socket under a connection: it ends what lapin's thread waits for, when it is dropped.
#[derive(Debug, Default)]
struct Wire {
    given_up: CancellationToken,
    socket: Arc<Mutex<Option<TcpStream>>>,
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.given_up.cancel();
        if let Some(socket) = self.socket.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // It fails when the other side has closed it already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}
