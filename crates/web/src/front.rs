//! The front of an API: which clients may use it, how many at a time, and how long they may take.
//!
//! A service that faces the world has a proxy before it. The proxy bounds what each client may take; what is here
//! keeps the process alive and its memory bounded whatever comes.

mod admission;
mod body;
mod caller;
mod concurrency;
mod keys;
mod limits;
mod observe;
mod request_id;
mod series;
mod server;
mod span;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context;
use daemon::{config::SettingError, shutdown::Shutdown};
use poem::{Endpoint, Response, Route};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use self::server::{Server, listen};
pub use self::{
    admission::Admission,
    body::{MAX_BODY, read_body},
    caller::Caller,
    concurrency::{ConcurrencyArgs, ConcurrencyLimit},
    keys::{Key, KeyArgs, Keys},
    limits::{ConnectionLimits, LimitArgs},
    observe::{guarded, headers_only},
};

/// Settings of the front.
#[derive(Clone, Debug, clap::Args)]
pub struct FrontArgs {
    /// What clients may take.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Which clients are served.
    #[command(flatten)]
    pub keys: KeyArgs,
}

/// The front of an API, as its settings say.
pub struct Front {
    listen: SocketAddr,
    limits: LimitArgs,
    connections: ConnectionLimits,
    keys: Keys,
}

impl Front {
    /// At `listen`. `waiting` clients may wait for an event, each with a connection beside the others. An error if the
    /// keys are wrong, or missing although other machines can reach the address.
    pub fn new(listen: SocketAddr, args: &FrontArgs, waiting: u32) -> Result<Self, SettingError> {
        series::begin();
        let (limits, keys) = (args.limits, Keys::new(&args.keys, listen)?);
        Ok(Self {
            listen,
            limits,
            connections: ConnectionLimits::within_open_files(limits.max_connections, waiting),
            keys,
        })
    }

    /// How many connections may be open.
    pub fn connections(&self) -> ConnectionLimits {
        self.connections
    }

    /// The keys, for an [`Admission`] of the program's own.
    pub fn keys(&self) -> &Keys {
        &self.keys
    }

    /// Serves `routes` as the task `http`, until the end is requested; then lets the requests in flight end, for at
    /// most `drain`. Bound when this returns, so that a taken address is the start's own error. What is returned is
    /// cancelled after the last response.
    pub fn start(
        self,
        shutdown: &Shutdown,
        routes: Route,
        drain: Duration,
    ) -> anyhow::Result<CancellationToken> {
        let keys = self.keys.clone();
        self.start_with(shutdown, routes, keys, drain)
    }

    /// As [`start`](Self::start), where `admission` decides which requests are served, and not the keys alone.
    pub fn start_with(
        self,
        shutdown: &Shutdown,
        routes: impl Endpoint<Output = Response> + 'static,
        admission: impl Admission,
        drain: Duration,
    ) -> anyhow::Result<CancellationToken> {
        let address = self.listen;
        let listener = listen(address).with_context(|| format!("LISTEN: cannot listen on {address}"))?;
        tracing::info!(addr = %format_args!("socket://{}", listener.local_addr()?), "listening");
        let (keys, stop) = (self.keys, shutdown.requested().clone());
        shutdown.spawn("keys", async move {
            keys.watch(stop).await;
            Ok(())
        });
        let connections = self.connections.general.saturating_add(self.connections.waiting) as usize;
        let permits = Arc::new(Semaphore::new(connections));
        let stop = shutdown.requested().clone();
        let server = Server { app: guarded(routes, admission), limits: self.limits, permits, stop };
        // Ends before the process gives up: a client that takes too long is cut off, and is no failure of ours.
        let grace = drain.mul_f32(0.9);
        let ended = CancellationToken::new();
        let end = ended.clone().drop_guard();
        shutdown.spawn("http", async move {
            let _end = end;
            server.run(listener, grace).await;
            Ok(())
        });
        Ok(ended)
    }
}
