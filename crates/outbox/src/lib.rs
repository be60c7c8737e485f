//! The writing side of a transactional outbox.
//!
//! A service appends events in the transaction that changes its rows; `outbox-relay` publishes them.
//! Either both are committed or neither. A service in another language does the same with a plain
//! `INSERT INTO outbox.event`: this crate is a convenience, the schema is the contract.

mod append;
mod erase;
mod schema;
mod wake;

pub use append::{AppendError, MAX_HEADERS, MAX_PAYLOAD, NewEvent, append};
pub use erase::{Ended, erase};
pub use schema::{SCHEMA, Source, SourceError, install, migrator, source};
pub use wake::{CHANNEL, Waker};
