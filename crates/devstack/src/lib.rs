//! The private stack: PostgreSQL, RabbitMQ and the programs, for development and tests.
//!
//! Everything belongs to one [`Folder`](folder::Folder) and ends with the process that started it, also when that is killed:
//! the kernel signals the direct children ([`process`]), and a small [`reaper`] process ends what they have started and
//! removes a temporary folder. Each part can be started, stopped, killed, paused
//! and resumed by itself, so that tests can take away what a bad day takes away.
//!
//! Linux only: it reads `/proc`, and `setpriv` (util-linux) arranges for the parent's death.

pub mod binary;
pub mod command;
pub mod dashboard;
pub mod folder;
pub mod log;
pub mod otlp;
pub mod ports;
pub mod postgres;
pub mod proc;
pub mod process;
pub mod program;
pub mod rabbitmq;
pub mod reaper;
pub mod release;
pub mod roles;
pub mod servers;
pub mod shutdown;
pub mod stack;
pub mod testing;
pub mod tls;
pub mod users;

use std::io::Write;

/// Prints a line about progress to standard error, which may be closed.
pub fn say(line: &str) {
    let _closed = writeln!(std::io::stderr(), "devstack: {line}");
}

/// Prints the result of a command to standard output.
pub fn show(text: &str) {
    let mut output = std::io::stdout().lock();
    let _closed = output.write_all(text.as_bytes()).and_then(|()| output.flush());
}

/// The Rust that the documents print compiles.
#[cfg(doctest)]
mod documents {
    #[doc = include_str!("../../../docs/writing/publish.md")]
    struct Publishing;
    #[doc = include_str!("../../../docs/subscribing.md")]
    struct Subscribing;
}
