//! What stands in front of every program's routes: who may come in, how many at a time, and how long they
//! may keep the program waiting.

mod body;
mod caller;
mod clients;
mod gate;
mod keys;
mod limits;
mod observe;
mod request_id;
mod server;
mod stream;
mod unsent;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use poem::Route;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use self::server::Server;
pub use self::{
    body::{MAX_BODY, read_body},
    caller::Caller,
    gate::{Gate, GateArgs},
    keys::{KeyArgs, Keys},
    limits::{LimitArgs, Room},
    observe::guarded,
};
pub(crate) use self::{server::listen, unsent::Shared};
use crate::config::SettingError;

/// Settings of what stands in front.
#[derive(Clone, Debug, clap::Args)]
pub struct FrontArgs {
    /// What clients may take.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Who may come in.
    #[command(flatten)]
    pub keys: KeyArgs,
}

impl FrontArgs {
    /// Whether a program could begin to listen with these settings.
    pub fn check(&self, listen: SocketAddr) -> Result<(), SettingError> {
        Keys::new(&self.keys, listen).map(drop)
    }
}

/// What stands in front of a program's routes, as its settings say.
#[derive(Debug)]
pub struct Front {
    listen: SocketAddr,
    limits: LimitArgs,
    room: Room,
    keys: Keys,
}

impl Front {
    /// At `listen`. `waiting` clients may have the program wait for something to happen, beside all others.
    /// An error where the keys are wrong, or missing where they have to be.
    pub fn new(listen: SocketAddr, args: &FrontArgs, waiting: u32) -> Result<Self, SettingError> {
        let (limits, keys) = (args.limits, Keys::new(&args.keys, listen)?);
        Ok(Self { listen, limits, room: Room::make(limits.max_connections, waiting), keys })
    }

    /// How many clients there is room for.
    pub fn room(&self) -> Room {
        self.room
    }

    /// The keys.
    pub(crate) fn keys(&self) -> Keys {
        self.keys.clone()
    }

    /// Where to listen.
    pub(crate) fn listen(&self) -> SocketAddr {
        self.listen
    }

    /// Serves the routes until `stop`; then lets the requests under way end, for at most `grace`.
    pub(crate) async fn serve(
        self,
        listener: TcpListener,
        routes: Route,
        stop: CancellationToken,
        grace: Duration,
    ) -> io::Result<()> {
        let (limits, connections) = (self.limits, self.room.all());
        Server { app: Arc::new(guarded(routes, self.keys)), limits, connections, stop, grace }
            .run(listener)
            .await
    }
}
