//! The HTTP server: takes connections within a bound, and ends those whose clients keep it waiting.
//!
//! It speaks HTTP/1.1 alone. hyper's own server for it is used directly, since poem's takes any number of
//! connections and has no time limit on a request's head.

use std::{convert::Infallible, io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use poem::{
    Endpoint, Request, Response,
    http::{self, uri::Scheme},
    web::{LocalAddr, RemoteAddr},
};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    time::{sleep, timeout, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    clients::{Client, Clients, Cut},
    limits::LimitArgs,
    observe::refusal,
    stream::Stream,
};
use crate::problem::SLOW_HEAD;

/// The largest head of a request, in bytes.
const MAX_HEAD: usize = 16 * 1024;
/// Connections beyond the bound, on which clients are told so and health is answered all the same.
pub(super) const RESERVE: usize = 64;

/// What serving takes.
pub(super) struct Server<E> {
    pub(super) app: Arc<E>,
    pub(super) limits: LimitArgs,
    /// How many connections may be open.
    pub(super) connections: usize,
    /// No new connections once it is cancelled.
    pub(super) stop: CancellationToken,
    /// How long requests under way may take to end then.
    pub(super) grace: Duration,
}

impl<E: Endpoint<Output = Response> + 'static> Server<E> {
    /// Serves until `stop`, and until the requests under way have ended.
    pub(super) async fn run(self, listener: TcpListener) -> io::Result<()> {
        let local = listener.local_addr()?;
        tracing::info!(addr = %format_args!("socket://{local}"), "listening");
        let (tasks, abandon, clients) = (TaskTracker::new(), CancellationToken::new(), Clients::default());
        let sweeper = tokio::spawn(clients.clone().sweep());
        let (stop, grace) = (self.stop.clone(), self.grace);
        let server = Arc::new(self);
        while let Some((tcp, remote)) = stop.run_until_cancelled(accept(&listener)).await {
            let Some(client) = stop.run_until_cancelled(server.place(&clients)).await else { break };
            let serve = Arc::clone(&server).serve(tcp, (local, remote), client);
            let abandon = abandon.clone();
            tasks.spawn(async move { abandon.run_until_cancelled(serve).await });
        }
        drop(listener);
        tasks.close();
        if timeout(grace, tasks.wait()).await.is_err() {
            abandon.cancel();
            tasks.wait().await;
        }
        sweeper.abort();
        Ok(())
    }

    /// A place for one more. At the bound it is that of the client that has been waited for longest. Until
    /// there is one, what comes waits in the system's queue.
    async fn place(&self, clients: &Clients) -> Arc<Client> {
        loop {
            let (open, staying) = clients.open();
            let full = staying >= self.connections;
            let crowded = match if full { clients.cut_longest() } else { Cut::Done } {
                Cut::Done => false,
                Cut::Nobody => true,
                Cut::NotBefore(moment) => {
                    let _ = timeout_at(moment, clients.left()).await;
                    continue;
                }
            };
            if open < self.connections + RESERVE {
                return clients.enter(crowded, self.limits);
            }
            clients.left().await;
        }
    }

    async fn serve(
        self: Arc<Self>,
        tcp: TcpStream,
        (local, remote): (SocketAddr, SocketAddr),
        client: Arc<Client>,
    ) {
        // Answers are written whole, and waiting for more would only hold them up.
        let _ = tcp.set_nodelay(true);
        let mut stream = Stream::new(tcp, Arc::clone(&client));
        let ended = {
            let service = service_fn(|request: http::Request<Incoming>| {
                let (local, remote) = (LocalAddr(local.into()), RemoteAddr(remote.into()));
                let mut request = Request::from((request, local, remote, Scheme::HTTP));
                request.set_data(Arc::clone(&client));
                let (app, client) = (Arc::clone(&self.app), Arc::clone(&client));
                async move {
                    // hyper reads the next request while an answer is still to be taken, and begins with it after
                    // that.
                    client.asked();
                    let answer = app.get_response(request).await;
                    client.answered();
                    Ok::<_, Infallible>(http::Response::from(answer))
                }
            });
            let mut http = http1::Builder::new();
            http.max_header_size(MAX_HEAD).max_buf_size(MAX_HEAD);
            let mut connection = pin!(http.serve_connection(TokioIo::new(&mut stream), service));
            tokio::select! {
                // First: a request that is cut off as it arrives is not begun any more.
                biased;
                () = client.over() => false,
                // The client went, or sent what is no HTTP: that is its own business.
                _ = &mut connection => true,
                () = self.stop.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    tokio::select! {
                        biased;
                        () = client.over() => false,
                        _ = connection => true,
                    }
                }
            }
        };
        if ended {
            stream.linger().await;
        } else if client.sending() {
            stream.say(&refusal(&SLOW_HEAD));
        }
    }
}

