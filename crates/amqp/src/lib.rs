//! Connecting to RabbitMQ, so that a connection that is given up ends.
//!
//! lapin reads and writes each connection on a thread of its own, with 8 MiB of buffers once the broker
//! has agreed to frames of 128 KiB. The thread goes on until the broker answers or the heartbeat fails,
//! whether anybody still holds or awaits the connection or not; before the broker has answered there is no
//! heartbeat. So every attempt at a broker that has stopped would leave a thread behind, and all of them
//! would open a connection when it goes on. A [`Wire`] ends what belongs to it.
//!
//! It also stands between the broker and what lapin cannot read: headers that are nested so deep that parsing
//! them ends the process, or larger than a frame may be, or not UTF-8. They are removed from the message on its
//! way in, and [`REMOVED`] among its headers says so. So no message ends a connection, however often it comes.

mod header;
mod reactor;
mod reader;
mod screen;

mod fault;

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

pub use self::fault::{describe, without_users};
pub use header::REMOVED;
use screen::Screened;

/// The largest frame that is asked for, unless the URL says otherwise: RabbitMQ's own default. lapin has buffers
/// for 64 of them, also when the broker would allow any size.
const LARGEST_FRAME: u32 = 128 * 1024;

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
    mut uri: AMQPUri,
    tls: OwnedTLSConfig,
    properties: ConnectionProperties,
) -> lapin::Result<(Connection, Wire)> {
    let wire = Wire::default();
    let (given_up, socket) = (wire.given_up.clone(), Arc::clone(&wire.socket));
    let largest = *uri.query.frame_max.get_or_insert(LARGEST_FRAME);
    let connecting = Connection::connector(
        uri,
        reactor::runtime(),
        async move |uri, _| {
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
