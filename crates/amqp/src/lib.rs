//! Connections to RabbitMQ: the nodes and their URLs, connecting to the first that can be used, and doing so again.
//!
//! [`Nodes`] are parsed from URLs, and [`connect`](Nodes::connect) tries them in turn, each for a limited time. A loop
//! that always has a connection remembers in a [`Reconnect`] where to begin and how long to pause. A [`Connection`]
//! ends when it is dropped, and when the other side is gone without a word: both sides send heartbeats.
//!
//! lapin reads and writes each connection on a thread of its own, with 8 MiB of buffers once the broker
//! has agreed to frames of 128 KiB. The thread goes on until the broker answers or the heartbeat fails,
//! whether anybody still holds or awaits the connection or not; before the broker has answered there is no
//! heartbeat. So every attempt at a broker that has stopped would leave a thread behind, and all of them
//! would open a connection when it goes on. A [`Connection`], and an attempt at one, ends what belongs to it.
//!
//! It also stands between the broker and what lapin cannot read: headers that are nested so deep that parsing
//! them ends the process, or larger than a frame may be, or not UTF-8. They are removed from the message on its
//! way in, and [`REMOVED`] among its headers says so. So no message ends a connection, however often it comes.

mod backoff;
mod connection;
mod fault;
mod header;
#[cfg(feature = "management")]
mod management;
mod nodes;
mod reactor;
mod reader;
mod reconnect;
mod screen;
mod urls;

pub use backoff::Backoff;
pub use connection::Connection;
pub use fault::{describe, without_users};
pub use header::REMOVED;
#[cfg(feature = "management")]
pub use management::{
    Bindings, Coverage, Headers, InvalidManagement, Management, ManagementError, QueueState, Reaches,
};
pub use nodes::{InvalidNodes, Node, Nodes, Unreachable};
pub use reconnect::Reconnect;

/// The README's program compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
