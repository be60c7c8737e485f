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
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    clients::{Client, Clients},
    limits::LimitArgs,
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

    /// A place for one more. At the bound it is that of the client that has been waited for longest.
    async fn place(&self, clients: &Clients) -> Arc<Client> {
        loop {
            let (open, staying) = clients.open();
            let made = staying < self.connections || clients.cut_longest();
            if open < self.connections + RESERVE {
                return clients.enter(!made, self.limits);
            }
            // Until then what comes waits in the system's queue.
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
                client.works();
                let (local, remote) = (LocalAddr(local.into()), RemoteAddr(remote.into()));
                let mut request = Request::from((request, local, remote, Scheme::HTTP));
                request.set_data(Arc::clone(&client));
                let (app, client) = (Arc::clone(&self.app), Arc::clone(&client));
                async move {
                    let answer = app.get_response(request).await;
                    client.idle();
                    Ok::<_, Infallible>(http::Response::from(answer))
                }
            });
            let mut http = http1::Builder::new();
            http.max_header_size(MAX_HEAD).max_buf_size(MAX_HEAD);
            let mut connection = pin!(http.serve_connection(TokioIo::new(&mut stream), service));
            tokio::select! {
                // The client went, or sent what is no HTTP: that is its own business.
                _ = &mut connection => true,
                () = client.over() => false,
                () = self.stop.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    tokio::select! {
                        _ = connection => true,
                        () = client.over() => false,
                    }
                }
            }
        };
        if ended {
            stream.linger().await;
        } else if client.sending() {
            stream.say(&SLOW_HEAD.problem().raw());
        }
    }
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