/// What the system keeps of answers for each connection, in bytes; it takes twice as much for its own books. With
/// its usual four megabytes it could not be seen for long whether a client takes anything, and a thousand who take
/// nothing would be gigabytes.
const SEND_BUFFER: u32 = 128 * 1024;
/// How many connections may wait to be taken. More than that makes clients try again later.
const BACKLOG: u32 = 1024;

/// Listens at `address`.
pub(crate) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    // Connections inherit it.
    socket.set_send_buffer_size(SEND_BUFFER)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// The next connection. After an error it waits a moment, which would be a hot loop while the process is out
/// of files.
async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use poem::{EndpointExt, Route, get, handler, web::Data};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        sync::Semaphore,
    };

    use super::*;
    use crate::{
        front::{Keys, guarded},
        health::Health,
    };

    /// Says that it has come, and works until it may go.
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

    /// Reads until an answer has begun, and says its status.
    async fn status(stream: &mut TcpStream) -> u16 {
        let mut text = [0; 12];
        stream.read_exact(&mut text).await.unwrap();
        std::str::from_utf8(&text).unwrap()["HTTP/1.1 ".len()..].parse().unwrap()
    }

    #[tokio::test]
    async fn at_the_bound_who_is_waited_for_makes_place_and_nobody_else() {
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
        let app = Arc::new(guarded(Health::new().add_to(routes, None), Keys::default()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
        let server = Server { app, limits, connections: 2, stop: stop.clone(), grace: long };
        let server = tokio::spawn(server.run(listener));

        let mut asked = send(address, &request("/live")).await;
        assert_eq!(status(&mut asked).await, 200);
        let mut half = send(address, "GET /liv").await;
        let mut first = send(address, &request("/work")).await;
        doors[0].acquire().await.unwrap().forget();
        asked.read_to_end(&mut Vec::new()).await.expect("the one that was waited for longest makes place");
        half.write_all(b"e HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
        assert_eq!(status(&mut half).await, 200, "the other one is still there");
        let mut second = send(address, &request("/work")).await;
        doors[0].acquire().await.unwrap().forget();
        half.read_to_end(&mut Vec::new()).await.expect("now it makes place");

        // Nobody is waited for any more.
        let mut answer = String::new();
        send(address, &request("/work")).await.read_to_string(&mut answer).await.unwrap();
        let answer: Vec<_> = answer
            .lines()
            .filter(|line| !line.starts_with("date: ") && !line.starts_with("x-request-id: "))
            .collect();
        insta::assert_snapshot!(answer.join("\n"), @r#"
        HTTP/1.1 503 Service Unavailable
        content-type: application/problem+json
        retry-after: 1
        connection: close
        cache-control: no-store
        content-length: 184

        {"type":"/problems/too-many-connections","title":"Too many connections","status":503,"detail":"The service has as many connections as it can take. Nothing was done. Try again later."}
        "#);
        let mut live = String::new();
        send(address, &request("/live")).await.read_to_string(&mut live).await.unwrap();
        assert!(live.starts_with("HTTP/1.1 200 ") && live.contains("connection: close"), "{live}");

        doors[1].add_permits(2);
        for stream in [&mut first, &mut second] {
            assert_eq!(status(stream).await, 200);
        }
        stop.cancel();
        server.await.unwrap().unwrap();
    }
}
