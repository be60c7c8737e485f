//! The three paths of a background program, by hyper alone; and the `health` command, which asks for one of them.
//!
//! Each connection carries one request and has a deadline, so nothing here grows with what clients do.

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    client,
    header::{self, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    health::{Health, Identity, PATHS, READY},
    host::{self, AllowedHost},
    shutdown::Shutdown,
};

/// Connections that are served at the same time; accepting waits beyond them.
const CONNECTIONS: usize = 64;
/// How long a connection may take from its begin to its end.
const DEADLINE: Duration = Duration::from_secs(10);
/// The largest head of a request, in bytes.
const MAX_HEAD: usize = 16 * 1024;

/// How long the `health` command waits for its response.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(3);
/// How much of a response the `health` command reads, in bytes.
const MAX_RESPONSE: usize = 1024 * 1024;

/// Where a background program is asked for its health and its metrics.
#[derive(Clone, Debug, clap::Args)]
pub struct ProbeArgs {
    /// The hosts that a request may name in `Host`, separated by commas, beside `localhost`, names below it, loopback
    /// addresses and the address that the client connects to. Without ports; `*` for any. Other hosts get 421: a web
    /// page could read from the program under its own name.
    #[arg(long, env = "ALLOWED_HOSTS", value_name = "HOST", value_delimiter = ',')]
    pub allowed_hosts: Vec<AllowedHost>,
}

/// What the responses are made from.
struct Probes {
    health: Health,
    metrics: Option<PrometheusHandle>,
    hosts: Vec<AllowedHost>,
}

/// Serves `/live`, `/ready` and `/metrics` at `address` as the task `http`, until the end is requested. Bound when
/// this returns, so that a taken address is the start's own error.
pub fn serve(
    shutdown: &Shutdown,
    address: SocketAddr,
    args: &ProbeArgs,
    health: &Health,
    metrics: Option<PrometheusHandle>,
) -> anyhow::Result<()> {
    let bind = || -> io::Result<TcpListener> {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)
    };
    let listener = bind().with_context(|| format!("LISTEN: cannot listen on {address}"))?;
    tracing::info!(addr = %format_args!("socket://{}", listener.local_addr()?), "listening");
    let probes = Arc::new(Probes { health: health.clone(), metrics, hosts: args.allowed_hosts.clone() });
    let stop = shutdown.requested().clone();
    shutdown.spawn("http", async move {
        accept(listener, probes, stop).await;
        Ok(())
    });
    Ok(())
}

async fn accept(listener: TcpListener, probes: Arc<Probes>, stop: CancellationToken) {
    let (permits, tasks) = (Arc::new(Semaphore::new(CONNECTIONS)), TaskTracker::new());
    let next = async || {
        // The semaphore is never closed.
        let permit = Arc::clone(&permits).acquire_owned().await.ok();
        loop {
            match listener.accept().await {
                Ok((tcp, _)) => return (tcp, permit),
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    // A process that is out of files would spin.
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    };
    while let Some((tcp, permit)) = stop.run_until_cancelled(next()).await {
        let probes = Arc::clone(&probes);
        tasks.spawn(async move {
            let local = tcp.local_addr().ok().map(|address| address.ip());
            let service = service_fn(|request: Request<Incoming>| {
                let response = probes.respond(&request, local);
                async move { Ok::<_, Infallible>(response) }
            });
            let mut http = http1::Builder::new();
            http.keep_alive(false).max_header_size(MAX_HEAD).max_buf_size(MAX_HEAD);
            // How the connection ends concerns its client alone.
            let _ = timeout(DEADLINE, http.serve_connection(TokioIo::new(tcp), service)).await;
            drop(permit);
        });
    }
    tasks.close();
    // At most the deadline of a connection; the shutdown has its own.
    tasks.wait().await;
}

impl Probes {
    fn respond(&self, request: &Request<Incoming>, local: Option<IpAddr>) -> Response<Full<Bytes>> {
        let text = "text/plain; charset=utf-8";
        let path = request.uri().path();
        let read_only = [Method::GET, Method::HEAD].contains(request.method());
        let (status, content_type, body) =
            if !host::is_allowed(request.uri(), request.headers(), local, &self.hosts) {
                (
                    421,
                    text,
                    "The Host of this request is not one of this program's; ALLOWED_HOSTS can add it.\n"
                        .to_owned(),
                )
            } else if PATHS.contains(&path) && !read_only {
                (405, text, "Only GET and HEAD.\n".to_owned())
            } else {
                match self.health.respond(path, self.metrics.as_ref()) {
                    Some(response) => (response.status, response.content_type, response.body),
                    None => (404, text, format!("There are {}.\n", PATHS.join(", "))),
                }
            };
        let mut response = Response::new(Full::from(body));
        *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if status == 405 {
            headers.insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        }
        response
    }
}

/// The `health` command of every program, for a container's health check: asks the process that listens at
/// `address` whether it is ready, and fails with its reasons, or when it is not the one that is `asked` for.
pub async fn health(address: SocketAddr, asked: &Identity) -> anyhow::Result<()> {
    let address = reachable(address);
    let (status, body) = timeout(HEALTH_TIMEOUT, get(address, READY))
        .await
        .unwrap_or_else(|_| Err(anyhow!("no response within {HEALTH_TIMEOUT:?}")))
        .with_context(|| format!("no program responds at http://{address}{READY}"))?;
    let said: serde_json::Value = serde_json::from_str(&body).unwrap_or_default();
    if let Some(difference) = asked.differs_from(&said["process"]) {
        bail!(
            "another process listens at {address}: {difference}. Ask at the right address (--listen), or see why \
             yours does not listen there"
        );
    }
    if !status.is_success() {
        bail!("not ready: {}", body.trim());
    }
    println!("{}", body.trim());
    Ok(())
}

/// One GET on a connection of its own.
async fn get(address: SocketAddr, path: &str) -> anyhow::Result<(StatusCode, String)> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get(path).header(header::HOST, address.to_string()).body(Empty::<Bytes>::new())?;
    let response = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_RESPONSE).collect().await;
        let body = body.map_err(|error| anyhow!("the response broke off: {error}"))?;
        Ok((status, String::from_utf8_lossy(&body.to_bytes()).into_owned()))
    };
    tokio::pin!(response);
    tokio::select! {
        response = &mut response => response,
        ended = connection => match ended {
            // It may have ended with the response.
            Ok(()) => response.await,
            Err(error) => Err(error.into()),
        },
    }
}

/// An address to connect to for what listens at `address`: from this machine, it is reached by loopback where it
/// listens everywhere.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_listens_everywhere_is_reached_by_loopback() {
        let reachable = |address: &str| super::reachable(address.parse().unwrap()).to_string();
        assert_eq!(reachable("0.0.0.0:8000"), "127.0.0.1:8000");
        assert_eq!(reachable("[::]:8000"), "[::1]:8000");
        assert_eq!(reachable("10.1.2.3:8000"), "10.1.2.3:8000");
    }
}
