//! The private stack: PostgreSQL, RabbitMQ and the programs, for development and tests.
//!
//! Everything belongs to one [`Folder`](folder::Folder) and ends with the process that started it, also
//! when that is killed: the kernel tells the direct children ([`process`]), a small [`guard`] ends what
//! they have started and removes a temporary folder. Each part can be started, stopped, killed, paused
//! and resumed by itself, so that tests can take away what a bad day takes away.
//!
//! Linux only: it reads `/proc`, and `setpriv` (util-linux) arranges for the parent's death.

pub mod binary;
pub mod command;
pub mod ending;
pub mod folder;
pub mod guard;
pub mod log;
pub mod ports;
pub mod postgres;
pub mod proc;
pub mod process;
pub mod program;
pub mod rabbitmq;
pub mod roles;
pub mod servers;
pub mod stack;
pub mod testing;
pub mod tls;
pub mod users;

use std::io::Write;

/// A line for whoever watches. It goes to standard error: what a command is asked for goes to standard
/// output. Nobody may be left to read it.
pub fn say(line: &str) {
    let _closed = writeln!(std::io::stderr(), "devstack: {line}");
}

/// What a command was asked for.
pub fn show(text: &str) {
    let mut output = std::io::stdout().lock();
    let _closed = output.write_all(text.as_bytes()).and_then(|()| output.flush());
}

/// The Rust that the documents print compiles.
#[cfg(doctest)]
mod documents {
    #[doc = include_str!("../../../docs/writing.md")]
    struct Writing;
    #[doc = include_str!("../../../docs/subscribing.md")]
    struct Subscribing;
}
