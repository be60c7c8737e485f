//! Connecting to RabbitMQ, so that a connection that is given up ends.
//!
//! lapin reads and writes each connection on a thread of its own, with 8 MiB of buffers once the broker
//! has agreed to frames of 128 KiB. The thread goes on until the broker answers or the heartbeat fails,
//! whether anybody still holds or awaits the connection or not; before the broker has answered there is no
//! heartbeat. So every attempt at a broker that has stopped would leave a thread behind, and all of them
//! would open a connection when it goes on. A [`Wire`] ends what belongs to it.

use std::{
    io,
    net::{Shutdown, TcpStream},
    os::fd::AsFd,
    sync::{Arc, Mutex, PoisonError},
};

use lapin::{
    AsyncTcpStream, Connection, ConnectionProperties,
    tcp::OwnedTLSConfig,
    uri::{AMQPScheme, AMQPUri},
};
use tokio_util::sync::CancellationToken;

/// The socket under a connection. Drop it after the connection is closed, or instead: whatever the
/// connection's thread waits for then, it ends.
#[derive(Debug, Default)]
pub struct Wire {
    given_up: CancellationToken,
    socket: Arc<Mutex<Option<TcpStream>>>,
}

/// Connects, over TLS with `amqps`. There is no limit to how long it takes: drop the future when that is
/// too long, and nothing is left of the attempt. lapin's own recovery is off, unless `properties` say
/// otherwise.
pub async fn connect(
    uri: AMQPUri,
    tls: OwnedTLSConfig,
    properties: ConnectionProperties,
) -> lapin::Result<(Connection, Wire)> {
    let wire = Wire::default();
    let (given_up, socket) = (wire.given_up.clone(), Arc::clone(&wire.socket));
    let runtime = lapin::runtime::default_runtime()?;
    let connecting = Connection::connector(
        uri,
        runtime,
        async move |uri, runtime| {
            let open = async {
                let host = uri.authority.host.as_str();
                let addresses = runtime.to_socket_addrs((host.to_owned(), uri.authority.port));
                let stream = AsyncTcpStream::connect(&runtime, addresses).await?;
                if let AsyncTcpStream::Plain(plain) = &stream {
                    let same = plain.get_ref().as_fd().try_clone_to_owned()?;
                    *socket.lock().unwrap_or_else(PoisonError::into_inner) = Some(same.into());
                }
                match uri.scheme {
                    AMQPScheme::AMQP => Ok(stream),
                    AMQPScheme::AMQPS => stream.into_tls(host, tls.as_ref()).await,
                }
            };
            match given_up.run_until_cancelled(open).await {
                // Given up just before: there was no socket yet to shut down.
                Some(opened) if !given_up.is_cancelled() => Ok(opened?),
                _ => Err(io::Error::from(io::ErrorKind::ConnectionAborted).into()),
            }
        },
        properties,
    );
    Ok((connecting.await?, wire))
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
