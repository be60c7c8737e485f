//! The HTTP server: hyper's for HTTP/1.1, with a bound on connections, and a limit on each wait for a client.

use std::{convert::Infallible, error::Error, io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use poem::{
    Endpoint, Request, Response,
    http::{self, HeaderValue, header, uri::Scheme},
    web::{LocalAddr, RemoteAddr},
};
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;

use super::{body::Inbound, limits::LimitArgs};

/// The largest head of a request, in bytes.
const MAX_HEAD: usize = 16 * 1024;
/// What the kernel keeps of responses for each connection, in bytes. Its own choice grows to four megabytes, which
/// hides for long that a client reads nothing.
const SEND_BUFFER: u32 = 128 * 1024;
/// How many connections may wait to be accepted.
const BACKLOG: u32 = 1024;
/// How long, and how many bytes, the server reads of what a client still sends after the last response.
const LINGER: (Duration, u64) = (Duration::from_secs(1), 256 * 1024);

/// Listens at `address`.
pub(super) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    // Connections inherit it.
    socket.set_send_buffer_size(SEND_BUFFER)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

pub(super) struct Server<E> {
    pub(super) app: E,
    pub(super) limits: LimitArgs,
    /// One permit for each connection that may be open.
    pub(super) permits: Arc<Semaphore>,
    /// Cancelled: no new connections, and none of the others takes a further request.
    pub(super) stop: CancellationToken,
}

impl<E: Endpoint<Output = Response> + 'static> Server<E> {
    /// Accepts connections until `stop`; then lets the requests in flight end, for at most `grace`.
    pub(super) async fn run(self, listener: TcpListener, grace: Duration) {
        let (server, mut tasks) = (Arc::new(self), JoinSet::new());
        while let Some((tcp, permit)) = server.stop.run_until_cancelled(server.accept(&listener)).await {
            let server = Arc::clone(&server);
            tasks.spawn(async move {
                metrics::gauge!("http_connections").increment(1);
                // A connection that fails concerns its client alone.
                if let Err(error) = server.serve(tcp).await {
                    tracing::debug!(error = &*error, "a connection failed");
                }
                metrics::gauge!("http_connections").decrement(1);
                drop(permit);
            });
            while tasks.try_join_next().is_some() {}
        }
        drop(listener);
        let drained = async { while tasks.join_next().await.is_some() {} };
        let _ = timeout(grace, drained).await;
        tasks.shutdown().await;
    }

    /// The next connection, once the bound allows one more. Behind it, clients wait in the kernel's queue.
    async fn accept(&self, listener: &TcpListener) -> (TcpStream, Option<OwnedSemaphorePermit>) {
        loop {
            match listener.accept().await {
                // The semaphore is never closed.
                Ok((tcp, _)) => return (tcp, Arc::clone(&self.permits).acquire_owned().await.ok()),
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    // A process that is out of files would spin.
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn serve(&self, tcp: TcpStream) -> Result<(), Box<dyn Error + Send + Sync>> {
        // Responses are written whole: waiting for more would only delay them.
        tcp.set_nodelay(true)?;
        let addresses = (LocalAddr(tcp.local_addr()?.into()), RemoteAddr(tcp.peer_addr()?.into()));
        let mut stream = TimeoutStream::new(tcp);
        stream.set_write_timeout(Some(self.limits.answer_timeout));
        let mut stream = Box::pin(stream);
        let asked = CancellationToken::new();
        let ended = {
            let service = service_fn(|request: http::Request<Incoming>| {
                asked.cancel();
                let (local, remote) = addresses.clone();
                let mut request = Request::from((request, local, remote, Scheme::HTTP));
                request.set_data(Inbound::new(self.limits.body_timeout));
                async {
                    let mut response = self.app.get_response(request).await;
                    if self.permits.available_permits() == 0 {
                        // Others wait to be accepted.
                        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                    }
                    Ok::<_, Infallible>(http::Response::from(response))
                }
            });
            let mut http = http1::Builder::new();
            http.max_header_size(MAX_HEAD).max_buf_size(MAX_HEAD);
            // hyper counts the time until the next head from the end of the last response. So it is an idle timeout,
            // and the first head has its own.
            http.timer(TokioTimer::new()).header_read_timeout(self.limits.idle_timeout);
            let mut connection = pin!(http.serve_connection(TokioIo::new(&mut stream), service));
            let mut first = pin!(timeout(self.limits.header_timeout, asked.cancelled()));
            let (mut silent, mut stopping) = (true, false);
            loop {
                tokio::select! {
                    ended = &mut connection => break ended,
                    first = &mut first, if silent => {
                        silent = false;
                        if first.is_err() {
                            count_slow();
                            return Ok(());
                        }
                    }
                    () = self.stop.cancelled(), if !stopping => {
                        stopping = true;
                        connection.as_mut().graceful_shutdown();
                    }
                }
            }
        };
        if ended.as_ref().is_err_and(timed_out) {
            count_slow();
            return Ok(());
        }
        // A connection that is closed while its client still sends is reset, and takes the last response away.
        let mut rest = stream.as_mut().take(LINGER.1);
        let _ = timeout(LINGER.0, tokio::io::copy(&mut rest, &mut tokio::io::sink())).await;
        Ok(ended?)
    }
}

fn count_slow() {
    metrics::counter!("http_connections_cut_total", "reason" => "slow").increment(1);
}

/// Whether a client took too long: to send a head, or to read a response.
fn timed_out(error: &hyper::Error) -> bool {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
    error.is_timeout() || cause.is_some_and(|cause| cause.kind() == io::ErrorKind::TimedOut)
}

#[cfg(test)]
mod tests {
    use daemon::health::Health;
    use poem::{EndpointExt, Route, get, handler, web::Data};
    use tokio::io::AsyncWriteExt;

    use super::*;
    use crate::front::{Keys, guarded};

    /// Says that it has begun, and ends when it may.
    #[handler]
    async fn work(Data(doors): Data<&Arc<[Semaphore; 2]>>) {
        doors[0].add_permits(1);
        doors[1].acquire().await.unwrap().forget();
    }

    async fn send(address: SocketAddr, text: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        stream
    }

    fn request(path: &str) -> String {
        format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n")
    }

    async fn until_closed(mut stream: TcpStream) -> String {
        let mut text = String::new();
        let read = stream.read_to_string(&mut text);
        timeout(Duration::from_secs(20), read).await.expect("the connection ends").unwrap();
        text
    }

    #[tokio::test]
    async fn at_the_bound_connections_wait_and_end_with_their_response() {
        let doors = Arc::new([Semaphore::new(0), Semaphore::new(0)]);
        let routes = Route::new().at("/work", get(work).data(Arc::clone(&doors)));
        let long = Duration::from_hours(1);
        let limits = LimitArgs {
            max_connections: 2,
            header_timeout: long,
            body_timeout: long,
            answer_timeout: long,
            idle_timeout: long,
        };
        let app = guarded(crate::health::add_to(routes, &Health::new(), None), Keys::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
        let permits = Arc::new(Semaphore::new(2));
        let server = Server { app, limits, permits: Arc::clone(&permits), stop: stop.clone() };
        let server = tokio::spawn(server.run(listener, long));

        // One works, and one has all the time in the world to begin.
        let first = send(address, &request("/work")).await;
        doors[0].acquire().await.unwrap().forget();
        let mut idle = send(address, "GET /li").await;
        while permits.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let third = send(address, &request("/work")).await;
        doors[1].add_permits(1);
        let response = until_closed(first).await;
        assert!(response.contains("\r\nconnection: close\r\n"), "{response}");
        doors[0].acquire().await.unwrap().forget();
        idle.write_all(b"ve HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
        let response = until_closed(idle).await;
        assert!(
            response.starts_with("HTTP/1.1 200 ") && response.contains("connection: close"),
            "{response}"
        );
        // What is in flight may end.
        stop.cancel();
        doors[1].add_permits(1);
        let response = until_closed(third).await;
        assert!(response.starts_with("HTTP/1.1 200 "), "{response}");
        server.await.unwrap();
        assert!(TcpStream::connect(address).await.is_err());
    }
}
